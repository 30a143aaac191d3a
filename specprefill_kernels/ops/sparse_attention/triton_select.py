# mypy: allow-untyped-defs
"""Which blocks to attend to, in Triton: means, their dot products, and the largest of each row.

1. `block_sums`: the fp32 sum of each block's rows, of the queries and of the keys. Sums order as means do: every key
   block that is ranked is whole, and a query block's own length is a factor of its whole row.
2. `block_scores`: their products, [query blocks, key blocks] for each query head.
3. `rank_blocks`: one program for each row finds the smallest score that is kept, bit by bit, and lists the blocks.

Bytes that must move: queries and keys once; 4 * D bytes of sums for each block; scores of 4 bytes, (T / block)^2 / 2
for each query head, written and read once: at 128K tokens and blocks of 128, 2 MiB a head beside its queries' 32 MiB.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "count", "first", "start", "total"])
def block_sums(
    sums,  # [B, H, count, D] fp32, contiguous, out
    x,  # [B, H, n, D], the last n of `total` positions
    stride_b, stride_h, stride_t, stride_d, heads, count, first, start, total,
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One program for each block; position `start` is x's first row, block `first` its first block."""
    pid = tl.program_id(0)
    block, head, b = pid % count, pid // count % heads, pid // count // heads
    x += b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    d = tl.arange(0, D_PAD)
    total_of = tl.zeros((PIECE, D_PAD), tl.float32)
    for piece in range(0, BLOCK_SIZE, PIECE):
        t = (first + block) * BLOCK_SIZE + piece + tl.arange(0, PIECE)
        there = ((t >= start) & (t < total))[:, None] & (d < HEAD_DIM)[None, :]
        at = (t - start).to(tl.int64)[:, None] * stride_t + d.to(tl.int64)[None, :] * stride_d
        total_of += tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    tl.store(sums + pid.to(tl.int64) * HEAD_DIM + d, tl.sum(total_of, 0), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=["q_heads", "group", "count", "rows", "first_row", "first", "key_blocks", "tiles"])
def block_scores(
    scores,  # [B, Hq, rows, key_blocks] fp32, out: of query blocks first_row .. first_row + rows - 1
    query_sums,  # [B, Hq, count, D] fp32
    key_sums,  # [B, Hkv, key_blocks, D] fp32
    q_heads, group, count, rows, first_row, first, key_blocks, tiles,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for each tile of scores; a tile in which no key block is earlier than a query block is left as is."""
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows, TILE)
    column, row, unit = pid % tiles, pid // tiles % row_tiles, pid // tiles // row_tiles
    i = row * TILE + tl.arange(0, TILE)
    j = column * TILE + tl.arange(0, TILE)
    if column * TILE >= first + first_row + tl.minimum(row * TILE + TILE, rows):
        return
    head, b = unit % q_heads, unit // q_heads
    q_at = (unit.to(tl.int64) * count + first_row + i)[:, None] * HEAD_DIM
    kv_head = (b * (q_heads // group) + head // group).to(tl.int64)
    k_at = (kv_head * key_blocks + j)[:, None] * HEAD_DIM
    dots = tl.zeros((TILE, TILE), tl.float32)
    for part in range(0, HEAD_DIM, PART):
        d = part + tl.arange(0, PART)
        q = tl.load(query_sums + q_at + d[None, :], mask=(i < rows)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        k = tl.load(key_sums + k_at + d[None, :], mask=(j < key_blocks)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        dots = tl.dot(q, tl.trans(k), dots, input_precision=PRECISION)
    at = (unit.to(tl.int64) * rows + i)[:, None] * key_blocks + j[None, :]
    tl.store(scores + at, dots, mask=(i < rows)[:, None] & (j < key_blocks)[None, :])


@triton.jit(
    do_not_specialize=[
        *("count", "rows", "first_row", "first", "key_blocks", "width", "keep_blocks", "sink_blocks", "local_blocks")
    ]
)
def rank_blocks(
    indices,  # [B, Hq, count, width] int32, out
    counts,  # [B, Hq, count] int32, out
    scores,  # [B, Hq, rows, key_blocks] fp32
    count, rows, first_row, first, key_blocks, width, keep_blocks, sink_blocks, local_blocks,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program for ROWS query blocks of a head. BLOCKS and WIDTH: key blocks and width, padded."""
    tiles = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    there = row < rows
    own = first + first_row + row
    j = tl.arange(0, BLOCKS)[None, :]
    earlier = there & (j < own)
    score = tl.load(scores + (unit * rows + row) * key_blocks + j, mask=earlier, other=0.0)
    # Bits that order as the numbers do, above them NaN, above that the fixed blocks; 0 is no block.
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(score != score, 0xFFFFFFFE, key)
    key = tl.where((j < sink_blocks) | (j > own - local_blocks), 0xFFFFFFFF, key)
    key = tl.where(earlier, key, 0)
    wanted = tl.minimum(own + 1, keep_blocks) - 1
    least = tl.zeros((ROWS, 1), tl.uint32)
    for bit in tl.static_range(31, -1, -1):
        higher = least | (1 << bit)
        least = tl.where(tl.sum((key >= higher).to(tl.int32), 1)[:, None] >= wanted, higher, least)
    above = key > least
    ties = (key == least) & (key != 0)
    room = wanted - tl.sum(above.to(tl.int32), 1)[:, None]
    kept = above | (ties & (tl.cumsum(ties.to(tl.int32), 1) <= room))
    slot = tl.cumsum(kept.to(tl.int32), 1) - 1
    line = unit * count + first_row + row
    tl.store(indices + line * width + slot, tl.broadcast_to(j, ROWS, BLOCKS), mask=kept & there)
    rest = tl.arange(0, WIDTH)[None, :]
    nothing = tl.full((ROWS, WIDTH), -1, tl.int32)
    tl.store(indices + line * width + rest, nothing, mask=there & (rest >= wanted) & (rest < width))
    tl.store(counts + line, wanted, mask=there)
