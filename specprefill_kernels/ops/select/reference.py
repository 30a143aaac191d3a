"""The definition of chunk selection: rank chunks by their mean importance, keep the best, in prompt order."""

import torch
from torch import Tensor

from specprefill_kernels import _checks
from specprefill_kernels.ops.select.budget import MASS_SLACK, Budget


def select_chunks(
    importance: Tensor, seq_lens: Tensor | None, protect: Tensor | None, budget: Budget
) -> tuple[Tensor, Tensor, Tensor]:
    batch, capacity = importance.shape
    device = importance.device
    lengths = _checks.length_values(seq_lens, capacity, batch)
    if device.type == "cpu":
        check_contents(importance, seq_lens, budget)
    width = budget.width(capacity, protect is not None)
    indices = torch.full((batch, width), -1, dtype=torch.int32, device=device)
    num_kept = torch.zeros(batch, dtype=torch.int32, device=device)
    overflow = torch.zeros(batch, dtype=torch.bool, device=device)
    for b, length in enumerate(lengths):
        forced = forced_chunks(length, None if protect is None else protect[b], budget, device)
        keep = kept_chunks(importance[b, :length], forced, budget)
        tokens = keep.repeat_interleave(budget.chunk_size)[:length].nonzero()[:, 0]
        indices[b, : len(tokens)] = tokens.int()
        num_kept[b] = len(tokens)
        overflow[b] = budget.keep_mass is None and int(forced.sum()) > budget.chunks(len(forced))
    return indices, num_kept, overflow


def forced_chunks(length: int, protect: Tensor | None, budget: Budget, device: torch.device) -> Tensor:
    """Chunks that hold a protected, sink or tail token: bool [n_chunks]."""
    position = torch.arange(length, device=device)
    forced = (position < budget.sink) | (position >= length - budget.tail)
    if protect is not None:
        forced = forced | protect[:length]
    return _per_chunk(forced, budget.chunk_size).any(1)


def kept_chunks(importance: Tensor, forced: Tensor, budget: Budget) -> Tensor:
    """Forced chunks, then the best others while the budget lasts: bool [n_chunks]."""
    mass = _per_chunk(importance.double(), budget.chunk_size).sum(1)
    if budget.keep_mass is not None:
        rank_by = mass.float()
    else:
        tokens = _per_chunk(torch.ones_like(importance), budget.chunk_size).sum(1)
        rank_by = (mass / tokens).float()
    order = torch.sort(rank_by, descending=True, stable=True).indices
    order = order[torch.sort(~forced[order], stable=True).indices]  # the forced ones are paid first
    if budget.keep_mass is not None:
        held = mass[order].cumsum(0)
        enough = (held >= (budget.keep_mass - MASS_SLACK) * mass.sum()).nonzero()
        count = int(enough[0]) + 1 if len(enough) else len(order)
    else:
        count = budget.chunks(len(order))
    keep = forced.clone()
    keep[order[:count]] = True
    return keep


def _per_chunk(x: Tensor, chunk_size: int) -> Tensor:
    """[T] -> [n_chunks, chunk_size], the short last chunk filled with zeros."""
    padding = -len(x) % chunk_size
    return torch.cat([x, x.new_zeros(padding)]).view(-1, chunk_size)


def check_contents(importance: Tensor, seq_lens: Tensor | None, budget: Budget) -> None:
    """What the definition refuses in the contents of CPU tensors."""
    lengths = _checks.length_values(seq_lens, importance.shape[1], len(importance))
    for b, length in enumerate(lengths):
        _checks.finite_values("importance", importance[b, :length], b)
    if budget.keep_mass is None:
        return
    for b, length in enumerate(lengths):
        low = float(importance[b, :length].min())
        if low < 0:
            _checks.fail(f"importance[{b}]", "non-negative values with keep_mass", low)
