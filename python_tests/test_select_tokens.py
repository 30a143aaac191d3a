"""select_tokens is finalize_importance, select_chunks and gather_tokens in one call: the same, bit for bit."""

from __future__ import annotations

import oracle
import pytest
import torch
from grid import on_backends, same
from selecting import check_selection

import specprefill_kernels as spk

pytestmark = on_backends("select_tokens")

SEQ_LENS, ROWS = (200, 129, 7), (4, 1, 3)


def a_problem(device: str):
    random = torch.Generator().manual_seed(7)
    state = torch.full((3, 4, 210), float("nan"))
    for b, length in enumerate(SEQ_LENS):
        state[b, : ROWS[b], :length] = torch.rand(ROWS[b], length, generator=random) ** 4
    ids = torch.randint(0, 50000, (3, 210), generator=random)
    lengths, rows = torch.tensor(SEQ_LENS), torch.tensor(ROWS)
    return tuple(x.to(device) for x in (state, ids, lengths, rows))


BUDGETS = [
    {"keep_ratio": 0.3},
    {"keep_tokens": 50, "rounding": "floor"},
    {"keep_mass": 0.4, "chunk_size": 7},
    {"keep_ratio": 0.2, "sink": 3, "tail": 40, "chunk_size": 16},
]
IMPORTANCES = [{}, {"reduce": "max"}, {"pool_kernel_size": 13}, {"pool_kernel_size": 5, "pool_edge": "valid"}]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("how", IMPORTANCES, ids=str)
@pytest.mark.parametrize("protected", [False, True])
def test_equals_the_three_ops(backend, budget, how, protected):
    state, ids, lengths, rows = a_problem(backend.device)
    protect = None
    if protected:
        protect = torch.zeros(3, 210, dtype=torch.bool, device=backend.device)
        protect[:, [5, 150]] = True
    packed, selection, importance = spk.select_tokens(
        state, ids, lengths, rows, protect=protect, backend=backend.name, **how, **budget
    )
    alone = spk.finalize_importance(state, lengths, rows, backend=backend.name, **how)
    same(importance, alone, "importance")
    chosen = spk.select_chunks(alone, lengths, protect=protect, backend=backend.name, **budget)
    for name, left, right in zip(chosen._fields, selection, chosen, strict=True):
        same(left, right, name)
    gathered = spk.gather_tokens(ids, chosen, backend=backend.name)
    for name in ("values", "position_ids", "cu_seqlens"):
        same(getattr(packed, name), getattr(gathered, name), name)
    assert packed.max_len == gathered.max_len
    kept = oracle.select_chunks(alone.cpu().numpy(), SEQ_LENS, oracle.Budget(**budget), protect)
    check_selection(selection, kept)


def test_other_token_axes(backend):
    state, _, lengths, rows = a_problem(backend.device)
    mrope = torch.arange(3 * 3 * 210, device=backend.device).view(3, 3, 210)
    packed, selection, _ = spk.select_tokens(
        state, mrope, lengths, rows, keep_ratio=0.3, token_dim=2, backend=backend.name
    )
    same(packed.values, spk.gather_tokens(mrope, selection, token_dim=2, backend=backend.name).values)


def test_a_state_of_one_row(backend):
    """reduce="max" with the rows folded while scoring: no mean is taken over rows that are not there."""
    state, ids, lengths, _ = a_problem(backend.device)
    one = state[:, :1].contiguous()
    result = spk.select_tokens(one, ids, lengths, reduce="max", keep_ratio=0.3, backend=backend.name)
    for b, length in enumerate(SEQ_LENS):
        same(result.importance[b, :length], one[b, 0, :length])


def test_a_large_batch(backend):
    """More sequences than a block has threads."""
    batch = backend.sized(600, 600, 40)
    state = torch.rand(batch, 1, 12, generator=torch.Generator().manual_seed(0))
    ids, lengths = torch.arange(batch * 12).view(batch, 12), torch.arange(batch, dtype=torch.int32) % 12 + 1
    given, budget = (state, ids, lengths), {"keep_ratio": 0.5, "chunk_size": 3}
    packed = spk.select_tokens(*(x.to(backend.device) for x in given), **budget, backend=backend.name).packed
    expected = spk.select_tokens(*given, **budget, backend="reference").packed
    same(packed.cu_seqlens, expected.cu_seqlens)
    same(packed.values, expected.values)


@pytest.mark.parametrize("processors", [1, 4])
def test_a_block_packs_tile_after_tile(backend, monkeypatch, processors):
    """Rows so wide that there are more tiles than blocks, on a small device."""
    monkeypatch.setenv("SPECPREFILL_EMULATION_DEVICE", f"{processors}:227:90")
    random = torch.Generator().manual_seed(0)
    state, x = torch.rand(2, 4, 90, generator=random), torch.randn(2, 90, 2100, generator=random)
    given = (y.to(backend.device) for y in (state, x, torch.tensor([90, 50], dtype=torch.int32)))
    packed, selection, _ = spk.select_tokens(*given, keep_ratio=0.5, chunk_size=4, backend=backend.name)
    expected = spk.gather_tokens(x, spk.Selection(*(part.cpu() for part in selection)), backend="reference")
    same(packed.values, expected.values)
