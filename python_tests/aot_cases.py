"""The calls whose kernels are compiled: what users may ask of each room, on tensors whose memory nobody touches."""

from __future__ import annotations

import aot_cases_attention
import aot_cases_score
import torch
from aot_compile import Arch
from aot_memory import BF16, E4M3, FP16, FP32, contiguous, tensor
from aot_record import Options, Room, room_modules

from specprefill_kernels.ops.finalize import triton_config as finalize_config
from specprefill_kernels.ops.finalize import triton_kernel as finalize
from specprefill_kernels.ops.gather import triton_config as gather_config
from specprefill_kernels.ops.gather import triton_kernel as gather
from specprefill_kernels.ops.score import triton_config as score_config
from specprefill_kernels.ops.select import triton_config as select_config
from specprefill_kernels.ops.select import triton_kernel as select
from specprefill_kernels.ops.select.budget import Budget
from specprefill_kernels.ops.select_tokens import triton_kernel as select_tokens
from specprefill_kernels.ops.sparse_attention import triton_config as attention_config

OPS = "specprefill_kernels.ops"


def _int32(value: int, count: int) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.int32)


def _state(options: Options) -> torch.Tensor:
    """[B, N, T] fp32 with the strides that were asked for."""
    batch, rows, tokens = options["batch"], options["rows"], options["tokens"]
    strides = {
        "plain": (rows * tokens, tokens, 1),
        "far": (2**31 + 64, tokens, 1),
        "stepped": (2 * rows * tokens, 2 * tokens, 2),
    }[options["strides"]]
    batch = min(batch, 2) if options["strides"] == "far" else batch
    return tensor((batch, rows, tokens), FP32, strides)


FINALIZE_FACTORS = {
    "batch": (1, 16),
    "rows": (1, 8),
    "tokens": (1000, 131072, 1 << 20),
    "strides": ("plain", "far", "stepped"),
    "reduce": ("mean", "max"),
    "pool": ((1, "zero"), (13, "zero"), (13, "valid")),
    "seq_lens": (False, True),
    "num_look_ahead": (False, True),
}


def _finalize_call(options: Options) -> None:
    state = _state(options)
    batch, rows, tokens = state.shape
    lengths = _int32(tokens, batch) if options["seq_lens"] else None
    valid_rows = _int32(rows, batch) if options["num_look_ahead"] else None
    finalize.finalize_importance(state, lengths, valid_rows, options["reduce"], *options["pool"])


SELECT_FACTORS = {
    "batch": (1, 16),
    "tokens": (1000, 32768, 131072, 200001, 1 << 20, 1 << 23),
    "chunk_size": (32, 48, 1, 128, 4096),
    "strides": ("plain", "far", "stepped"),
    "budget": ("ratio", "tokens", "mass"),
    "seq_lens": (False, True),
    "protect": (False, True),
    "sink": (0, 4),
    "tail": (0, 64),
}


def _budget(options: Options) -> Budget:
    return Budget(
        keep_ratio=0.2 if options["budget"] == "ratio" else None,
        keep_tokens=options["tokens"] // 10 + 1 if options["budget"] == "tokens" else None,
        keep_mass=0.9 if options["budget"] == "mass" else None,
        chunk_size=options["chunk_size"],
        rounding="ceil",
        sink=options["sink"],
        tail=options["tail"],
    )


def _select_call(options: Options) -> None:
    importance = _state(options | {"rows": 1})[:, 0]
    batch, tokens = importance.shape
    lengths = _int32(tokens, batch) if options["seq_lens"] else None
    protect = tensor((batch, tokens), torch.bool) if options["protect"] else None
    select.select_chunks(importance, lengths, protect, _budget(options))


GATHER_FACTORS = {
    "batch": (1, 16),
    "tokens": (1000, 20000),
    # [..., tokens, ...] around the token axis: ids, M-RoPE ids, hidden states, heads before and behind the tokens
    "around": (
        *(((), ()), ((3,), ()), ((), (4,)), ((), (16,)), ((), (2048,))),
        *(((3, 2), (8, 40)), ((), (7,)), ((), (128,))),
    ),
    "dtype": (torch.int64, FP16, FP32, torch.uint8),
    "strides": ("plain", "far", "stepped"),
    "packed": (False, True),
    "indices": ("plain", "stepped"),
}


def _gathered(options: Options) -> torch.Tensor:
    """What is gathered from: [outer..., B, T, inner...], packed [outer..., sum T, inner...]."""
    outer, inner = options["around"]
    many = (options["batch"] * options["tokens"],) if options["packed"] else (options["batch"], options["tokens"])
    shape = (*outer, *many, *inner)
    strides = contiguous(shape)
    if options["strides"] == "stepped":
        strides = tuple(2 * stride for stride in strides)
    elif options["strides"] == "far":
        shape, strides = (min(shape[0], 2), *shape[1:]), (2**31 + 64, *strides[1:])
    return tensor(shape, options["dtype"], strides)


