"""The calls of the sparse-attention room: what users may ask of its two ops."""

from __future__ import annotations

from typing import Any

import torch
from aot_cover import Options
from aot_memory import BF16, FP16, FP32, contiguous, tensor
from torch import Tensor

from specprefill_kernels.ops.sparse_attention import triton_kernel
from specprefill_kernels.ops.sparse_attention.blocks import BlockBudget, row_blocks

FACTORS: dict[str, tuple[Any, ...]] = {
    "dtype": (BF16, FP16, FP32),
    "head_dim": (64, 80, 96, 128, 192, 256, 40),
    "block_size": (128, 64, 16, 256),
    "heads": ((9, 3), (32, 8), (8, 8)),
    "batch": (1, 2),
    # (queries, keys): a whole prompt, a chunk of one, a few rows behind a cache, and more than is scored at once
    "tokens": ((4096, 4096), (4096, 131072), (100, 1000), (131072, 131072)),
    "strides": ("bhtd", "bthd", "far", "stepped", "unaligned"),
    "keep_blocks": (32, 5),
}


def usable(options: Options) -> bool:
    return options["tokens"][1] // options["block_size"] <= 8192


def call(options: Options) -> None:
    batch, (heads, kv_heads), (rows, total) = options["batch"], options["heads"], options["tokens"]
    query = _tensor(options, batch, heads, rows)
    key, value = (_tensor(options, batch, kv_heads, total) for _ in range(2))
    size = options["block_size"]
    budget = BlockBudget(size, options["keep_blocks"], 1, 2)
    triton_kernel.select_attention_blocks(query, key, budget)
    lists = (batch, heads, row_blocks(rows, total, size)[1])
    indices = tensor((*lists, budget.width(total)), torch.int32)
    triton_kernel.block_sparse_attention(query, key, value, indices, tensor(lists, torch.int32), size, 0.125)


def _tensor(options: Options, batch: int, heads: int, tokens: int) -> Tensor:
    """[B, H, T, D]"""
    dim, strides = options["head_dim"], options["strides"]
    if strides == "bthd":
        return tensor((batch, tokens, heads, dim), options["dtype"]).transpose(1, 2)
    shape = (batch, heads, tokens, dim)
    if strides == "stepped":
        return tensor(shape, options["dtype"], tuple(2 * stride for stride in contiguous(shape)))
    if strides == "far":
        return tensor(shape, options["dtype"], (2**31 + 64, *contiguous(shape)[1:]))
    return tensor(shape, options["dtype"], offset=1 if strides == "unaligned" else 0)
