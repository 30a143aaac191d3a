# mypy: allow-untyped-defs
"""Attention over a list of key blocks, in Triton: online softmax (FlashAttention), tile by tile of the listed blocks.

Bytes that must move: queries and the output once; of keys and values, 2 * block_n * D elements for each tile and
program, out of L2 as far as it holds a head's keys. Operations: 4 * D for each query row and key that it attends to.
The head dimension is split as a power of two and a rest (80 = 64 + 16, 96 = 64 + 32, 192 = 128 + 64), each with its own
dots and sums, so that no tensor core multiplies padding.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _part(
    x, t, ok, stride_t, stride_d, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, DOT: tl.constexpr
):
    """[rows, WIDTH] of positions t from dimension FIRST on, zero where there is nothing."""
    d = FIRST + tl.arange(0, WIDTH)
    at = t.to(tl.int64)[:, None] * stride_t + d.to(tl.int64)[None, :] * stride_d
    mask = ok[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(DOT)


@triton.jit
def _fold(
    total, maximum, acc, acc_rest, q, q_rest, query, n, q_ok, key, value, t, k_ok, seen, factor,
    q_stride_t, q_stride_d, k_stride_t, k_stride_d, v_stride_t, v_stride_d,
    HEAD_DIM: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, D_PART: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values more. `seen` is a mask over [rows, keys], or one number for all of them."""
    if D_PART > 0:
        x = tl.zeros((n.shape[0], t.shape[0]), tl.float32)
        d = tl.arange(0, D_PART)
        for first in range(0, HEAD_DIM, D_PART):
            at = (first + d).to(tl.int64)[None, :]
            in_head = (first + d < HEAD_DIM)[None, :]
            q_at = n.to(tl.int64)[:, None] * q_stride_t + at * q_stride_d
            k_at = t.to(tl.int64)[:, None] * k_stride_t + at * k_stride_d
            part = tl.load(query + q_at, mask=q_ok[:, None] & in_head, other=0.0).to(DOT)
            k = tl.load(key + k_at, mask=k_ok[:, None] & in_head, other=0.0).to(DOT)
            x = tl.dot(part, tl.trans(k), x, input_precision=PRECISION)
    else:
        k = _part(key, t, k_ok, k_stride_t, k_stride_d, 0, D_FIRST, HEAD_DIM, DOT)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if D_REST > 0:
            k = _part(key, t, k_ok, k_stride_t, k_stride_d, D_FIRST, D_REST, HEAD_DIM, DOT)
            x = tl.dot(q_rest, tl.trans(k), x, input_precision=PRECISION)
    x = tl.where(seen, x * factor, float("-inf"))
    higher = tl.maximum(maximum, tl.max(x, 1))
    weight = tl.exp2(x - higher[:, None])
    shrink = tl.exp2(maximum - higher)
    total = total * shrink + tl.sum(weight, 1)
    weight = weight.to(DOT)
    v = _part(value, t, k_ok, v_stride_t, v_stride_d, 0, D_FIRST, HEAD_DIM, DOT)
    acc = tl.dot(weight, v, acc * shrink[:, None], input_precision=PRECISION)
    if D_REST > 0:
        v = _part(value, t, k_ok, v_stride_t, v_stride_d, D_FIRST, D_REST, HEAD_DIM, DOT)
        acc_rest = tl.dot(weight, v, acc_rest * shrink[:, None], input_precision=PRECISION)
    return total, higher, acc, acc_rest


@triton.jit
def _write(out, t, ok, stride_t, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)
    at = t.to(tl.int64)[:, None] * stride_t + d[None, :]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=ok[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["q_heads", "group", "count", "first", "start", "total_keys", "width"])
def attend(
    out,  # [B, n, Hq, D], contiguous
    query,  # [B, Hq, n, D], the last n of the keys' positions
    key,  # [B, Hkv, T, D]
    value,
    indices,  # [B, Hq, count, width] int32, contiguous
    counts,  # [B, Hq, count] int32, contiguous
    q_stride_b, q_stride_h, q_stride_t, q_stride_d, k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d, q_heads, group, count, first, start, total_keys, width, scale,
    HEAD_DIM: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, D_PART: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_M rows of a query block and head. `first`: the query's first block, `start`: its position.

    Its own block comes first: every row sees a key there, so that no maximum is -Inf afterwards.
    """
    SPLITS: tl.constexpr = BLOCK_SIZE // BLOCK_M
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    pid = tl.program_id(0)
    split, row, unit = pid % SPLITS, pid // SPLITS % count, pid // SPLITS // count
    head, b = unit % q_heads, unit // q_heads
    own = first + row
    low = own * BLOCK_SIZE + split * BLOCK_M
    if (low >= total_keys) | (low + BLOCK_M <= start):
        return
    position = low + tl.arange(0, BLOCK_M)
    ok = (position >= start) & (position < total_keys)
    query += b.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    kv_head = head // group
    key += b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    value += b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    n = position - start
    q = None
    if D_PART == 0:
        q = _part(query, n, ok, q_stride_t, q_stride_d, 0, D_FIRST, HEAD_DIM, DOT)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D_FIRST), tl.float32)
    q_rest = None
    acc_rest = total  # anything that is a tensor, as a loop carries it
    if D_REST > 0:
        if D_PART == 0:
            q_rest = _part(query, n, ok, q_stride_t, q_stride_d, D_FIRST, D_REST, HEAD_DIM, DOT)
        acc_rest = tl.zeros((BLOCK_M, D_REST), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    factor = scale * LOG2E
    last = tl.minimum(low + BLOCK_M, total_keys)
    for t0 in range(own * BLOCK_SIZE, last, BLOCK_N):
        t = t0 + tl.arange(0, BLOCK_N)
        k_ok = t < total_keys
        seen = k_ok[None, :] & (t[None, :] <= position[:, None])
        total, maximum, acc, acc_rest = _fold(
            total, maximum, acc, acc_rest, q, q_rest, query, n, ok, key, value, t, k_ok, seen, factor,
            q_stride_t, q_stride_d, k_stride_t, k_stride_d, v_stride_t, v_stride_d,
            HEAD_DIM, D_FIRST, D_REST, D_PART, DOT, PRECISION,
        )  # fmt: skip
    line = unit.to(tl.int64) * count + row
    listed = tl.minimum(tl.load(counts + line), width)
    indices += line * width
    for step in range(listed * TILES):
        block = tl.load(indices + step // TILES)
        earlier = (block >= 0) & (block < own)  # whatever else stands there is no block
        t = tl.where(earlier, block, 0) * BLOCK_SIZE + step % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        total, maximum, acc, acc_rest = _fold(
            total, maximum, acc, acc_rest, q, q_rest, query, n, ok, key, value, t, t >= 0, earlier, factor,
            q_stride_t, q_stride_d, k_stride_t, k_stride_d, v_stride_t, v_stride_d,
            HEAD_DIM, D_FIRST, D_REST, D_PART, DOT, PRECISION,
        )  # fmt: skip
    rows = total_keys - start
    out += (b.to(tl.int64) * rows * q_heads + head) * HEAD_DIM
    _write(out, n, ok, q_heads * HEAD_DIM, acc / total[:, None], 0, D_FIRST, HEAD_DIM)
    if D_REST > 0:
        _write(out, n, ok, q_heads * HEAD_DIM, acc_rest / total[:, None], D_FIRST, D_REST, HEAD_DIM)
