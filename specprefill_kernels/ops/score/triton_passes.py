"""The score in Triton: two passes over the keys, or one where the caller knows each row's log-sum-exp.

1. `partial_sums`: each row's maximum logit and sum of exponentials, for one stretch of keys.
2. `join_sums`: those of a row, joined in the order of the stretches into its log-sum-exp.
3. `pool_max`: weights exp(logit - lse), pooled over positions, maximum over the group's heads, atomic maximum into
   `state`. A maximum knows no order, so the result is the same bit for bit from run to run.

Bytes that must move, for each layer, KV head and prompt token: the key, D * size, once with `lse` and twice without,
the second time from L2 as far as it holds a launch's keys (see `triton_config.layers_per_launch`). In pass 3 the halo
of pool_kernel_size - 1 keys a tile is read twice, from L2; N * 4 bytes of `state` take atomic operations in L2. Partial
sums are 8 bytes for each row and stretch of 512 keys or more.
Operations for each key and row: 2 D for each pass; 4 * block_t for pooling, which is a product with a band of ones on
tensor cores, the weights as the sum of two bf16 (relative error 2^-17).
"""

import triton
import triton.language as tl

from specprefill_kernels.ops.score.triton_tile import (
    LOG2E,
    bounds,
    key_offsets,
    layer_of,
    logits,
    pick,
    query_part,
    rows_at,
    sees,
)

# The lowest fp32: what is taken for -Inf where a difference of two must not be NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Numbers that differ from call to call: a kernel for 1 and for multiples of 16 of each would gain nothing. The strides
# of queries and keys are not among them: they decide how wide loads may be.
PLAIN = [
    "batch", "kv_heads", "row_blocks", "group", "look_ahead", "capacity", "room", "splits", "programs",
    "num_blocks", "table_stride", "scale_stride", "state_stride_b", "state_stride_n",
    "lse_stride_b", "lse_stride_n", "lse_stride_h", "window", "half", "out_tokens",
]  # fmt: skip
# Read number by number, and slices of an engine's larger buffers: their alignment means nothing.
TABLES = ["seq_lens", "cu_seqlens", "num_look_ahead", "block_table"]


