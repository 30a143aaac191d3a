"""Gather: pack what belongs to the kept tokens, at their original positions."""

from typing import NamedTuple

import torch
from torch import Tensor

from specprefill_kernels import _backends, _checks
from specprefill_kernels._ops import ops
from specprefill_kernels.ops.score.options import KEY_SHAPES, LAYOUTS, token_axis
from specprefill_kernels.ops.select import Selection

__all__ = ["Packed", "gather_kv", "gather_tokens"]


class Packed(NamedTuple):
    """Kept tokens of a batch, one sequence behind the other, as variable-length attention kernels take them.

    Attributes:
        values: the gathered tensor; batch and token dimensions merged into one of B * K, zeros behind the last token.
        position_ids: [B * K] int64, each token's position in its own prompt, 0 behind the last token.
        cu_seqlens: [B + 1] int32, where each sequence starts; the last entry is the number of tokens.
        max_len: K, an upper bound of any sequence's length that needs no copy from the device.
        token_dim: the axis of `values` that holds the tokens.
    """

    values: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_len: int
    token_dim: int = 0

    def trim(self) -> "Packed":
        """The same without padding. Copies two numbers from the device, so not inside a CUDA graph."""
        total = int(self.cu_seqlens[-1])
        values = self.values.narrow(self.token_dim, 0, total)
        longest = int(self.cu_seqlens.diff().max())
        return Packed(values, self.position_ids[:total], self.cu_seqlens, longest, self.token_dim)


