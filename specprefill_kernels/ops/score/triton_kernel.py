"""The score on Triton: layers that look alike go into one launch of each pass (see triton_passes.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from specprefill_kernels import _checks, _triton
from specprefill_kernels.ops.score import triton_config, triton_passes
from specprefill_kernels.ops.score.options import (
    ScoreOptions,
    Sequences,
    head_axis,
    token_axis,
)
from specprefill_kernels.ops.score.reference import check_contents, check_scores
from specprefill_kernels.ops.score.triton_config import ScoreConfig

unavailable = _triton.unavailable
DEVICE_TYPE = _triton.DEVICE_TYPE

# Look-ahead rows of a tile: the paper's 8 and those of a longer observation window.
MAX_BLOCK_N = 16
# Bytes of the widest load; Triton compiles another kernel for pointers that are not aligned to them.
_ALIGNMENT = 16
# A window beyond any prompt, as 32 bits hold it with room for a sum.
NO_WINDOW = 1 << 30

_FP8_FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class _Layer:
    """What layers of one launch have in common: all that is no pointer."""

    heads: tuple[int, int, int]  # query heads, KV heads, head_dim
    query_dtype: torch.dtype
    query_strides: tuple[int, ...]
    key_dtype: torch.dtype
    key_strides: tuple[int, int, int, int]  # sequence or block, head, token, dimension
    key_tokens: int
    key_blocks: int
    window: int
    lse_strides: tuple[int, ...] | None
    scale_stride: int | None
    wide_loads: bool  # keys can be read 16 bytes at a time

    @property
    def group(self) -> int:
        return self.heads[0] // self.heads[1]

    @property
    def dot_dtype(self) -> torch.dtype:
        """What both operands are converted to without loss; fp8 fits both 16-bit types."""
        if self.key_dtype in _FP8_FORMATS or self.key_dtype == self.query_dtype:
            return self.query_dtype
        return torch.float32


def score_layers_(
    state: Tensor,
    queries: list[Tensor],
    keys: list[Tensor],
    sequences: Sequences,
    windows: list[int],
    lse: list[Tensor],
    key_scales: list[Tensor],
    workspace: Tensor | None,
    options: ScoreOptions,
) -> None:
    if _triton.checks_values():
        rows = check_contents(state, queries[0].shape[1], keys, sequences, options)
    for layer, members in _alike(queries, keys, windows, lse, key_scales, options):
        at_once = _layers_per_launch(layer, state)
        for first in range(0, len(members), at_once):
            some = members[first : first + at_once]
            chosen = [[tensors[i] for i in some] if tensors else [] for tensors in (queries, keys, lse, key_scales)]
            _Group(layer, state, sequences, options, *chosen).score(workspace)
    if _triton.checks_values():
        check_scores(state, rows, bool(lse))


def _layers_per_launch(layer: _Layer, state: Tensor) -> int:
    _, kv_heads, head_dim = layer.heads
    key_bytes = state.shape[0] * state.shape[2] * kv_heads * head_dim * layer.key_dtype.itemsize
    return triton_config.layers_per_launch(_triton.target_of(state), key_bytes, 2 if layer.lse_strides is None else 1)


def _alike(
    queries: list[Tensor],
    keys: list[Tensor],
    windows: list[int],
    lse: list[Tensor],
    key_scales: list[Tensor],
    options: ScoreOptions,
) -> Iterator[tuple[_Layer, list[int]]]:
    """Layers that differ in their pointers only, as (what they share, their indices)."""
    groups: dict[_Layer, list[int]] = {}
    heads, tokens = head_axis(options.layout), token_axis(options.layout)
    packed = options.layout == "packed"
    for i, (query, key) in enumerate(zip(queries, keys)):
        scale = key_scales[i] if key_scales else None
        layer = _Layer(
            (query.shape[2], key.shape[heads], query.shape[3]),
            query.dtype,
            query.stride(),
            key.dtype,
            (0 if packed else key.stride(0), key.stride(heads), key.stride(tokens), key.stride(-1)),
            key.shape[tokens],
            key.shape[0],
            min(windows[i], NO_WINDOW),
            lse[i].stride() if lse else None,
            None if scale is None else (scale.stride(0) if scale.numel() > 1 else 0),
            _wide_loads(key),
        )
        groups.setdefault(layer, []).append(i)
    yield from groups.items()


def _wide_loads(key: Tensor) -> bool:
    """Whether rows are contiguous and start at multiples of 16 bytes."""
    if key.stride(-1) != 1 or key.data_ptr() % _ALIGNMENT:
        return False
    return all(stride * key.element_size() % _ALIGNMENT == 0 for stride in key.stride()[:-1])


def row_tile(look_ahead: int, group: int) -> tuple[int, int]:
    """(look-ahead rows of a tile, rows of a GQA group in all, both padded to powers of two)."""
    block_n = min(triton_config.power_of_2(look_ahead), MAX_BLOCK_N)
    return block_n, block_n * triton_config.power_of_2(group)


def row_blocks(look_ahead: int, group: int, block_m: int) -> int:
    """Tiles of block_m rows that hold the look-ahead rows of a GQA group."""
    block_n, _ = row_tile(look_ahead, group)
    return -(-group // (block_m // block_n)) * -(-look_ahead // block_n)


def score_workspace_size(
    batch: int,
    look_ahead: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_len: int,
    layers: int,
    pool_kernel_size: int,
) -> int:
    """Bytes that `score_layers_` needs here for any head_dim, dtype and pooling: partial sums of rows, and joined."""
    del head_dim, pool_kernel_size
    target = _triton.default_target()
    layers = min(layers, triton_config.LAYER_SLOTS[-1])
    most = 0
    # Of several layers, the one with the most KV heads may have the most rows: each KV head's are padded.
    for kv_heads in range(num_kv_heads, num_q_heads + 1):
        group = -(-num_q_heads // kv_heads)
        for config in triton_config.configs(target):
            tile = config.normalize
            rows = layers * batch * kv_heads * row_blocks(look_ahead, group, config.block_m) * config.block_m
            most = max(most, 2 * rows * -(-(max_len + look_ahead) // (tile.block_t * tile.tiles)))
    return 4 * (most + layers * batch * look_ahead * num_q_heads) + _ALIGNMENT


class _Group:
    """One launch of each pass."""

    def __init__(
        self,
        layer: _Layer,
        state: Tensor,
        sequences: Sequences,
        options: ScoreOptions,
        queries: list[Tensor],
        keys: list[Tensor],
        lse: list[Tensor],
        key_scales: list[Tensor],
    ) -> None:
        self.layer, self.state, self.sequences, self.options = layer, state, sequences, options
        self.layers = len(queries)
        slots = next(size for size in triton_config.LAYER_SLOTS if size >= self.layers)
        pad = slots - self.layers
        raw = [key.view(torch.uint8) if key.dtype in _FP8_FORMATS else key for key in keys]
        self.queries, self.keys = (tuple(tensors + tensors[-1:] * pad) for tensors in (queries, raw))
        self.lse, self.key_scales = (tuple(t + t[-1:] * pad) if t else None for t in (lse, key_scales))
        self.batch, self.look_ahead = queries[0].shape[:2]
        self.target = _triton.target_of(state)
        self.block_n, rows = row_tile(self.look_ahead, layer.group)
        self.head = triton_config.split_head(layer.heads[2], layer.dot_dtype.itemsize, layer.wide_loads)
        self.config: ScoreConfig = triton_config.choose(
            self.target, layer.heads[2], layer.dot_dtype.itemsize, rows, layer.wide_loads
        )
        self.row_blocks = row_blocks(self.look_ahead, layer.group, self.config.block_m)
        self.units = self.layers * layer.heads[1] * self.row_blocks

    def score(self, workspace: Tensor | None) -> None:
        lse, strides = self.lse, self.layer.lse_strides
        if lse is None:
            joined = self._sum(workspace)
            lse, strides = tuple(joined) + (joined[-1],) * (len(self.queries) - self.layers), joined.stride()[1:]
        self._pool(lse, strides)

    def _sum(self, workspace: Tensor | None) -> Tensor:
        """lse [layers, B, N, Hq] in base 2: the first two passes."""
        tile, config = self.config.normalize, self.config
        split_tokens = tile.block_t * tile.tiles
        extra = self.options.extra_keys
        readable = self.state.shape[2] + (self.look_ahead - 1 if extra else 0)
        splits = -(-readable // split_tokens)
        partial = self.units * self.batch * splits * config.block_m
        heads = self.layer.heads[0]
        joined = self.layers * self.batch * self.look_ahead * heads
        scratch = self._scratch(workspace, 2 * partial + joined)
        maxima, sums, lse = scratch.split([partial, partial, joined])
        lse = lse.view(self.layers, self.batch, self.look_ahead, heads)
        _triton.launch(
            triton_passes.partial_sums,
            (splits * self.batch * self.units,),
            self.queries, self.keys, self.key_scales, maxima, sums,
            *self._sequences(), self.sequences.block_table,
            *self._strides(), *self._sizes(), splits, *self._numbers(),
            on=self.state, TILES=tile.tiles, BLOCK_T=tile.block_t, EXTRA_KEYS=extra,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **self._constexprs(),
        )  # fmt: skip
        _triton.launch(
            triton_passes.join_sums,
            (self.batch * self.units,),
            lse, maxima, sums, *self._sequences(), *self._sizes(), splits,
            on=self.state, BLOCK_M=config.block_m, BLOCK_N=self.block_n, BLOCK_S=triton_config.JOINED_AT_ONCE,
            SPLIT_TOKENS=split_tokens, EXTRA_KEYS=extra, num_warps=4, num_stages=1,
        )  # fmt: skip
        return lse

    def _scratch(self, workspace: Tensor | None, numbers: int) -> Tensor:
        """fp32 scratch memory, from the caller's workspace where there is one."""
        if workspace is None:
            return torch.empty(numbers, dtype=torch.float32, device=self.state.device)
        lead = -workspace.data_ptr() % _ALIGNMENT
        if workspace.numel() < lead + 4 * numbers:
            _checks.fail("workspace", f"at least {lead + 4 * numbers} bytes", f"{workspace.numel()}")
        return workspace[lead : lead + 4 * numbers].view(torch.float32)

    def _pool(self, lse: tuple[Tensor, ...], lse_strides: Any) -> None:
        tile, options, state = self.config.pool, self.options, self.state
        size = options.pool_kernel_size if options.pool_order == "before_max" else 1
        half = min(size // 2, state.shape[2])  # a wider window holds the whole prompt wherever it is centred
        if size == 1:
            pool, out_tokens = "none", tile.block_t
        elif 4 * half <= tile.block_t:
            pool, out_tokens = "tile", tile.block_t - 2 * half
        else:
            pool, out_tokens = "wide", tile.block_t
        programs = -(-state.shape[2] // (out_tokens * tile.tiles))
        one_row = state.shape[1] == 1 and self.look_ahead > 1
        _triton.launch(
            triton_passes.pool_max,
            (programs * self.batch * self.units,),
            state, self.queries, self.keys, self.key_scales, lse,
            *self._sequences(), self.sequences.block_table, *state.stride()[:2], *lse_strides,
            *self._strides(), *self._sizes(), *self._numbers(), half, float(size), out_tokens, programs,
            on=state, TILES=tile.tiles, BLOCK_T=tile.block_t, EXTRA_KEYS=options.extra_keys,
            POOL=pool, VALID_EDGE=options.pool_edge == "valid" and size > 1, ONE_ROW=one_row,
            UPCAST=self.target.interpreted, LSE_BASE_2=self.lse is None,
            num_warps=tile.num_warps, num_stages=triton_config.pool_stages(self.target, tile, pool == "wide"),
            **self._constexprs(),
        )  # fmt: skip

    def _sequences(self) -> tuple[Any, ...]:
        return self.sequences.seq_lens, self.sequences.cu_seqlens, self.sequences.num_look_ahead

    def _strides(self) -> tuple[int, ...]:
        table, layer = self.sequences.block_table, self.layer
        stride = 0 if table is None else table.stride(0)
        paged = self.options.paged
        scale_stride = layer.scale_stride or 0
        block_size = layer.key_tokens if paged else 1
        return *layer.query_strides, *layer.key_strides, scale_stride, stride, block_size, layer.key_blocks

    def _sizes(self) -> tuple[int, ...]:
        table = self.sequences.block_table
        room = self.layer.key_tokens * (1 if table is None else table.shape[1])
        return (
            self.batch, self.layer.heads[1], self.row_blocks, self.layer.group, self.look_ahead, self.state.shape[2],
            min(room, 2**31 - 1),
        )  # fmt: skip

    def _numbers(self) -> tuple[Any, ...]:
        scale = self.layer.heads[2] ** -0.5 if self.options.scale is None else self.options.scale
        return scale, self.options.softcap, self.layer.window or None

    def _constexprs(self) -> dict[str, Any]:
        dot = torch.float32 if self.target.interpreted else self.layer.dot_dtype
        return {
            "HEAD_DIM": self.layer.heads[2],
            "D_FIRST": self.head.first,
            "D_REST": self.head.rest,
            "D_PART": self.head.part,
            "BLOCK_M": self.config.block_m,
            "BLOCK_N": self.block_n,
            "OBSERVATION": self.options.queries == "observation_window",
            "FP8": _FP8_FORMATS.get(self.layer.key_dtype, ""),
            "FP8_NATIVE": triton_config.native_fp8(self.target),
            "DOT": _TL_DTYPES[dot],
            "PRECISION": triton_config.dot_precision(self.target),
        }