@triton.jit
def rows_of_block(block, group, look_ahead, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(head within the group, look-ahead row) of each row of a tile."""
    BLOCK_G: tl.constexpr = BLOCK_M // BLOCK_N
    n_blocks = tl.cdiv(look_ahead, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    return block // n_blocks * BLOCK_G + m // BLOCK_N, block % n_blocks * BLOCK_N + m % BLOCK_N


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=TABLES)
def partial_sums(
    queries, keys, key_scales, maxima, sums, seq_lens, cu_seqlens, num_look_ahead, block_table,
    q_stride_b, q_stride_n, q_stride_h, q_stride_d, k_stride_b, k_stride_h, k_stride_t, k_stride_d, scale_stride,
    table_stride, block_size, num_blocks, batch, kv_heads, row_blocks, group, look_ahead, capacity, room, splits,
    scale, softcap, window,
    HEAD_DIM: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, D_PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, TILES: tl.constexpr,
    OBSERVATION: tl.constexpr, EXTRA_KEYS: tl.constexpr,
    FP8: tl.constexpr, FP8_NATIVE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """maxima, sums [layers * KV heads * row blocks, B, splits, BLOCK_M]: one program for each of the first three."""
    pid = tl.program_id(0)
    split, b, unit = pid % splits, pid // splits % batch, pid // splits // batch
    block, head, layer = unit % row_blocks, unit // row_blocks % kv_heads, unit // row_blocks // kv_heads
    start, length, rows, readable = bounds(
        b, seq_lens, cu_seqlens, num_look_ahead, capacity, room, look_ahead, EXTRA_KEYS
    )
    if not EXTRA_KEYS:
        readable = length
    first = split * (BLOCK_T * TILES)
    if first >= readable:
        return
    g, n = rows_of_block(block, group, look_ahead, BLOCK_M, BLOCK_N)
    position = (length - rows if OBSERVATION else length - 1) + n
    ok = (n < rows) & (g < group)
    query, key, factor = layer_of(queries, keys, key_scales, layer, head, scale, scale_stride)
    q_offset = rows_at(b, n, head * group + g, q_stride_b, q_stride_n, q_stride_h)
    q_first = None
    q_rest = None
    if D_PART == 0:
        q_first = query_part(query, q_offset, ok, q_stride_d, 0, D_FIRST, HEAD_DIM, DOT)
    if D_REST > 0:
        q_rest = query_part(query, q_offset, ok, q_stride_d, D_FIRST, D_REST, HEAD_DIM, DOT)

    last = tl.minimum(first + BLOCK_T * TILES, readable)
    from_key = first
    if window is not None:  # no row sees a key before its window, and the lowest row's begins first
        lowest = (length - rows if OBSERVATION else length - 1) - window + 1
        from_key = tl.maximum(first, lowest // BLOCK_T * BLOCK_T)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for t0 in range(from_key, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        offset, k_ok = key_offsets(
            t, t < readable, b, head, start, block_table, table_stride, block_size, num_blocks,
            k_stride_b, k_stride_h, k_stride_t,
        )  # fmt: skip
        x = logits(
            query, q_offset, ok, q_stride_d, q_first, q_rest, key, offset, k_ok, k_stride_d, factor, softcap,
            HEAD_DIM, D_FIRST, D_REST, D_PART, FP8, FP8_NATIVE, DOT, PRECISION,
        )  # fmt: skip
        x = tl.where(sees(k_ok, t, position, window, OBSERVATION or EXTRA_KEYS), x, float("-inf"))
        higher = tl.maximum(maximum, tl.max(x, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far: -Inf - -Inf is NaN
        total = total * tl.exp2(maximum - base) + tl.sum(tl.exp2(x - base[:, None]), 1)
        maximum = higher
    at = ((unit.to(tl.int64) * batch + b) * splits + split) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(maxima + at, maximum)
    tl.store(sums + at, total)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=TABLES)
def join_sums(
    lse, maxima, sums, seq_lens, cu_seqlens, num_look_ahead,
    batch, kv_heads, row_blocks, group, look_ahead, capacity, room, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
    EXTRA_KEYS: tl.constexpr,
):  # fmt: skip
    """lse [layers, B, N, Hq], in base 2; 0 for a row that sees no key. One program for each tile of rows."""
    pid = tl.program_id(0)
    b, unit = pid % batch, pid // batch
    block, head, layer = unit % row_blocks, unit // row_blocks % kv_heads, unit // row_blocks // kv_heads
    _, length, rows, readable = bounds(b, seq_lens, cu_seqlens, num_look_ahead, capacity, room, look_ahead, EXTRA_KEYS)
    if not EXTRA_KEYS:
        readable = length
    count = tl.cdiv(readable, SPLIT_TOKENS)
    m = tl.arange(0, BLOCK_M)
    base = ((unit.to(tl.int64) * batch + b) * splits) * BLOCK_M
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for s0 in range(0, count, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        at = base + (s[:, None] * BLOCK_M + m[None, :])
        there = (s < count)[:, None]
        highest = tl.load(maxima + at, mask=there, other=float("-inf"))
        part = tl.load(sums + at, mask=there, other=0.0)
        higher = tl.maximum(maximum, tl.max(highest, 0))
        zero = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(maximum - zero) + tl.sum(part * tl.exp2(highest - zero[None, :]), 0)
        maximum = higher
    sees_none = (maximum == float("-inf")) & (total == 0.0)
    # In base 2 as the logits are: where one key has all the weight, its logit is then the very number that is stored.
    value = tl.where(sees_none, 0.0, maximum + tl.log2(tl.where(sees_none, 1.0, total)))
    g, n = rows_of_block(block, group, look_ahead, BLOCK_M, BLOCK_N)
    row = (layer.to(tl.int64) * batch + b) * look_ahead + n
    tl.store(lse + row * (kv_heads * group) + head * group + g, value, mask=(n < rows) & (g < group))


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=TABLES)
def pool_max(
    state, queries, keys, key_scales, lse, seq_lens, cu_seqlens, num_look_ahead, block_table,
    state_stride_b, state_stride_n, lse_stride_b, lse_stride_n, lse_stride_h,
    q_stride_b, q_stride_n, q_stride_h, q_stride_d, k_stride_b, k_stride_h, k_stride_t, k_stride_d, scale_stride,
    table_stride, block_size, num_blocks, batch, kv_heads, row_blocks, group, look_ahead, capacity, room,
    scale, softcap, window, half, width, out_tokens, programs,
    HEAD_DIM: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, D_PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, TILES: tl.constexpr,
    OBSERVATION: tl.constexpr, EXTRA_KEYS: tl.constexpr,
    FP8: tl.constexpr, FP8_NATIVE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    POOL: tl.constexpr, VALID_EDGE: tl.constexpr, ONE_ROW: tl.constexpr, UPCAST: tl.constexpr,
    LSE_BASE_2: tl.constexpr,
):  # fmt: skip
    """state [B, N or 1, T]: each program writes TILES tiles of `out_tokens` positions, for one layer and KV head.

    Programs take the keys from the last to the first: the last are those that `partial_sums` has just read.

    `half` positions on each side are pooled with a position, and `width` is what their sum is divided by. POOL: "none",
    "tile" (the positions that a tile pools are one tile of keys: out_tokens + 2 * half <= BLOCK_T) or "wide".
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    stretch, b, unit = pid % programs, pid // programs % batch, pid // programs // batch
    block, head, layer = unit % row_blocks, unit // row_blocks % kv_heads, unit // row_blocks // kv_heads
    start, length, rows, _ = bounds(b, seq_lens, cu_seqlens, num_look_ahead, capacity, room, look_ahead, EXTRA_KEYS)
    first = stretch * (out_tokens * TILES)
    if first >= length:
        return
    g, n = rows_of_block(block, group, look_ahead, BLOCK_M, BLOCK_N)
    lowest = length - rows if OBSERVATION else length - 1
    position = lowest + n
    ok = (n < rows) & (g < group)
    query, key, factor = layer_of(queries, keys, key_scales, layer, head, scale, scale_stride)
    q_offset = rows_at(b, n, head * group + g, q_stride_b, q_stride_n, q_stride_h)
    q_first = None
    q_rest = None
    if D_PART == 0:
        q_first = query_part(query, q_offset, ok, q_stride_d, 0, D_FIRST, HEAD_DIM, DOT)
    if D_REST > 0:
        q_rest = query_part(query, q_offset, ok, q_stride_d, D_FIRST, D_REST, HEAD_DIM, DOT)
    lse_at = rows_at(b, n, head * group + g, lse_stride_b, lse_stride_n, lse_stride_h)
    norm = tl.load(pick(lse, layer) + lse_at, mask=ok, other=0.0)
    if not LSE_BASE_2:
        norm = norm * LOG2E
    norm = tl.where(norm == float("inf"), float("nan"), norm)  # as any other that is no number: to be seen
    norm = tl.where(norm == float("-inf"), LOWEST, norm)  # of a row that sees no key: its weights are 0, not NaN

    last = tl.minimum(first + out_tokens * TILES, length)
    for out0 in range(first, last, out_tokens):
        out = out0 + tl.arange(0, BLOCK_T)
        to_key = tl.minimum(tl.minimum(out0 + out_tokens, length) + half, length)
        seen_from = 0
        if window is not None:  # no row sees a key before that of the lowest row's window
            seen_from = tl.maximum(lowest - window + 1, 0)
        if POOL == "wide":
            pooled = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
            for t0 in range(tl.maximum(out0 - half, seen_from), to_key, BLOCK_T):
                t = t0 + tl.arange(0, BLOCK_T)
                weight = weights(
                    t, t < length, position, norm, window,
                    b, head, start, block_table, table_stride, block_size, num_blocks,
                    k_stride_b, k_stride_h, k_stride_t,
                    query, q_offset, ok, q_stride_d, q_first, q_rest, key, k_stride_d, factor, softcap,
                    HEAD_DIM, D_FIRST, D_REST, D_PART, OBSERVATION, FP8, FP8_NATIVE, DOT, PRECISION,
                )  # fmt: skip
                pooled = add_band(pooled, weight, t0 - out0, half, UPCAST)
        else:  # one tile of keys: no loop in the loop, so that the next tile's keys are on their way meanwhile
            t = out0 - half + tl.arange(0, BLOCK_T)
            pooled = weights(
                t, (t >= seen_from) & (t < to_key), position, norm, window,
                b, head, start, block_table, table_stride, block_size, num_blocks,
                k_stride_b, k_stride_h, k_stride_t,
                query, q_offset, ok, q_stride_d, q_first, q_rest, key, k_stride_d, factor, softcap,
                HEAD_DIM, D_FIRST, D_REST, D_PART, OBSERVATION, FP8, FP8_NATIVE, DOT, PRECISION,
            )  # fmt: skip
            if POOL == "tile":
                pooled = add_band(tl.zeros((BLOCK_M, BLOCK_T), tl.float32), pooled, -half, half, UPCAST)
        # Bits of numbers that are not negative order as integers do, and above them all a NaN without a sign: it stays.
        # All rows of a position are divided by the same, so that can follow the maximum.
        bits = tl.where(ok[:, None], pooled.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        bits = tl.max(tl.reshape(bits, (BLOCK_M // BLOCK_N, BLOCK_N, BLOCK_T)), 0)
        if ONE_ROW:
            bits = tl.max(bits, 0)[None, :]
        inside = width
        if VALID_EDGE:
            inside = tl.minimum(out + half, length - 1) - tl.maximum(out - half, 0) + 1
            inside = tl.maximum(inside, 1).to(tl.float32)[None, :]
        bits = tl.div_rn(bits.to(tl.float32, bitcast=True), inside).to(tl.int32, bitcast=True)
        here = (out < out0 + out_tokens) & (out < length)
        target = state.to(tl.pointer_type(tl.int32)) + b.to(tl.int64) * state_stride_b
        if ONE_ROW:
            tl.atomic_max(target + out[None, :], bits, mask=here[None, :], sem="relaxed")
        else:
            row = block % tl.cdiv(look_ahead, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
            at = row[:, None].to(tl.int64) * state_stride_n + out[None, :]
            tl.atomic_max(target + at, bits, mask=(row < rows)[:, None] & here[None, :], sem="relaxed")


@triton.jit
def weights(
    t, wanted, position, norm, window, b, head, start, block_table, table_stride, block_size, num_blocks,
    k_stride_b, k_stride_h, k_stride_t, query, q_offset, q_ok, q_stride_d, q_first, q_rest,
    key, k_stride_d, factor, softcap,
    HEAD_DIM: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, D_PART: tl.constexpr,
    OBSERVATION: tl.constexpr, FP8: tl.constexpr, FP8_NATIVE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_T] attention weights exp(logit - lse), zero where a row does not see a key."""
    offset, k_ok = key_offsets(
        t, wanted, b, head, start, block_table, table_stride, block_size, num_blocks,
        k_stride_b, k_stride_h, k_stride_t,
    )  # fmt: skip
    x = logits(
        query, q_offset, q_ok, q_stride_d, q_first, q_rest, key, offset, k_ok, k_stride_d, factor, softcap,
        HEAD_DIM, D_FIRST, D_REST, D_PART, FP8, FP8_NATIVE, DOT, PRECISION,
    )  # fmt: skip
    # Hidden before the difference, which keeps it from being fused with the product inside x: a logit that is the whole
    # sum must give a weight of 1, so it has to be rounded as it was when the sum was taken.
    x = tl.where(sees(k_ok, t, position, window, OBSERVATION), x, float("-inf"))
    return tl.exp2(x - norm[:, None])


@triton.jit
def add_band(pooled, weight, shift, half, UPCAST: tl.constexpr):
    """pooled + weight summed over all keys within `half` of each position; `shift` is the first key - first position.

    A product with a band of ones. The weight is the sum of its upper half, a bf16 by itself, and the rest.
    """
    i = tl.arange(0, weight.shape[1])
    band = tl.where(tl.abs(shift + i[:, None] - i[None, :]) <= half, 1.0, 0.0)
    high = (weight.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    low = weight - high
    band, high, low = band.to(tl.bfloat16), high.to(tl.bfloat16), low.to(tl.bfloat16)
    if UPCAST:  # the interpreter would multiply the bits of bf16
        band, high, low = band.to(tl.float32), high.to(tl.float32), low.to(tl.float32)
    return tl.dot(low, band, tl.dot(high, band, pooled))
