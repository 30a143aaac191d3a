"""Selection's arguments and results as the compiled module takes them, for its CPU and its CUDA functions alike."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.select.budget import Budget

_ROUNDING_CODES = {"ceil": 0, "floor": 1}


def new_selection(importance: Tensor, protect: Tensor | None, budget: Budget) -> tuple[Tensor, Tensor, Tensor]:
    """indices, num_kept and overflow, to be written."""
    batch, max_len = importance.shape
    width = budget.width(max_len, protect is not None)
    return (
        importance.new_empty(batch, width, dtype=torch.int32),
        importance.new_empty(batch, dtype=torch.int32),
        importance.new_empty(batch, dtype=torch.bool),
    )


def arguments(
    compiled: ModuleType,
    importance: Tensor,
    seq_lens: Tensor | None,
    protect: Tensor | None,
    budget: Budget,
    selection: tuple[Tensor, Tensor, Tensor],
) -> Any:
    """A `Select`: addresses, so the tensors must outlive the call that it is for."""
    indices, num_kept, overflow = selection
    tokens = None if budget.keep_tokens is None else min(budget.keep_tokens, 2**53)  # as a double holds it
    given = (budget.keep_ratio, tokens, budget.keep_mass)
    (code,) = [i for i, value in enumerate(given) if value is not None]
    return compiled.Select(
        importance.data_ptr(),
        importance.stride(),
        importance.shape,
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
        indices.shape[1],
        num_kept.data_ptr(),
        overflow.data_ptr(),
    )
