"""Contents that CPU tensors are refused for and CUDA tensors are not read for: what lies beyond a buffer is absent.

Triton's interpreter and the emulation of CUDA stand in for a GPU here, with their checks of contents off;
test_gpu_bad_values.py asks a real one.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from bad_selections import GATHERS, WILD_COUNTS, gather_anything
from grid import EMULATED, INTERPRETED

import specprefill_kernels as spk

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or EMULATED), reason="needs TRITON_INTERPRET=1 or SPECPREFILL_EMULATION"
)

ROWS, HEADS, DIM = 4, 2, 16
NAN = float("nan")


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


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def selection_of(*positions: int) -> spk.Selection:
    """Of one sequence."""
    return spk.Selection(int32(positions), int32(len(positions)), torch.zeros(1, dtype=torch.bool))


def test_no_key_is_read_behind_an_empty_slot(backend):
    """The padding of a packed batch: no prompt, so no look-ahead keys behind it either."""
    buffer = torch.full((40, 1, DIM), NAN)
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
    key[0, 0, -1] = NAN
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


def test_a_packed_sequence_ends_with_its_buffer(backend):
    """Where cu_seqlens says more: no key lies there."""
    buffer = torch.full((60, 1, DIM), NAN)
    buffer[:20] = random(20, 1, DIM)
    query, key = random(1, ROWS, HEADS, DIM), buffer[:20]
    tables = {"layout": "packed", "cu_seqlens": int32(0, 40)}
    state = spk.score_layer_(spk.new_state(1, ROWS, 40), query, key, **tables, backend=backend)
    dense = key.movedim(0, 1)[None]
    expected = spk.score_layer_(spk.new_state(1, ROWS, 20), query, dense, backend="reference")
    torch.testing.assert_close(state[:, :, :20], expected, rtol=1e-4, atol=1e-7)
    assert (state[:, :, 20:] == 0).all()


def test_a_prompt_leaves_room_for_its_look_ahead_keys(backend):
    """A length that does not is as good as the largest that does."""
    buffer = torch.full((1, 1, 40, DIM), NAN)
    buffer[:, :, :24] = random(1, 1, 24, DIM)
    state, expected = (
        spk.score_layer_(
            spk.new_state(1, ROWS, 24),
            random(1, ROWS, HEADS, DIM),
            buffer[:, :, :24],
            seq_lens=int32(length),
            normalize_over="visible",
            backend=name,
        )
        for name, length in ((backend, 24), ("reference", 25 - ROWS))
    )
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-7)


def test_layers_may_differ_in_the_blocks_of_their_caches(backend):
    """A block that one layer's cache has is not there in another's."""
    query, keys = random(1, ROWS, HEADS, DIM), torch.full((12, 8, 1, DIM), NAN)
    keys[:4] = random(4, 8, 1, DIM)
    caches = [random(12, 8, 1, DIM), keys[:4]]
    given = {"layout": "paged_nhd", "block_table": int32([0, 7, 2]), "seq_lens": int32(24), "backend": backend}
    state, expected = spk.new_state(1, ROWS, 24), spk.new_state(1, ROWS, 24)
    spk.score_layers_(state, [query] * 2, caches, **given)
    for cache in caches:
        spk.score_layer_(expected, query, cache, **given)
    assert torch.equal(state, expected)
    assert state.isfinite().all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_nan_of_either_sign_stays_in_the_state(backend, sign):
    if backend == "triton" and sign < 0:
        # Its kernel takes the maximum of the bits as signed integers: any score is above a NaN with a sign.
        pytest.skip("Triton's kernel loses a NaN with a sign")
    state = spk.new_state(1, ROWS, 30)
    state[0, 1, 3] = torch.tensor(NAN).copysign(torch.tensor(sign))
    spk.score_layer_(state, random(1, ROWS, HEADS, DIM), random(1, HEADS, 30, DIM), backend=backend)
    assert state.isnan().nonzero().tolist() == [[0, 1, 3]]


def test_one_row_counts_at_least(backend):
    state = random(2, ROWS, 64).abs()
    importance = spk.finalize_importance(state, None, int32(0, -3), backend=backend)
    assert torch.equal(importance, state[:, 0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_ranks_above_everything(backend, sign):
    """As in torch.topk: what is not a number is kept, so that it is seen."""
    importance = random(2, 1000).abs() * 1e30
    importance[0, 707] = torch.tensor(NAN).copysign(torch.tensor(sign))
    importance[1, 3] = float("inf")
    selection = spk.select_chunks(importance, keep_tokens=10, chunk_size=10, backend=backend)
    assert selection.spans(0) == [(700, 710)]
    assert selection.spans(1) == [(0, 10)]


@pytest.mark.parametrize("budget", [{"keep_tokens": 10}, {"keep_ratio": 0.1}], ids=str)
def test_nan_is_not_protected(backend, budget):
    """It ranks above all numbers, but pays like them: the first of it, and no overflow."""
    importance = random(1, 100).abs()
    importance[0, 30:60] = NAN
    selection = spk.select_chunks(importance, chunk_size=10, backend=backend, **budget)
    assert selection.spans(0) == [(30, 40)]
    assert not selection.overflow.any()


@pytest.mark.parametrize("name", GATHERS)
@pytest.mark.parametrize("kept", WILD_COUNTS, ids=str)
def test_any_selection(backend, name, kept):
    assert all(guard() for guard in gather_anything(name, kept, backend))


@pytest.mark.parametrize("last", [12, 20, 10**6])
@pytest.mark.parametrize("layout", ["bhtd", "packed", "paged_nhd"])
def test_tokens_behind_a_cache_are_zeros(backend, layout, last):
    shape, part, tables = {
        "bhtd": ((1, 2, 20, 16), (..., slice(12), slice(None)), {}),
        "packed": ((20, 2, 16), slice(12), {"cu_seqlens": int32(0, 20)}),
        "paged_nhd": ((5, 4, 2, 16), slice(3), {"block_table": int32([0, 1, 2, 3])}),
    }[layout]
    cache = torch.full(shape, NAN)[part]
    cache.copy_(random(*cache.shape))
    new, _ = spk.gather_kv(cache, cache, selection_of(3, last), layout=layout, backend=backend, **tables)
    token = new[0, :, 1] if layout == "bhtd" else new.view(-1, 2, 16)[1]
    assert (token == 0).all()


def test_a_cache_ends_where_its_block_table_does(backend):
    """What the table's memory holds behind it are no blocks."""
    cache = random(3, 4, 2, 16)
    table = int32([0, 1, 2, 1, 0, 0])[:, :3]
    new, _ = spk.gather_kv(cache, cache, selection_of(3, 12), layout="paged_nhd", block_table=table, backend=backend)
    assert torch.equal(new.view(-1, 2, 16)[0], cache[0, 3])
    assert (new.view(-1, 2, 16)[1] == 0).all()


