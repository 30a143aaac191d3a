"""Block-sparse prefill attention: each block of queries attends to its own block and to a fixed number of earlier ones.

A speculator's dense attention grows with the square of the prompt and dominates its prefill at 128K tokens. Here the
attention grows in proportion to it; the choice of blocks still grows with the square, of (T / block_size) alone.
docs/sparse-attention.md has the argument for the choice of blocks, and measurements.

The Triton kernels read queries, keys and values in place, whatever their strides. The other forms are plain PyTorch and
copy: 16-bit queries and keys to fp32 for the blocks' means, and for each query block the blocks that it attends to.
"""

import torch
from torch import Tensor

from specprefill_kernels import _backends, _checks
from specprefill_kernels._ops import ops
from specprefill_kernels.ops.sparse_attention.blocks import (
    MAX_BLOCK_SIZE,
    MAX_HEAD_DIM,
    MIN_BLOCK_SIZE,
    AttentionBlocks,
    row_blocks,
)

__all__ = ["AttentionBlocks", "block_sparse_attention", "select_attention_blocks", "sparse_prefill_attention"]


def select_attention_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int = 128,
    keep_blocks: int = 32,
    sink_blocks: int = 1,
    local_blocks: int = 2,
    backend: str = "auto",
) -> AttentionBlocks:
    """The earlier key blocks that each block of queries attends to, by the dot product of the blocks' means.

    Query block i (positions [i * block_size, (i + 1) * block_size)) attends to ``min(keep_blocks, i + 1)`` blocks: its
    own, the `sink_blocks` first, the `local_blocks` last up to its own, and of the others those with the largest
    ``mean(query block) . mean(key block)``, ties to the lower index (MInference's block-sparse pattern, arXiv
    2407.02490, with the fixed sink and window of StreamingLLM). Each query head has its own list.

    Args:
        query: [B, Hq, n, D] fp32, fp16 or bf16, after RoPE: the LAST n positions of the keys' T, as in chunked prefill.
        key: [B, Hkv, T, D], after RoPE, of the query's dtype; any strides. Triton copies nothing.
        block_size: tokens of a block, a power of two from 16 to 256. Blocks begin at multiples of it, counted from the
            first key: a prompt that is read in chunks chooses as one read at once, if chunks begin there too. (A query
            block that a chunk cuts in two is two, each with its own mean.)
        keep_blocks: blocks that a query block attends to, its own included; at least sink_blocks + local_blocks.
        sink_blocks: first blocks of the prompt that every query block attends to, at least 0.
        local_blocks: last blocks up to a query block's own that it attends to, at least 1 (its own).
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        `AttentionBlocks`: `indices` [B, Hq, R, W] int32, the EARLIER blocks of each of the R query blocks, ascending,
        padded with -1; `counts` [B, Hq, R] int32, how many there are. W = max(1, min(keep_blocks, ceil(T / block_size))
        - 1) depends on shapes only. A mean that is NaN counts as the largest.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    _backends.check_name(backend)
    _check_query_key(query, key)
    _check_block_size(block_size)
    _checks.integer("sink_blocks", sink_blocks, 0)
    _checks.integer("local_blocks", local_blocks, 1)
    _checks.integer("keep_blocks", keep_blocks, 1)
    if keep_blocks < sink_blocks + local_blocks:
        fixed = sink_blocks + local_blocks
        _checks.fail("keep_blocks", f"at least sink_blocks + local_blocks = {fixed}", keep_blocks)
    indices, counts = ops.select_attention_blocks(
        query, key, block_size, keep_blocks, sink_blocks, local_blocks, backend
    )
    return AttentionBlocks(indices, counts)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: AttentionBlocks,
    *,
    block_size: int = 128,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of each query block over its own block and the earlier blocks that `blocks` lists for it.

    With every earlier block listed, this is dense causal attention. Accumulated in fp32.

    Args:
        query: [B, Hq, n, D] fp32, fp16 or bf16, the last n positions of the keys' T.
        key: [B, Hkv, T, D], of the query's dtype; any strides. Triton reads it in place, the others gather its blocks.
        value: as `key`.
        blocks: `indices` [B, Hq, R, W] and `counts` [B, Hq, R], int32, for the R query blocks that the query's
            positions touch; see `select_attention_blocks`. Listed blocks are earlier than the query block, ascending.
        block_size: as the blocks were chosen with.
        scale: factor on the dot product. Default: D ** -0.5.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        [B, Hq, n, D] of the query's dtype, laid out as [B, n, Hq, D] in memory.

    Raises:
        ValueError: an argument is wrong. On CPU tensors also for lists that are not ascending, or name a block that is
            not an earlier one. On CUDA tensors contents are never read on the host: an entry that is no earlier block
            counts as absent, and one that is listed twice counts twice.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    _backends.check_name(backend)
    _check_query_key(query, key)
    _checks.tensor(
        "value",
        value,
        ndim=4,
        dtypes=(query.dtype,),
        device=query.device,
        sizes=tuple(key.shape),
        what="[B, Hkv, T, D], as key",
    )
    _check_block_size(block_size)
    if not isinstance(blocks, tuple) or len(blocks) != 2:
        raise TypeError(f"blocks: expected AttentionBlocks(indices, counts), got {type(blocks).__name__}")
    lists = (query.shape[0], query.shape[1], row_blocks(query.shape[2], key.shape[2], block_size)[1])
    for name, x, sizes, what in (
        ("blocks.indices", blocks[0], (*lists, None), "[B, Hq, query blocks, W]"),
        ("blocks.counts", blocks[1], lists, "[B, Hq, query blocks]"),
    ):
        _checks.tensor(name, x, ndim=len(sizes), dtypes=(torch.int32,), device=query.device, sizes=sizes, what=what)
    if blocks[0].shape[3] == 0:
        _checks.fail("blocks.indices", "room for at least one block", f"shape {_checks.shape(blocks[0])}")
    if scale is not None:
        _checks.number("scale", scale, fp32=True)
    output: Tensor = ops.block_sparse_attention(
        query, key, value, blocks[0], blocks[1], block_size, None if scale is None else float(scale), backend
    )
    return output


def sparse_prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int = 128,
    keep_blocks: int = 32,
    sink_blocks: int = 1,
    local_blocks: int = 2,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`select_attention_blocks`, then `block_sparse_attention` over what it chose.

    Time grows with n * keep_blocks * block_size instead of n * T, and with the (n / block_size) * (T / block_size)
    scores of blocks, which are computed and ranked; memory with T. Where T is at most keep_blocks * block_size, this is
    dense causal attention. Arguments, result and errors as in the two.

    Example:
        >>> output = spk.sparse_prefill_attention(query, key, value, keep_blocks=32)  # the query's rows are the last
    """
    blocks = select_attention_blocks(
        query,
        key,
        block_size=block_size,
        keep_blocks=keep_blocks,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        backend=backend,
    )
    return block_sparse_attention(query, key, value, blocks, block_size=block_size, scale=scale, backend=backend)