def _indices(options: Options, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(indices, num_kept, cu_seqlens)"""
    batch, step = options["batch"], 2 if options["indices"] == "stepped" else 1
    indices = tensor((batch, width), torch.int32, (step * width, step))
    kept = tensor((batch,), torch.int32, (step,))
    return indices, kept, tensor((batch + 1,), torch.int32) if options["packed"] else None


def _gather_call(options: Options) -> None:
    gather.gather_tokens(
        _gathered(options), *_indices(options, options["tokens"] // 5), token_dim=len(options["around"][0]) + 1
    )


def _far_first(options: Options) -> bool:
    """A first dimension with a stride beyond 2^31 is the batch's, or packed tokens of which there are two."""
    return options["strides"] != "far" or (not options["around"][0] and options["batch"] == 1)


KV_FACTORS = {
    "batch": (1, 16),
    "layout": ("bhtd", "bthd", "packed", "paged_nhd", "paged_hnd"),
    "head_dim": (64, 80, 96, 128, 192, 256, 4, 1),
    "value_dim": ("same", 128),
    "dtype": (FP16, BF16, FP32, E4M3),
    "strides": ("plain", "far", "stepped"),
    "indices": ("plain", "stepped"),
}
KV_TOKENS, KV_HEADS, KV_BLOCK = 131072, 8, 16


def _cache(layout: str, batch: int, tokens: int, dim: int, dtype: torch.dtype, strides: str) -> torch.Tensor:
    blocks = batch * -(-tokens // KV_BLOCK)
    shape = {
        "bhtd": (batch, KV_HEADS, tokens, dim),
        "bthd": (batch, tokens, KV_HEADS, dim),
        "packed": (batch * tokens, KV_HEADS, dim),
        "paged_nhd": (blocks, KV_BLOCK, KV_HEADS, dim),
        "paged_hnd": (blocks, KV_HEADS, KV_BLOCK, dim),
    }[layout]
    if strides == "stepped":
        return tensor(shape, dtype, tuple(2 * stride for stride in contiguous(shape)))
    if strides == "far":
        return tensor((min(shape[0], 2), *shape[1:]), dtype, (2**31 + 64, *contiguous(shape)[1:]))
    return tensor(shape, dtype)


def _kv_call(options: Options) -> None:
    layout, batch, width = options["layout"], options["batch"], KV_TOKENS // 5
    dims = [options["head_dim"], options["head_dim"] if options["value_dim"] == "same" else options["value_dim"]]
    dtype = options["dtype"]
    caches = [_cache(layout, batch, KV_TOKENS, dim, dtype, options["strides"]) for dim in dims]
    outs = [_cache(layout, batch, width, dim, dtype, "plain") for dim in dims]
    paged = layout.startswith("paged")
    gather.gather_kv(
        tuple(caches),
        tuple(outs),
        *_indices(options | {"packed": False}, width)[:2],
        layout,
        tensor((batch, KV_TOKENS // KV_BLOCK), torch.int32) if paged else None,
        tensor((batch + 1,), torch.int32) if layout == "packed" else None,
        tensor((batch, -(-width // KV_BLOCK)), torch.int32) if paged else None,
    )


# Its kernels are those of the other rooms; what is its own is the importance computed on the way, and ids of chunks.
SELECT_TOKENS_FACTORS = {
    **FINALIZE_FACTORS,
    "x": ("ids", "rope", "hidden"),
    "chunk_size": (32,),
    "budget": ("ratio", "mass"),
    "protect": (False, True),
    "sink": (0,),
    "tail": (64,),
}


def _select_tokens_call(options: Options) -> None:
    state = _state(options)
    batch, rows, tokens = state.shape
    shape = {"ids": (batch, tokens), "rope": (3, batch, tokens), "hidden": (batch, tokens, 576)}[options["x"]]
    select_tokens.select_tokens(
        state,
        tensor(shape, FP16 if options["x"] == "hidden" else torch.int64),
        _int32(tokens, batch) if options["seq_lens"] else None,
        _int32(rows, batch) if options["num_look_ahead"] else None,
        tensor((batch, tokens), torch.bool) if options["protect"] else None,
        options["reduce"],
        *options["pool"],
        _budget(options),
        2 if options["x"] == "rope" else 1,
    )


def _every(configs: tuple) -> object:
    return lambda arch: configs


def rooms() -> list[Room]:
    """Everything that is checked."""

    def score_configs(arch: Arch) -> tuple:
        return score_config.configs(arch.target)

    def attention_configs(arch: Arch) -> tuple:
        return attention_config.configs(arch.target)

    return [
        Room(
            "score",
            room_modules(f"{OPS}.score"),
            score_configs,
            aot_cases_score.FACTORS,
            aot_cases_score.call,
            aot_cases_score.usable,
            whole=("layout", "dtypes", "head_dim", "rows"),
            needs_tensor_cores=True,
        ),
        Room(
            "finalize",
            room_modules(f"{OPS}.finalize"),
            _every(finalize_config.CONFIGS),
            FINALIZE_FACTORS,
            _finalize_call,
            whole=tuple(FINALIZE_FACTORS),
        ),
        Room(
            "select",
            room_modules(f"{OPS}.select"),
            _every(select_config.CONFIGS),
            SELECT_FACTORS,
            _select_call,
            whole=("tokens", "chunk_size", "budget", "protect"),
        ),
        Room(
            "gather",
            room_modules(f"{OPS}.gather"),
            _every(gather_config.CONFIGS),
            GATHER_FACTORS,
            _gather_call,
            _far_first,
            whole=tuple(GATHER_FACTORS),
        ),
        Room(
            "gather_kv",
            room_modules(f"{OPS}.gather"),
            _every(()),  # the same ones as in `gather`, which covers them
            KV_FACTORS,
            _kv_call,
            whole=("layout", "head_dim", "dtype", "strides"),
        ),
        Room(
            "select_tokens",
            room_modules(f"{OPS}.select") + room_modules(f"{OPS}.gather"),
            _every(()),  # as in `select` and `gather`
            SELECT_TOKENS_FACTORS,
            _select_tokens_call,
            whole=tuple(SELECT_TOKENS_FACTORS),
        ),
        Room(
            "sparse_attention",
            room_modules(f"{OPS}.sparse_attention"),
            attention_configs,
            aot_cases_attention.FACTORS,
            aot_cases_attention.call,
            aot_cases_attention.usable,
            whole=("dtype", "head_dim", "block_size", "strides"),
            needs_tensor_cores=True,
        ),
    ]
