"""Selections for the tests of select and gather: compare with the oracle, and make them by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import oracle
import torch
from grid import Backend
from layouts import place

import specprefill_kernels as spk


def select(backend: Backend | str, importance: torch.Tensor, seq_lens=None, *, protect=None, **options):
    """``select_chunks`` on the backend's device."""
    name, device = (backend, "cpu") if isinstance(backend, str) else (backend.name, backend.device)
    lengths = None if seq_lens is None else torch.tensor(seq_lens, dtype=torch.int32, device=device)
    protect = None if protect is None else protect.to(device)
    return spk.select_chunks(importance.to(device), lengths, protect=protect, backend=name, **options)


def check_selection(selection: spk.Selection, kept: Sequence[oracle.Kept]) -> None:
    """Indices exactly, -1 behind them, counts, overflow, dtypes."""
    indices = selection.indices.cpu()
    assert indices.dtype == torch.int32
    assert selection.num_kept.dtype == torch.int32
    assert selection.overflow.dtype == torch.bool
    for b, wanted in enumerate(kept):
        count = len(wanted.tokens)
        assert int(selection.num_kept[b]) == count
        assert indices[b, :count].tolist() == wanted.tokens
        assert (indices[b, count:] == -1).all()
        assert bool(selection.overflow[b]) == wanted.overflow


def compare(backend, importance: torch.Tensor, seq_lens=None, *, protect=None, **options) -> spk.Selection:
    """One backend against the oracle; what lies beyond a length is NaN and protected, and must not count."""
    lengths = seq_lens if seq_lens is not None else [importance.shape[1]] * importance.shape[0]
    budget = oracle.Budget(**options)
    kept = oracle.select_chunks(importance.numpy(), lengths, budget, protect)
    importance = importance.clone()
    protect = None if protect is None else protect.clone()
    for b, length in enumerate(lengths):
        importance[b, length:] = float("nan")
        if protect is not None:
            protect[b, length:] = True
    selection = select(backend, importance, seq_lens, protect=protect, **options)
    check_selection(selection, kept)
    check_width(selection, importance.shape[1], budget, protect is not None)
    return selection


def check_width(selection: spk.Selection, max_len: int, budget: oracle.Budget, protect: bool) -> None:
    """K depends on shapes and options alone, and is no wider than the contract says."""
    width = selection.indices.shape[1]
    if protect or budget.keep_mass is not None:
        assert width == max_len
        return
    plain = min(max_len, budget.chunks(max_len) * budget.chunk_size)
    if not budget.sink and not budget.tail:
        assert width == plain
        return
    spans = [-(-budget.sink // budget.chunk_size), -(-budget.tail // budget.chunk_size) + bool(budget.tail)]
    assert plain <= width <= max(plain, min(max_len, sum(spans) * budget.chunk_size))


def selection_of(
    rows: Sequence[Sequence[int]], width: int | None = None, device: str = "cpu", room: int = 0
) -> spk.Selection:
    """A selection made by hand: kept positions of each sequence; ``room`` columns of rubbish lie between its rows."""
    width = width or max(1, *(len(row) for row in rows))
    indices = torch.full((len(rows), width + room), 2**30, dtype=torch.int32)[:, :width]
    indices[:] = -1
    for b, row in enumerate(rows):
        indices[b, : len(row)] = torch.tensor(list(row), dtype=torch.int32)
    num_kept = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    overflow = torch.zeros(len(rows), dtype=torch.bool)
    return spk.Selection(place(indices, device), num_kept.to(device), overflow.to(device))


def random_rows(seq_lens: Sequence[int], seed: int = 0) -> list[list[int]]:
    """About half of each sequence, at least one token, first and last one now and then."""
    random = np.random.default_rng(seed)
    rows = [sorted(np.flatnonzero(random.random(length) < 0.5).tolist()) for length in seq_lens]
    return [row or [length - 1] for row, length in zip(rows, seq_lens, strict=True)]
