"""finalize_importance against the oracle."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from grid import on_backends, same
from layouts import place, restride
from properties import given, st
from scoring import Case, assert_close, draw

import specprefill_kernels as spk

pytestmark = on_backends("finalize_importance")


def a_state(seq_lens, rows, look_ahead, width, seed=0):
    """Random live entries of all magnitudes; NaN where nothing may be read."""
    random = torch.Generator().manual_seed(seed)
    state = torch.full((len(seq_lens), look_ahead, width), float("nan"))
    for b, length in enumerate(seq_lens):
        state[b, : rows[b], :length] = torch.rand(rows[b], length, generator=random) ** 8
    return state


def check(backend, state, seq_lens, rows, **options):
    """A state, in whatever strides it has, against the oracle."""
    lengths, valid = (torch.tensor(x, dtype=torch.int32, device=backend.device) for x in (seq_lens, rows))
    given = place(state, backend.device)
    actual = spk.finalize_importance(given, lengths, valid, backend=backend.name, **options).cpu()
    expected = oracle.finalize_importance(state.numpy(), seq_lens, rows, **options)
    assert actual.dtype == torch.float32
    assert actual.shape == (len(seq_lens), state.shape[2])
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-6, atol=1e-12)
    if options.get("reduce") == "max" and "pool_kernel_size" not in options:
        same(actual, torch.from_numpy(expected).float())
    same(given, state, "the state is an input")
    return actual


def compare(backend, seq_lens, rows, look_ahead, width, seed=0, strides="plain", **options):
    return check(
        backend, restride(a_state(seq_lens, rows, look_ahead, width, seed), strides), seq_lens, rows, **options
    )


SHAPES = [
    ((40, 17, 1), (5, 2, 1), 5, 40),
    ((1,), (1,), 1, 1),
    ((64, 64), (8, 8), 8, 64),
    ((129, 128, 127), (3, 16, 1), 16, 140),
    ((1500,), (8,), 8, 1500),
]


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(("seq_lens", "rows", "look_ahead", "width"), SHAPES, ids=str)
def test_reduces_each_sequence_own_rows(backend, seq_lens, rows, look_ahead, width, reduce):
    """Divided by its own number of rows, zero after its own end, nothing read beyond."""
    actual = compare(backend, seq_lens, rows, look_ahead, width, reduce=reduce)
    for b, length in enumerate(seq_lens):
        assert (actual[b, length:] == 0).all()


@pytest.mark.parametrize("edge", ["zero", "valid"])
@pytest.mark.parametrize("size", [1, 3, 13, 31, 301])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_pools_each_row_before_the_reduction(backend, reduce, size, edge):
    compare(backend, (60, 100, 5), (3, 1, 2), 3, 110, reduce=reduce, pool_kernel_size=size, pool_edge=edge)


@pytest.mark.parametrize("edge", ["zero", "valid"])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_pools_prompts_shorter_than_the_window(backend, width, edge):
    """Of one token too, whose window holds it alone: zeros around it count all the same."""
    compare(backend, (width, 1), (3, 2), 3, width, pool_kernel_size=13, pool_edge=edge)


@pytest.mark.parametrize("size", [None, 13, 301])
@pytest.mark.parametrize("length", [4090, 4095, 4096, 4097, 8199])
def test_lengths_around_tile_boundaries(backend, length, size):
    compare(backend, (length, 4096), (2, 1), 2, 8200, pool_kernel_size=size)


@pytest.mark.parametrize("strides", ["permuted", "gaps", "stepped"])
def test_strides(backend, strides):
    compare(backend, (60, 33), (3, 1), 3, 60, strides=strides)
    compare(backend, (60, 33), (3, 1), 3, 60, strides=strides, pool_kernel_size=13, reduce="max")


def test_lengths_and_rows_may_be_left_out(backend):
    state = a_state((30, 30), (4, 4), 4, 30).to(backend.device)
    full = torch.tensor([30, 30], device=backend.device)
    rows = torch.tensor([4, 4], device=backend.device)
    same(
        spk.finalize_importance(state, backend=backend.name),
        spk.finalize_importance(state, full, rows, backend=backend.name),
    )


@pytest.mark.parametrize("edge", ["zero", "valid"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_pooling_later_is_pooling_the_raw_maximum(backend, reduce, edge):
    """pool_order="after_max", end to end: raw weights, max over layers and heads, then pool, then reduce."""
    options = {"pool_order": "after_max", "pool_edge": edge}
    problems = [draw(Case(rows=(3, 2), options=options, seed=seed)) for seed in range(2)]
    problems[1].state = problems[0].run(backend)
    state = problems[1].run(backend)
    raw = np.maximum(problems[0].expected(), problems[1].expected())
    shape = {"reduce": reduce, "pool_kernel_size": 13, "pool_edge": edge}
    lengths, rows = (torch.tensor(x, device=backend.device) for x in ((45, 20), (3, 2)))
    actual = spk.finalize_importance(state.to(backend.device), lengths, rows, backend=backend.name, **shape)
    assert_close(actual.cpu().numpy(), oracle.finalize_importance(raw, (45, 20), (3, 2), **shape))


def test_the_mean_at_128k_keeps_its_digits(backend):
    """Mean weight 7.6e-6, as a long prompt has it: a prefix sum in fp32 would lose what the window holds."""
    length = 131072
    state = torch.full((1, 1, length), 1.0 / length)
    state[0, 0, ::1000] *= 3
    for edge in ("zero", "valid"):
        options = {"pool_kernel_size": 13, "pool_edge": edge}
        actual = spk.finalize_importance(state.to(backend.device), backend=backend.name, **options).cpu()
        window = torch.nn.functional.avg_pool1d(state.double(), 13, 1, padding=6, count_include_pad=edge == "zero")
        np.testing.assert_allclose(actual.numpy(), window[0].numpy(), rtol=2e-6)


@given(data=st.data())
def test_random_states(backend, data):
    batch, look_ahead = data.draw(st.integers(1, 4), "batch"), data.draw(st.integers(1, 16), "look_ahead")
    many = {"min_size": batch, "max_size": batch}
    seq_lens = data.draw(st.lists(st.integers(1, 300), **many), "seq_lens")
    rows = data.draw(st.lists(st.integers(1, look_ahead), **many), "rows")
    options = {"reduce": data.draw(st.sampled_from(["mean", "max"]), "reduce")}
    if data.draw(st.booleans(), "pool"):
        options["pool_kernel_size"] = 2 * data.draw(st.integers(0, 40), "radius") + 1
        options["pool_edge"] = data.draw(st.sampled_from(["zero", "valid"]), "edge")
    width = max(seq_lens) + data.draw(st.integers(0, 9), "wider")
    compare(backend, seq_lens, rows, look_ahead, width, seed=data.draw(st.integers(0, 99), "seed"), **options)


def test_every_second_token_of_an_aligned_state(backend):
    """Its addresses are those of whole words, but its neighbours do not belong to it."""
    state = torch.full((2, 4, 128), float("nan"))[..., ::2]
    check(backend, state.copy_(a_state((64, 64), (4, 4), 4, 64)), (64, 64), (4, 4))


@pytest.mark.parametrize("pool", [{}, {"pool_kernel_size": 3}], ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_rows_that_do_not_count_are_not_taken_for_zeros(backend, pool, step):
    """A zero would be the largest of a state that is all negative."""
    state = -torch.rand(2, 5, 128, generator=torch.Generator().manual_seed(0))[..., ::step]
    check(backend, state, (state.shape[2],) * 2, (1, 3), reduce="max", **pool)
