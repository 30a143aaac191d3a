"""Device code that both score kernels share: where a sequence lies, and one tile of logits.

Rows of a tile are a whole GQA group's look-ahead rows, m = g * BLOCK_N + n, so that one read of a key serves all of
them and the maximum over g stays within a thread. The head dimension is split as a power of two and a rest (80 = 64 +
16, 96 = 64 + 32, 192 = 128 + 64), each with its own dot, so that no tensor core multiplies padding.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def pick(items, index):
    """items[index] of a tuple of pointers."""
    chosen = items[0]
    for i in tl.static_range(1, len(items)):
        chosen = tl.where(index == i, items[i], chosen)
    return chosen


@triton.jit
def layer_of(queries, keys, key_scales, layer, head, scale, scale_stride):
    """(query, key, what a dot of the two is multiplied by) of one layer and KV head."""
    factor = scale
    if key_scales is not None:
        factor = scale * tl.load(pick(key_scales, layer) + head * scale_stride)
    return pick(queries, layer), pick(keys, layer), factor


@triton.jit
def rows_at(b, n, q_head, stride_b, stride_n, stride_h):
    """Element offset of each row in a tensor [B, N, Hq, ...], int64."""
    return b.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n + q_head.to(tl.int64) * stride_h


@triton.jit
def bounds(
    b,
    seq_lens,
    cu_seqlens,
    num_look_ahead,
    capacity,
    room,
    look_ahead,
    EXTRA_KEYS: tl.constexpr,
):
    """(first token, prompt length, valid rows, keys that may be read) of sequence b, clamped to the buffers.

    `room` is the tokens that a dense or paged sequence has, or all tokens of a packed buffer.
    """
    start = tl.zeros((), tl.int64)
    if cu_seqlens is not None:
        start += tl.load(cu_seqlens + b)
        end = tl.load(cu_seqlens + b + 1).to(tl.int64)
        # In 64 bits until it is known to fit, as offsets of a CUDA tensor may be anything.
        room = tl.where(start >= 0, tl.maximum(tl.minimum(end, room) - start, 0), 0).to(tl.int32)
        start = tl.maximum(start, 0)
    rows = tl.zeros((), tl.int32) + look_ahead
    if num_look_ahead is not None:
        rows = tl.maximum(tl.minimum(tl.load(num_look_ahead + b), look_ahead), 0)
    behind = tl.zeros((), tl.int32)
    if EXTRA_KEYS:
        behind += tl.maximum(rows - 1, 0)
    length = tl.minimum(capacity, room - behind)
    if seq_lens is not None:
        length = tl.minimum(tl.load(seq_lens + b), length)
    elif cu_seqlens is not None:
        length = tl.minimum(room, length)
    length = tl.maximum(length, 0)
    return start, length, rows, tl.where(length > 0, length + behind, 0)


@triton.jit
def decode_fp8(raw, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """uint8 -> fp16, exactly. e5m2 is the upper half of fp16; e4m3 fits its bits with an exponent 8 lower."""
    if FORMAT == "e5m2":
        return (raw.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    elif NATIVE:
        return raw.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        bits = raw.to(tl.uint16)
        magnitude = bits & 0x7F
        value = (((bits & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True) * 256.0
        return tl.where(magnitude == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def query_part(
    query,
    offset,
    ok,
    stride_d,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOT: tl.constexpr,
):
    """[M, WIDTH] of the query from dimension FIRST on, zero where it has none."""
    d = FIRST + tl.arange(0, WIDTH)
    pointers = query + offset[:, None] + d[None, :].to(tl.int64) * stride_d
    return tl.load(pointers, mask=ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(DOT)


@triton.jit
def key_part(
    key,
    offset,
    ok,
    stride_d,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FP8: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    DOT: tl.constexpr,
):
    """[BLOCK_T, WIDTH] of the keys from dimension FIRST on, zero where there are none."""
    d = FIRST + tl.arange(0, WIDTH)
    pointers = key + offset[:, None] + d[None, :].to(tl.int64) * stride_d
    mask = ok[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    part = tl.load(pointers, mask=mask, other=0)
    if FP8 != "":
        part = decode_fp8(part, FP8, FP8_NATIVE)
    return part.to(DOT)


@triton.jit
def key_offsets(
    t,
    ok,
    b,
    head,
    start,
    block_table,
    stride_table,
    block_size,
    num_blocks,
    stride_b,
    stride_h,
    stride_t,
):
    """(element offset of each position's key, which of them may be read), int64: a paged cache may pass 2^31."""
    within = head.to(tl.int64) * stride_h
    if block_table is None:
        return within + b.to(tl.int64) * stride_b + (start + t) * stride_t, ok
    else:
        block = tl.load(block_table + b.to(tl.int64) * stride_table + t // block_size, mask=ok, other=0)
        ok = ok & (block >= 0) & (block < num_blocks)
        return within + block.to(tl.int64) * stride_b + (t % block_size).to(tl.int64) * stride_t, ok


@triton.jit
def logits(
    query,
    q_offset,
    q_ok,
    q_stride_d,
    q_first,
    q_rest,
    key,
    k_offset,
    k_ok,
    k_stride_d,
    factor,
    softcap,
    HEAD_DIM: tl.constexpr,
    D_FIRST: tl.constexpr,
    D_REST: tl.constexpr,
    D_PART: tl.constexpr,
    FP8: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[M, BLOCK_T] attention logits times log2(e), before masking."""
    if D_PART == 0:
        part = key_part(key, k_offset, k_ok, k_stride_d, 0, D_FIRST, HEAD_DIM, FP8, FP8_NATIVE, DOT)
        dots = tl.dot(q_first, tl.trans(part), input_precision=PRECISION)
        if D_REST > 0:
            part = key_part(key, k_offset, k_ok, k_stride_d, D_FIRST, D_REST, HEAD_DIM, FP8, FP8_NATIVE, DOT)
            dots = tl.dot(q_rest, tl.trans(part), dots, input_precision=PRECISION)
    else:  # the query does not fit in registers beside the rest, so its parts are read again with each tile's
        dots = tl.zeros((q_offset.shape[0], k_offset.shape[0]), tl.float32)
        d = tl.arange(0, D_PART)
        for first in range(0, HEAD_DIM, D_PART):
            in_head = (first + d < HEAD_DIM)[None, :]
            at = (first + d[None, :]).to(tl.int64)
            q = tl.load(query + q_offset[:, None] + at * q_stride_d, mask=q_ok[:, None] & in_head, other=0.0)
            k = tl.load(key + k_offset[:, None] + at * k_stride_d, mask=k_ok[:, None] & in_head, other=0)
            if FP8 != "":
                k = decode_fp8(k, FP8, FP8_NATIVE)
            dots = tl.dot(q.to(DOT), tl.trans(k.to(DOT)), dots, input_precision=PRECISION)
    if softcap is None:
        return dots * (factor * LOG2E)
    else:
        return (softcap * LOG2E) * tanh(dots * (factor / softcap))


@triton.jit
def tanh(x):
    """By exp2, which every target and the interpreter have; by its series near 0, where the difference from 1 is lost.

    Relative error below 1e-6.
    """
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315))))
    return tl.where(square < 0.01, series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def sees(k_ok, t, position, window, CAUSAL: tl.constexpr):
    """[M or 1, BLOCK_T]: which keys a row sees, of those that there are."""
    seen = k_ok[None, :]
    if CAUSAL:
        seen = seen & (t[None, :] <= position[:, None])
    if window is not None:
        seen = seen & (t[None, :] > position[:, None] - window)
    return seen
