"""Block-sparse attention on Triton: four launches, whatever the length, and nothing read on the host."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from specprefill_kernels import _checks, _triton
from specprefill_kernels.ops.score.triton_config import dot_precision, power_of_2
from specprefill_kernels.ops.sparse_attention import triton_config, triton_select
from specprefill_kernels.ops.sparse_attention.blocks import BlockBudget, check_lists, row_blocks
from specprefill_kernels.ops.sparse_attention.triton_attention import attend

unavailable = _triton.unavailable
DEVICE_TYPE = _triton.DEVICE_TYPE

_TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_ALIGNMENT = 16
# Rows of a block that are summed at once.
_PIECE = 16


def select_attention_blocks(query: Tensor, key: Tensor, budget: BlockBudget) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = query.shape
    kv_heads, total = key.shape[1:3]
    size = budget.block_size
    first, count = row_blocks(rows, total, size)
    key_blocks = -(-total // size)
    if key_blocks > triton_config.MAX_RANKED:
        _checks.fail("block_size", f"one that makes at most {triton_config.MAX_RANKED} blocks of the keys", key_blocks)
    query_sums = _block_sums(query, first, count, size, total - rows, total)
    key_sums = _block_sums(key, 0, key_blocks, size, 0, total)
    width = budget.width(total)
    indices = torch.empty(batch, heads, count, width, dtype=torch.int32, device=query.device)
    counts = torch.empty(batch, heads, count, dtype=torch.int32, device=query.device)
    target = _triton.target_of(query)
    columns = power_of_2(key_blocks)
    step = min(count, max(1, triton_config.SCORES_AT_ONCE // (batch * heads * key_blocks)))
    scores = torch.empty(batch * heads * step * key_blocks, dtype=torch.float32, device=query.device)
    tile = triton_config.SCORE_TILE
    ranked = power_of_2(count) if target.interpreted else triton_config.ranked_rows(columns)
    for start in range(0, count, step):
        part = min(step, count - start)
        tiles = -(-min(key_blocks, first + start + part) // tile)
        _triton.launch(
            triton_select.block_scores,
            (tiles * -(-part // tile) * batch * heads,),
            scores, query_sums, key_sums,
            heads, heads // kv_heads, count, part, start, first, key_blocks, tiles,
            on=query, HEAD_DIM=dim, TILE=tile, PART=triton_config.SCORE_PART,
            PRECISION=dot_precision(target), num_warps=4, num_stages=1 if target.vendor == "hip" else 2,
        )  # fmt: skip
        _triton.launch(
            triton_select.rank_blocks,
            (batch * heads * -(-part // ranked),),
            indices, counts, scores, count, part, start, first, key_blocks, width,
            budget.keep_blocks, budget.sink_blocks, budget.local_blocks,
            on=query, ROWS=ranked, BLOCKS=columns, WIDTH=power_of_2(width),
            num_warps=triton_config.rank_warps(columns), num_stages=1,
        )  # fmt: skip
    return indices, counts


def _block_sums(x: Tensor, first: int, count: int, size: int, start: int, total: int) -> Tensor:
    """[B, H, count, D] fp32."""
    batch, heads, _, dim = x.shape
    sums = torch.empty(batch, heads, count, dim, dtype=torch.float32, device=x.device)
    piece = size if _triton.target_of(x).interpreted else _PIECE
    _triton.launch(
        triton_select.block_sums,
        (count * heads * batch,),
        sums, x, *x.stride(), heads, count, first, start, total,
        on=x, HEAD_DIM=dim, D_PAD=power_of_2(dim), BLOCK_SIZE=size, PIECE=piece, num_warps=4, num_stages=1,
    )  # fmt: skip
    return sums


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, block_size: int, scale: float
) -> Tensor:
    batch, heads, rows, dim = query.shape
    kv_heads, total = key.shape[1:3]
    first, count = row_blocks(rows, total, block_size)
    if _triton.checks_values():
        check_lists(indices, counts, first)
    target = _triton.target_of(query)
    config = triton_config.choose(target, dim, query.element_size(), _wide_loads(key) and _wide_loads(value))
    block_m = min(config.block_m, block_size)
    output = torch.empty(batch, rows, heads, dim, dtype=query.dtype, device=query.device)
    d_first = max(1 << (dim.bit_length() - 1), 16)
    _triton.launch(
        attend,
        (block_size // block_m * count * heads * batch,),
        output, query, key, value, indices, counts,
        *query.stride(), *key.stride(), *value.stride(),
        heads, heads // kv_heads, count, first, total - rows, total, indices.shape[3], scale,
        on=query, HEAD_DIM=dim, D_FIRST=d_first, D_REST=max(power_of_2(dim - d_first), 16) if dim > d_first else 0,
        D_PART=triton_config.query_part(config, dim), BLOCK_SIZE=block_size, BLOCK_M=block_m,
        BLOCK_N=min(config.block_n, block_size),
        DOT=tl.float32 if target.interpreted else _TL_DTYPES[query.dtype], PRECISION=dot_precision(target),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return output.transpose(1, 2)


def _wide_loads(x: Tensor) -> bool:
    """Whether rows are contiguous and start at multiples of 16 bytes."""
    if x.stride(-1) != 1 or x.data_ptr() % _ALIGNMENT:
        return False
    return all(stride * x.element_size() % _ALIGNMENT == 0 for stride in x.stride()[:-1])
