"""Chunk selection on the CUDA kernels (csrc/select)."""

from torch import Tensor

from specprefill_kernels import _cuda
from specprefill_kernels.ops.select.budget import Budget
from specprefill_kernels.ops.select.native import arguments, new_selection
from specprefill_kernels.ops.select.reference import check_contents

unavailable = _cuda.unavailable
DEVICE_TYPE = _cuda.DEVICE_TYPE


def select_chunks(
    importance: Tensor, seq_lens: Tensor | None, protect: Tensor | None, budget: Budget
) -> tuple[Tensor, Tensor, Tensor]:
    if _cuda.checks_values():
        check_contents(importance, seq_lens, budget)
    compiled, selection = _cuda.module(), new_selection(importance, protect, budget)
    args = arguments(compiled, importance, seq_lens, protect, budget, selection)
    memory, size = _cuda.scratch(compiled.select_workspace_size_cuda(args), None, importance)
    _cuda.call(compiled.select_cuda, args, memory.data_ptr(), size, on=importance)
    return selection