def gather_tokens(
    x: Tensor,
    selection: Selection,
    *,
    token_dim: int = 1,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Packed:
    """Pack the kept tokens of `x`: ids, embeddings, M-RoPE positions, slot mappings or anything else per token.

    Args:
        x: [..., B, T, ...] of any dtype and strides, at most 8 dimensions on each side of the tokens; `token_dim` is
            T's axis and B stands right before it. So [B, T] ids and [B, T, hidden] embeddings take the default, M-RoPE
            positions [3, B, T] take token_dim=2.
        selection: from `select_chunks`, on the same device.
        cu_seqlens: [B + 1] integers: x is packed, [..., sum T, ...] with its tokens on axis `token_dim - 1`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        Packed.

    Raises:
        ValueError: an argument is wrong; on CPU tensors also a selected position beyond x, for which CUDA tensors
            give 0.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    _backends.check_name(backend)
    _checks.tensor("x", x)
    _checks.supported_device("x", x)
    _check_selection(selection, x.device)
    check_gather_tokens(x, selection.indices.shape[0], x.device, token_dim, cu_seqlens)
    values, position_ids, offsets = ops.gather_tokens(
        x, selection.indices, selection.num_kept, cu_seqlens, token_dim, backend
    )
    return Packed(values, position_ids, offsets, selection.indices.shape[1], token_dim - 1)


def gather_kv(
    key_cache: Tensor,
    value_cache: Tensor,
    selection: Selection,
    *,
    layout: str,
    block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    out_block_table: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compact a KV cache to the kept tokens, in their order.

    Args:
        key_cache, value_cache: one layer's cache in `layout` (see `score_layer_`), any dtype and strides; they may
            differ in head size and dtype.
        selection: from `select_chunks`.
        layout: "bhtd", "bthd", "packed", "paged_nhd" or "paged_hnd".
        block_table: [B, max_blocks] integers, for paged layouts.
        cu_seqlens: [B + 1] integers, for the packed layout.
        out: tensors of the same layout to write into, without overlap with the inputs; what is not written is left
            as it is. Default: new tensors, zero behind the kept tokens.
        out_block_table: [B, blocks] integers, the blocks of `out` that each sequence owns, for paged layouts with
            `out`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        (keys, values) in the same layout with K token slots: [B, Hkv, K, D], [B, K, Hkv, D], packed [B * K, Hkv, D]
        with the sequences one behind the other, or paged [B * ceil(K / block_size), ...] where sequence b owns blocks
        b * ceil(K / block_size) and following; or `out`.

    Raises:
        ValueError: an argument is wrong; on CPU tensors also a position or block id beyond the cache.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    _backends.check_name(backend)
    _checks.choice("layout", layout, LAYOUTS)
    _checks.tensor("key_cache", key_cache)
    _checks.supported_device("key_cache", key_cache)
    _check_selection(selection, key_cache.device)
    batch, width = selection.indices.shape
    _check_cache("key_cache", key_cache, layout, batch)
    _check_cache("value_cache", value_cache, layout, batch)
    if value_cache.device != key_cache.device:
        _checks.fail("value_cache", f"a tensor on {key_cache.device}", f"one on {value_cache.device}")
    if key_cache.shape[:-1] != value_cache.shape[:-1]:
        _checks.fail(
            "value_cache", f"key_cache's shape {_checks.shape(key_cache)} but for D", _checks.shape(value_cache)
        )
    _check_tables(layout, batch, key_cache.device, block_table, cu_seqlens)
    if out is None:
        if out_block_table is not None:
            _checks.fail("out_block_table", "None without out", "a tensor")
        keys, values = ops.gather_kv(
            key_cache, value_cache, selection.indices, selection.num_kept, layout, block_table, cu_seqlens, backend
        )
        return keys, values
    _check_out(out, (key_cache, value_cache), layout, batch, width, out_block_table)
    ops.gather_kv_out_(
        out[0],
        out[1],
        key_cache,
        value_cache,
        selection.indices,
        selection.num_kept,
        layout,
        block_table,
        cu_seqlens,
        out_block_table,
        backend,
    )
    return out


def check_gather_tokens(x: Tensor, batch: int, device: torch.device, token_dim: int, cu_seqlens: Tensor | None) -> None:
    _checks.tensor("x", x, device=device)
    _checks.supported_device("x", x)
    _checks.integer("token_dim", token_dim, 1)
    axis = token_dim - 1 if cu_seqlens is not None else token_dim
    if axis >= x.ndim:
        _checks.fail("token_dim", f"an axis of x, which has {x.ndim} dimensions", token_dim)
    if cu_seqlens is not None:
        _checks.per_sequence("cu_seqlens", cu_seqlens, batch + 1, device)
    elif x.shape[token_dim - 1] != batch:
        _checks.fail("x", f"{batch} sequences on axis {token_dim - 1}", f"shape {_checks.shape(x)}")


def _check_selection(selection: Selection, device: torch.device) -> None:
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: expected a Selection, got {type(selection).__name__}")
    _checks.tensor("selection.indices", selection.indices, ndim=2, dtypes=(torch.int32,), device=device, what="[B, K]")
    _checks.tensor(
        "selection.num_kept",
        selection.num_kept,
        ndim=1,
        dtypes=(torch.int32,),
        device=device,
        sizes=selection.indices.shape[:1],
        what="[B]",
    )
    if selection.indices.numel() == 0:
        _checks.fail("selection.indices", "no empty dimension [B, K]", f"shape {_checks.shape(selection.indices)}")


def _check_cache(name: str, cache: Tensor, layout: str, batch: int) -> None:
    sizes = (batch, None, None, None) if layout in ("bhtd", "bthd") else None
    ndim = 3 if layout == "packed" else 4
    _checks.tensor(name, cache, ndim=ndim, sizes=sizes, what=KEY_SHAPES[layout])
    _checks.supported_device(name, cache)
    if any(size == 0 for size in cache.shape):
        _checks.fail(name, f"no empty dimension {KEY_SHAPES[layout]}", f"shape {_checks.shape(cache)}")


def _check_tables(
    layout: str, batch: int, device: torch.device, block_table: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    for name, value, wanted in (
        ("block_table", block_table, layout.startswith("paged")),
        ("cu_seqlens", cu_seqlens, layout == "packed"),
    ):
        if (value is not None) != wanted:
            _checks.fail(name, f"{'a tensor' if wanted else 'None'} with layout {layout!r}", type(value).__name__)
    _checks.per_sequence("cu_seqlens", cu_seqlens, batch + 1, device)
    if block_table is not None:
        _check_table("block_table", block_table, batch, device)


def _check_table(name: str, table: Tensor, batch: int, device: torch.device) -> None:
    sizes = (batch, None)
    _checks.tensor(name, table, ndim=2, dtypes=_checks.INTEGERS, device=device, sizes=sizes, what="[B, max_blocks]")


def _check_out(
    out: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    layout: str,
    batch: int,
    width: int,
    out_block_table: Tensor | None,
) -> None:
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"out: expected a tuple (keys, values), got {type(out).__name__}")
    paged = layout.startswith("paged")
    tokens = token_axis(layout)
    for i, (target, cache) in enumerate(zip(out, caches)):
        name = f"out[{i}]"
        sizes = list(cache.shape)
        sizes[tokens] = {"packed": batch * width}.get(layout, width)
        if paged:
            wanted: list[int | None] = [None, *cache.shape[1:]]
            wanted[tokens] = None  # another block size is fine
        else:
            wanted = list(sizes)
        _checks.tensor(
            name,
            target,
            ndim=cache.ndim,
            dtypes=(cache.dtype,),
            device=cache.device,
            sizes=wanted,
            what=KEY_SHAPES[layout],
        )
    if paged and out[0].shape[:2] + out[0].shape[2:3] != out[1].shape[:2] + out[1].shape[2:3]:
        _checks.fail("out[1]", f"out[0]'s shape {_checks.shape(out[0])} but for D", _checks.shape(out[1]))
    if paged != (out_block_table is not None):
        wanted_table = "a tensor" if paged else "None"
        _checks.fail("out_block_table", f"{wanted_table} with layout {layout!r}", type(out_block_table).__name__)
    if out_block_table is not None:
        _check_table("out_block_table", out_block_table, batch, caches[0].device)
        room = out_block_table.shape[1] * out[0].shape[tokens]
        if room < width:
            _checks.fail("out_block_table", f"room for {width} tokens per sequence", f"{room}")
