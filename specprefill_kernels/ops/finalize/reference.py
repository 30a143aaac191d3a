"""The definition of importance: each sequence's valid rows of the state, averaged (or their maximum)."""

import torch
from torch import Tensor

from specprefill_kernels import _checks
from specprefill_kernels.ops.score.options import look_ahead_rows
from specprefill_kernels.ops.score.reference import pool


def finalize_importance(
    state: Tensor,
    seq_lens: Tensor | None,
    num_look_ahead: Tensor | None,
    reduce: str,
    pool_kernel_size: int,
    pool_edge: str,
) -> Tensor:
    batch, _, capacity = state.shape
    bounds = _bounds(state, seq_lens, num_look_ahead)
    if state.device.type == "cpu":
        check_contents(state, seq_lens, num_look_ahead)
    importance = torch.zeros(batch, capacity, dtype=torch.float32, device=state.device)
    for b, (length, n) in enumerate(bounds):
        valid = state[b, :n, :length]
        if pool_kernel_size > 1:
            valid = pool(valid, pool_kernel_size, pool_edge)
        if reduce == "max":
            importance[b, :length] = valid.amax(0)
            continue
        total = valid[0].clone()
        for row in valid[1:]:  # row after row: the order that every backend sums in
            total += row
        importance[b, :length] = total / n
    return importance


def check_contents(state: Tensor, seq_lens: Tensor | None, num_look_ahead: Tensor | None) -> None:
    """What the definition refuses in the contents of CPU tensors."""
    for b, (length, n) in enumerate(_bounds(state, seq_lens, num_look_ahead)):
        _checks.finite_values("state", state[b, :n, :length], b)


def _bounds(state: Tensor, seq_lens: Tensor | None, num_look_ahead: Tensor | None) -> list[tuple[int, int]]:
    """(length, valid rows) of each sequence."""
    batch, look_ahead, capacity = state.shape
    lengths = _checks.length_values(seq_lens, capacity, batch)
    return list(zip(lengths, look_ahead_rows(batch, look_ahead, num_look_ahead)))
