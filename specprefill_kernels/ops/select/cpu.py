"""Chunk selection on the compiled CPU kernels."""

from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.select.budget import Budget
from specprefill_kernels.ops.select.native import arguments, new_selection

unavailable = _native.unavailable


def select_chunks(
    importance: Tensor, seq_lens: Tensor | None, protect: Tensor | None, budget: Budget
) -> tuple[Tensor, Tensor, Tensor]:
    compiled, selection = _native.module(), new_selection(importance, protect, budget)
    compiled.select(arguments(compiled, importance, seq_lens, protect, budget, selection), _native.threads())
    return selection
