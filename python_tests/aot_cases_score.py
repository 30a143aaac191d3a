"""The calls of the score room: what users may ask of `score_layers_`."""

from __future__ import annotations

from typing import Any

import torch
from aot_cover import Options
from aot_memory import BF16, E4M3, E5M2, FP16, FP32, contiguous, tensor
from torch import Tensor

from specprefill_kernels.ops.score import triton_kernel
from specprefill_kernels.ops.score.options import ScoreOptions, Sequences, head_axis, token_axis

BLOCK_SIZE = 16

FACTORS: dict[str, tuple[Any, ...]] = {
    "layout": ("bhtd", "bthd", "packed", "paged_nhd", "paged_hnd"),
    "dtypes": (
        *((BF16, BF16), (FP16, FP16), (FP32, FP32), (FP32, BF16)),
        *((BF16, E4M3), (FP16, E5M2), (FP32, E4M3), (BF16, E5M2)),
    ),
    "head_dim": (64, 80, 96, 128, 192, 256, 512),
    # (look-ahead rows, query heads, KV heads): groups of 1, 4, 4, 3, 7, 8, 16 and 4 heads
    "rows": ((8, 8, 8), (1, 32, 8), (8, 32, 8), (5, 9, 3), (8, 28, 4), (8, 32, 4), (32, 32, 2), (64, 32, 8)),
    "batch": (1, 4, 16),
    "layers": (1, 3, 16, 20),
    "tokens": (1024, 32768),  # small ones share a launch
    "strides": ("plain", "far", "stepped", "unaligned"),
    "seq_lens": (False, True),
    "num_look_ahead": (False, True),
    "softcap": (None, 30.0),
    "window": (0, 1000),
    "mode": (("look_ahead", "prompt"), ("look_ahead", "visible"), ("observation_window", "prompt")),
    "lse": (False, False, True),
    "key_scale": ("none", "one", "per_head"),
    "pool": (
        *((13, "zero", "before_max"), (13, "valid", "before_max")),
        *((129, "zero", "before_max"), (13, "zero", "after_max")),
    ),
    "one_row": (False, True),
}


def usable(options: Options) -> bool:
    fp8 = options["dtypes"][1] in (E4M3, E5M2)
    return fp8 or options["key_scale"] == "none"


def call(options: Options) -> None:
    look_ahead, q_heads, kv_heads = options["rows"]
    batch, layers = options["batch"], options["layers"]
    offset = 1 if options["strides"] == "unaligned" else 0
    query = tensor((batch, look_ahead, q_heads, options["head_dim"]), options["dtypes"][0], offset=offset)
    state = tensor((batch, 1 if options["one_row"] else look_ahead, options["tokens"]), FP32)
    scale = {"none": [], "one": [torch.ones(())], "per_head": [torch.ones(kv_heads)]}[options["key_scale"]]
    size, edge, order = options["pool"]
    queries, normalize_over = options["mode"]
    triton_kernel.score_layers_(
        state,
        [query] * layers,
        [_key(options, offset)] * layers,
        _sequences(options),
        [options["window"]] * layers,
        [tensor((batch, look_ahead, q_heads), FP32)] * layers if options["lse"] else [],
        scale * layers,
        None,
        ScoreOptions(
            layout=options["layout"],
            queries=queries,
            normalize_over=normalize_over,
            softcap=options["softcap"],
            pool_kernel_size=size,
            pool_edge=edge,
            pool_order=order,
        ),
    )


def _key(options: Options, offset: int) -> Tensor:
    layout, batch, tokens = options["layout"], options["batch"], options["tokens"]
    paged = layout.startswith("paged")
    shape = [0] * (3 if layout == "packed" else 4)
    if layout != "packed":
        shape[0] = batch * (tokens // BLOCK_SIZE + 8) if paged else batch
    shape[-1] = options["head_dim"]
    shape[head_axis(layout)] = options["rows"][2]
    shape[token_axis(layout)] = BLOCK_SIZE if paged else tokens + 64
    strides = contiguous(tuple(shape))
    if options["strides"] == "stepped":
        strides = tuple(2 * stride for stride in strides)
    elif options["strides"] == "far":  # what makes the stride an int64; two of them reach far enough
        shape[0] = min(shape[0], 2)
        strides = (2**31 + 64, *strides[1:])
    return tensor(tuple(shape), options["dtypes"][1], strides, offset)


def _sequences(options: Options) -> Sequences:
    batch, layout, tokens = options["batch"], options["layout"], options["tokens"]
    packed, paged = layout == "packed", layout.startswith("paged")

    def numbers(value: int, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.int32)

    return Sequences(
        seq_lens=numbers(tokens, batch) if options["seq_lens"] or paged else None,
        cu_seqlens=numbers(0, batch + 1) if packed else None,
        block_table=numbers(0, batch, tokens // BLOCK_SIZE + 8) if paged else None,
        num_look_ahead=numbers(options["rows"][0], batch) if options["num_look_ahead"] else None,
    )