def _check_query_key(query: Tensor, key: Tensor) -> None:
    _checks.tensor("query", query, ndim=4, dtypes=_checks.FLOATS, what="[B, Hq, n, D]")
    _checks.supported_device("query", query)
    batch, heads, rows, head_dim = query.shape
    sizes = (batch, None, None, head_dim)
    _checks.tensor("key", key, ndim=4, dtypes=(query.dtype,), device=query.device, sizes=sizes, what="[B, Hkv, T, D]")
    for name, x in (("query", query), ("key", key)):
        if any(size == 0 for size in x.shape):
            _checks.fail(name, "no empty dimension", f"shape {_checks.shape(x)}")
    if head_dim > MAX_HEAD_DIM:
        _checks.fail("query", f"head_dim at most {MAX_HEAD_DIM}", head_dim)
    if heads % key.shape[1]:
        _checks.fail("query", f"a number of heads that is a multiple of key's {key.shape[1]}", heads)
    if rows > key.shape[2]:
        _checks.fail("query", f"at most key's {key.shape[2]} positions, of which its own are the last", rows)


def _check_block_size(block_size: int) -> None:
    _checks.integer("block_size", block_size, MIN_BLOCK_SIZE)
    if block_size > MAX_BLOCK_SIZE or block_size & (block_size - 1):
        _checks.fail("block_size", f"a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}", block_size)