def test_a_packed_sequence_that_starts_before_its_cache_is_not_there(backend):
    cache = random(20, 2, 16)[8:]
    given = {"layout": "packed", "cu_seqlens": int32(-4, 12), "backend": backend}
    new, _ = spk.gather_kv(cache, cache, selection_of(2, 6), **given)
    assert (new == 0).all()


def test_slots_of_a_block_that_is_not_there_are_not_written(backend):
    cache, out = random(3, 4, 2, 16), torch.full((3, 4, 2, 16), 7.0)
    tables = {"layout": "paged_nhd", "block_table": int32([0, 1, 2]), "out_block_table": int32([1, 99])}
    spk.gather_kv(cache, cache, selection_of(0, 1, 2, 3, 4), out=(out, out.clone()), **tables, backend=backend)
    assert torch.equal(out[1], cache[0])
    assert (out[[0, 2]] == 7).all()


@pytest.mark.parametrize("last", [12, 20, 10**6])
@pytest.mark.parametrize("start", [None, 0, -4])
def test_tokens_behind_x_are_zeros(backend, start, last):
    """Of a dense x, of a packed one, and all of a sequence that starts before it."""
    buffer = torch.full((44,), 99)
    x = buffer[20:32].copy_(torch.arange(12))
    given = {"x": x[None]} if start is None else {"x": x, "cu_seqlens": int32(start, 20)}
    packed = spk.gather_tokens(selection=selection_of(3, last), backend=backend, **given)
    assert packed.values.tolist() == ([0, 0] if start == -4 else [3, 0])
