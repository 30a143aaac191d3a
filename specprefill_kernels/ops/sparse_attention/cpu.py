"""Block-sparse attention on a CPU: the chosen blocks of all heads side by side, and torch's fused attention over them.

Ahead of dense attention where keep_blocks * block_size is well below half of the prompt: what a query block attends to
is copied together first, 2 * Hq * keep_blocks * block_size * D elements for it, which stay in the cache.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specprefill_kernels.ops.sparse_attention.blocks import check_lists, row_blocks
from specprefill_kernels.ops.sparse_attention.reference import select_attention_blocks

__all__ = ["block_sparse_attention", "select_attention_blocks"]


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, block_size: int, scale: float
) -> Tensor:
    batch, heads, rows, dim = query.shape
    total, start = key.shape[2], key.shape[2] - rows
    first, count = row_blocks(rows, total, block_size)
    check_lists(indices, counts, first)
    output = query.new_empty(batch, rows, heads, dim)
    most = counts.amax((0, 1)).tolist()
    least = counts.amin((0, 1)).tolist()
    for row in range(count):
        block = (first + row) * block_size
        low, high = max(block, start), min(block + block_size, total)
        listed = most[row]
        absent = torch.arange(listed) >= counts[:, :, row, None]
        earlier = indices[:, :, row, :listed].masked_fill(absent, 0).to(torch.int64)
        seen = torch.zeros(high - low, listed * block_size + high - block, dtype=query.dtype)
        later = torch.arange(block, high) > torch.arange(low, high)[:, None]
        seen[:, listed * block_size :].masked_fill_(later, -torch.inf)
        if least[row] < listed:
            seen = seen.repeat(batch, heads, 1, 1)
            seen[..., : listed * block_size].unflatten(3, (listed, block_size)).masked_fill_(
                absent[:, :, None, :, None], -torch.inf
            )
        part = slice(low - start, high - start)
        output[:, part] = scaled_dot_product_attention(
            query[:, :, part],
            _gathered(key, earlier, block, high, block_size),
            _gathered(value, earlier, block, high, block_size),
            attn_mask=seen,
            scale=scale,
        ).transpose(1, 2)
    return output.transpose(1, 2)


def _gathered(x: Tensor, earlier: Tensor, block: int, end: int, block_size: int) -> Tensor:
    """[B, Hq, listed * block_size + end - block, D]: each query head's earlier blocks, then positions [block, end).

    Args:
        x: [B, Hkv, T, D].
        earlier: [B, Hq, listed] int64.
    """
    batch, kv_heads, total, dim = x.shape
    heads, listed = earlier.shape[1:]
    group = heads // kv_heads
    whole = end == block + block_size
    if whole:
        earlier = torch.cat([earlier, earlier.new_full((batch, heads, 1), block // block_size)], 2)
        listed += 1
    out = x.new_empty(batch, kv_heads, group * listed, block_size, dim)
    if listed:
        for b in range(batch):
            for h in range(kv_heads):
                blocks = x[b, h, : total // block_size * block_size].unflatten(0, (-1, block_size))
                torch.index_select(blocks, 0, earlier[b, h * group : (h + 1) * group].flatten(), out=out[b, h])
    gathered = out.view(batch, heads, listed * block_size, dim)
    if whole:
        return gathered
    own = x[:, :, block:end].repeat_interleave(group, 1)
    return torch.cat([gathered, own], 2)
