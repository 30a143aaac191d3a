"""The composite in Triton: three launches. The first also makes importance from the state, the last also gathers."""

import torch
from torch import Tensor

from specprefill_kernels import _triton
from specprefill_kernels.ops.finalize.reference import check_contents as check_state
from specprefill_kernels.ops.gather.reference import check_token_contents
from specprefill_kernels.ops.gather.triton_kernel import launch_gather_tokens
from specprefill_kernels.ops.select.budget import Budget
from specprefill_kernels.ops.select.reference import check_contents as check_importance
from specprefill_kernels.ops.select.triton_kernel import Finalize, rank_chunks

unavailable = _triton.unavailable
DEVICE_TYPE = _triton.DEVICE_TYPE


def select_tokens(
    state: Tensor,
    x: Tensor,
    seq_lens: Tensor | None,
    num_look_ahead: Tensor | None,
    protect: Tensor | None,
    reduce: str,
    pool_kernel_size: int,
    pool_edge: str,
    budget: Budget,
    token_dim: int,
) -> tuple[Tensor, ...]:
    if _triton.checks_values():
        check_state(state, seq_lens, num_look_ahead)
    batch, _, capacity = state.shape
    importance = torch.empty(batch, capacity, dtype=torch.float32, device=state.device)
    finalize = Finalize(num_look_ahead, reduce, pool_kernel_size, pool_edge, importance)
    chunks = rank_chunks(state, seq_lens, protect, budget, finalize)
    if _triton.checks_values():
        check_importance(importance, seq_lens, budget)
    indices = torch.empty(batch, chunks.width, dtype=torch.int32, device=state.device)
    packed = launch_gather_tokens(x, indices, chunks.num_kept, None, token_dim, chunks.ids, chunks.size)
    if _triton.checks_values():
        check_token_contents(x, indices, chunks.num_kept, None, token_dim)
    return importance, indices, chunks.num_kept, chunks.overflow, *packed
