"""Contents that CPU tensors are refused for and CUDA tensors are not read for: what lies beyond a buffer is absent.

Triton's interpreter and the emulation of CUDA stand in for a GPU here, with their checks of contents off;
test_gpu_bad_values.py asks a real one.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from grid import EMULATED, INTERPRETED

import specprefill_kernels as spk

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or EMULATED), reason="needs TRITON_INTERPRET=1 or SPECPREFILL_EMULATION"
)

ROWS, HEADS, DIM = 4, 2, 16


@pytest.fixture(
    params=[name for name, there in (("triton", INTERPRETED), ("cuda", EMULATED)) if there] or ["no backend"]
)
def backend(request, monkeypatch) -> str:
    """A backend that takes CPU tensors here as it takes a GPU's."""
    launcher = importlib.import_module(f"specprefill_kernels._{request.param}")
    monkeypatch.setattr(launcher, "checks_values", lambda: False)
    return request.param


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_no_key_is_read_behind_an_empty_slot(backend):
    """The padding of a packed batch: no prompt, so no look-ahead keys behind it either."""
    buffer = torch.full((40, 1, DIM), float("nan"))
    buffer[:20] = random(20, 1, DIM)
    workspace = torch.zeros(1 << 20, dtype=torch.uint8)
    state = spk.score_layer_(
        spk.new_state(2, ROWS, 20),
        random(2, ROWS, HEADS, DIM),
        buffer[:20],
        layout="packed",
        cu_seqlens=torch.tensor([0, 20, 20], dtype=torch.int32),
        seq_lens=torch.tensor([20 - ROWS, 5], dtype=torch.int32),
        normalize_over="visible",
        workspace=workspace,
        backend=backend,
    )
    assert not workspace.view(torch.float32).isnan().any()
    assert bool(state.isfinite().all())


@pytest.mark.parametrize("block", [-1, 5, 2**31 - 1])
def test_keys_of_a_block_that_is_not_there_have_no_weight(backend, block):
    key = random(5, 8, 1, DIM)
    query = random(1, ROWS, HEADS, DIM)
    table = torch.tensor([[0, block, 2]], dtype=torch.int32)
    state = spk.new_state(1, ROWS, 24)
    spk.score_layer_(
        state,
        query,
        key,
        layout="paged_nhd",
        block_table=table,
        seq_lens=torch.tensor([24]),
        pool_kernel_size=1,
        backend=backend,
    )
    there = torch.cat([key[0], key[2]]).movedim(0, 1)[None]
    expected = spk.score_layer_(spk.new_state(1, ROWS, 16), query, there, pool_kernel_size=1, backend="reference")
    assert (state[:, :, 8:16] == 0).all()
    torch.testing.assert_close(torch.cat([state[:, :, :8], state[:, :, 16:]], 2), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunk_size", [40, 64, 5000])
def test_a_chunk_larger_than_the_prompt_holds_all_of_it(backend, chunk_size):
    selection = spk.select_chunks(random(2, 37).abs(), keep_ratio=0.1, chunk_size=chunk_size, backend=backend)
    assert selection.num_kept.tolist() == [37, 37]
    assert selection.indices.tolist() == [list(range(37))] * 2


@pytest.mark.parametrize("budget", [{"keep_ratio": 0.5}, {"keep_tokens": 8}, {"keep_mass": 0.5}], ids=str)
@pytest.mark.parametrize("guarded", [{}, {"sink": 3, "tail": 2}], ids=str)
def test_nothing_of_an_empty_slot_is_kept(backend, budget, guarded):
    """A batch padded for a CUDA graph: its slots without a request have the length 0."""
    state = random(4, ROWS, 64).abs()
    lengths = torch.tensor([64, 0, 40, -3], dtype=torch.int32)
    ids = torch.arange(256).view(4, 64)
    kept = spk.select_tokens(state, ids, lengths, chunk_size=8, backend=backend, **budget, **guarded)
    for b in (0, 2):
        alone = slice(b, b + 1), slice(0, int(lengths[b]))
        expected = spk.select_chunks(kept.importance[alone], chunk_size=8, backend="reference", **budget, **guarded)
        count = int(expected.num_kept)
        assert kept.selection.num_kept[b] == count
        assert torch.equal(kept.selection.indices[b, :count], expected.indices[0, :count])
    assert kept.selection.num_kept[[1, 3]].tolist() == [0, 0]
    assert (kept.selection.indices[[1, 3]] == -1).all()
    assert (kept.importance[[1, 3]] == 0).all()
    counts = kept.selection.num_kept.tolist()
    assert kept.packed.cu_seqlens.tolist() == [0, counts[0], counts[0], counts[0] + counts[2], counts[0] + counts[2]]


@pytest.mark.parametrize("length", [1, 13, 30, 255, 961])
@pytest.mark.parametrize("state_rows", [1, ROWS])
@pytest.mark.parametrize("lse", [False, True])
def test_weights_that_are_not_finite_stay_inside_the_prompt(backend, lse, state_rows, length):
    """A kernel pools more positions than there are; what it has of the others is dropped, NaN too."""
    key = random(1, HEADS, length, DIM)
    key[0, 0, -1] = float("nan")
    before = torch.full((1, state_rows, length + 40), -7.5)
    before[:, :, :length] = 0
    state = spk.score_layer_(
        before.clone(),
        random(1, ROWS, HEADS, DIM),
        key,
        seq_lens=torch.tensor([length]),
        lse=torch.zeros(1, ROWS, HEADS) if lse else None,
        backend=backend,
    )
    assert state[:, :, length - 1].isnan().all()
    assert (state[:, :, length:] == -7.5).all()
