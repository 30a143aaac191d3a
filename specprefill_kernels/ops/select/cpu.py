"""Chunk selection on the compiled CPU kernels."""

import torch
from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.select.budget import Budget

unavailable = _native.unavailable

_ROUNDING_CODES = {"ceil": 0, "floor": 1}


def select_chunks(
    importance: Tensor, seq_lens: Tensor | None, protect: Tensor | None, budget: Budget
) -> tuple[Tensor, Tensor, Tensor]:
    batch, max_len = importance.shape
    width = budget.width(max_len, protect is not None)
    indices = torch.empty(batch, width, dtype=torch.int32)
    num_kept = torch.empty(batch, dtype=torch.int32)
    overflow = torch.empty(batch, dtype=torch.bool)
    tokens = None if budget.keep_tokens is None else min(budget.keep_tokens, 2**53)  # as a double holds it
    given = (budget.keep_ratio, tokens, budget.keep_mass)
    (code,) = [i for i, value in enumerate(given) if value is not None]
    _native.module().select(
        importance.data_ptr(),
        importance.stride(),
        (batch, max_len),
        _native.address(seq_lens),
        _native.address(protect),
        (0, 0) if protect is None else protect.stride(),
        code,
        float(given[code]),  # type: ignore[arg-type]
        budget.chunk_size,
        _ROUNDING_CODES[budget.rounding],
        budget.sink,
        budget.tail,
        indices.data_ptr(),
        width,
        num_kept.data_ptr(),
        overflow.data_ptr(),
        _native.threads(),
    )
    return indices, num_kept, overflow
