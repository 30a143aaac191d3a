# mypy: allow-untyped-defs
"""Importance from the state in Triton: one launch, one pass.

Bytes that must move: 4 * rows * length in and 4 * T out for each sequence. A pooling window reads each row w times,
out of the first-level cache but for its first time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specprefill_kernels import _triton
from specprefill_kernels.ops.finalize.reference import check_contents
from specprefill_kernels.ops.finalize.triton_config import choose

unavailable = _triton.unavailable
DEVICE_TYPE = _triton.DEVICE_TYPE


@triton.jit
def length_of(lengths, b, most, least):
    """Entry b of `lengths`, kept within [least, most], or `most` where there are none: an int32 scalar.

    An empty slot of a padded batch has the length 0, whatever CUDA tensor says so: nothing of it is kept.
    """
    # one way out: the compiler follows both branches of a function that returns early
    length = tl.full((), most, tl.int32)
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + b), least), length)
    return length


@triton.jit
def _row_values(row, t, length, capacity, stride_t, half, divisor, POOL: tl.constexpr, VALID_EDGE: tl.constexpr):
    """One row of the state at positions t, pooled if asked for. Meaningless for t >= length."""
    if POOL:
        # Left to right, and what lies outside adds nothing: the order depends neither on padding nor on the batch.
        total = tl.zeros(t.shape, tl.float32)
        for shift in range(-half, half + 1):
            at = t + shift
            total += tl.load(row + at * stride_t, mask=(at >= 0) & (at < length), other=0.0)
        if VALID_EDGE:
            inside = tl.minimum(t + half, length - 1) - tl.maximum(t - half, 0) + 1
            value = tl.div_rn(total, tl.maximum(inside, 1).to(tl.float32))
        else:
            value = tl.div_rn(total, divisor)
    else:
        # The length itself would be a mask of single elements, and the loads as narrow. What is read too much lies
        # inside the state and is dropped.
        readable = tl.minimum((length + 15) // 16 * 16, capacity)
        value = tl.load(row + t * stride_t, mask=t < readable, other=0.0)
    return value


@triton.jit
def importance_of(
    state,
    t,
    length,
    rows,
    capacity,
    stride_n,
    stride_t,
    half,
    divisor,
    REDUCE_MAX: tl.constexpr,
    POOL: tl.constexpr,
    VALID_EDGE: tl.constexpr,
):
    """Importance at positions t (int64, any shape) of the sequence whose first row `state` points to; 0 behind it."""
    half = tl.minimum(half, length - 1)  # a wider window holds everything wherever it is centred
    total = _row_values(state, t, length, capacity, stride_t, half, divisor, POOL, VALID_EDGE)
    row = state
    for _ in tl.range(1, rows, loop_unroll_factor=4):
        row += stride_n
        x = _row_values(row, t, length, capacity, stride_t, half, divisor, POOL, VALID_EDGE)
        total = tl.maximum(total, x, propagate_nan=tl.PropagateNan.ALL) if REDUCE_MAX else total + x
    if not REDUCE_MAX:
        total = tl.div_rn(total, rows.to(tl.float32))
    return tl.where(t < length, total, 0.0)


@triton.jit(
    do_not_specialize=["look_ahead", "tiles", "half"], do_not_specialize_on_alignment=["seq_lens", "num_look_ahead"]
)
def finalize_kernel(
    state,  # [B, N, T] fp32, any strides
    seq_lens,  # [B] int32 or None
    num_look_ahead,  # [B] int32 or None
    importance,  # [B, T] fp32, contiguous, out
    look_ahead,
    capacity,
    tiles,
    stride_b,
    stride_n,
    stride_t,
    half,
    divisor,
    REDUCE_MAX: tl.constexpr,
    POOL: tl.constexpr,
    VALID_EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    t = (program % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    length = length_of(seq_lens, b, capacity, 0)
    rows = length_of(num_look_ahead, b, look_ahead, 1)
    state += b * stride_b
    value = importance_of(
        state, t, length, rows, capacity, stride_n, stride_t, half, divisor, REDUCE_MAX, POOL, VALID_EDGE
    )
    tl.store(importance + b * capacity + t, value, mask=t < capacity)


def finalize_importance(
    state: Tensor,
    seq_lens: Tensor | None,
    num_look_ahead: Tensor | None,
    reduce: str,
    pool_kernel_size: int,
    pool_edge: str,
) -> Tensor:
    if _triton.checks_values():
        check_contents(state, seq_lens, num_look_ahead)
    batch, look_ahead, capacity = state.shape
    importance = torch.empty(batch, capacity, dtype=torch.float32, device=state.device)
    config = choose(_triton.target_of(state), capacity)
    tiles = triton.cdiv(capacity, config.block)
    _triton.launch(
        finalize_kernel,
        (batch * tiles,),
        state,
        seq_lens,
        num_look_ahead,
        importance,
        look_ahead,
        capacity,
        tiles,
        *state.stride(),
        *window(pool_kernel_size, capacity),
        on=state,
        **reduction(reduce, pool_kernel_size, pool_edge),
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return importance


def window(pool_kernel_size: int, capacity: int) -> tuple[int, float]:
    """(half of the window, as far as a sequence can reach, and what a sum is divided by)."""
    return min(pool_kernel_size // 2, capacity - 1), float(pool_kernel_size)


def reduction(reduce: str, pool_kernel_size: int, pool_edge: str) -> dict[str, bool]:
    """The constants of `importance_of`."""
    pool = pool_kernel_size > 1
    return {"REDUCE_MAX": reduce == "max", "POOL": pool, "VALID_EDGE": pool and pool_edge == "valid"}
