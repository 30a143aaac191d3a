"""score_layer_ against the oracle: every option of the definition, its edges, and options that meet."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from grid import on_backends, same
from layouts import LAYOUTS, place, restride
from scoring import BF16, E4M3, FP32, Case, assert_close, check, draw

pytestmark = on_backends("score_layer")

QUERIES = ["look_ahead", "observation_window"]
SMALL = Case(seq_lens=(50, 23), rows=(4, 3), look_ahead=4, head_dim=16)


@pytest.mark.parametrize("edge", ["zero", "valid"])
@pytest.mark.parametrize("size", [1, 3, 13, 31, 99, 201])
@pytest.mark.parametrize("lengths", [(50, 23), (1, 2), (140, 64)], ids=str)
def test_pool_sizes_and_edges(backend, size, edge, lengths):
    """Sizes beyond the prompt too: the window then covers all of it."""
    options = {"pool_kernel_size": size, "pool_edge": edge}
    check(SMALL.but(options=options, seq_lens=lengths, rows=(4, 1)), backend)


@pytest.mark.parametrize("edge", ["zero", "valid"])
@pytest.mark.parametrize("queries", QUERIES)
def test_pooling_after_the_max_leaves_raw_weights_in_the_state(backend, queries, edge):
    check(SMALL.but(options={"pool_order": "after_max", "pool_edge": edge, "queries": queries}), backend)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap(backend, softcap, queries):
    check(SMALL.but(options={"softcap": softcap, "queries": queries}), backend)


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0, -0.2])
def test_scale(backend, scale):
    check(SMALL.but(options={"scale": scale}), backend)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_large_logits_do_not_overflow(backend, dtype):
    """Logits in the thousands: all weight on one key, and no NaN on the way."""
    check(SMALL.but(options={"scale": 100.0}, dtypes=(dtype, dtype)), backend)


@pytest.mark.parametrize("normalize_over", ["prompt", "visible"])
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("window", [1, 2, 3, 7, 22, 23, 24, 50, 51, 10_000])
def test_window(backend, window, queries, normalize_over):
    """Narrow windows leave look-ahead rows with no prompt key at all: those contribute nothing."""
    options = {"window": window, "queries": queries, "normalize_over": normalize_over, "pool_kernel_size": 3}
    check(SMALL.but(options=options), backend)


def test_a_row_that_sees_no_key_is_zero(backend):
    problem = draw(SMALL.but(options={"window": 1}))
    state = problem.run(backend)
    assert state[0, 0, :50].max() > 0
    assert (state[0, 1:, :50] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 6])
def test_normalize_over_visible_keys(backend, layout, window):
    """Look-ahead keys weigh in the sum and nowhere else; what lies after the last visible one is poison."""
    options = {"normalize_over": "visible", "window": window, "pool_kernel_size": 5}
    check(SMALL.but(layout=layout, options=options, spare=3, seq_lens=(50, 16), rows=(4, 2)), backend)


@pytest.mark.parametrize("normalize_over", ["prompt", "visible"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_observation_window(backend, layout, normalize_over):
    """Rows are the last prompt positions, each causal, and as few as num_look_ahead says."""
    options = {"queries": "observation_window", "normalize_over": normalize_over}
    check(SMALL.but(layout=layout, options=options, spare=2, seq_lens=(50, 4, 9), rows=(4, 4, 1)), backend)


def test_an_observation_window_as_long_as_the_prompt(backend):
    check(SMALL.but(seq_lens=(4, 1), rows=(4, 1), options={"queries": "observation_window"}), backend)


def test_packed_batch_reads_each_sequence_own_last_row(backend):
    """Lengths 5, 7, 3: the rows sit at 4, 6, 2 of their own sequence, 4, 11, 14 of the packed buffer."""
    options = {"queries": "observation_window", "pool_kernel_size": 1}
    check(Case(layout="packed", seq_lens=(5, 7, 3), rows=(1, 1, 1), look_ahead=1, options=options), backend)


@pytest.mark.parametrize("normalize_over", ["prompt", "visible"])
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_given_lse_equals_own(backend, queries, normalize_over, window, softcap):
    options = {"queries": queries, "normalize_over": normalize_over, "window": window, "softcap": softcap}
    check(SMALL.but(options=options, lse=True), backend)
    given = draw(SMALL.but(options=options, lse=True)).run(backend)
    own = draw(SMALL.but(options=options)).run(backend)
    assert_close(given.numpy(), own.double().numpy())


def test_a_given_lse_is_taken_as_it_is(backend):
    """An lse larger by log 2 halves the scores: there is no second normalisation."""
    problem = draw(SMALL.but(lse=True))
    live = problem.state == 0
    halved = problem.run(backend, lse=(problem.lse + math.log(2)).to(backend.device))
    assert_close(halved[live].numpy(), problem.run(backend)[live].double().numpy() / 2)


@pytest.mark.parametrize("strides", ["permuted", "gaps", "stepped"])
def test_lse_strides(backend, strides):
    problem = draw(SMALL.but(lse=True))
    same(problem.run(backend, lse=place(restride(problem.lse, strides), backend.device)), problem.run(backend))


@pytest.mark.parametrize("order", ["before_max", "after_max"])
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, E4M3)], ids=str)
def test_a_state_of_one_row_takes_the_max_over_rows(backend, dtypes, queries, order):
    """Equal to the largest of the rows that a full state would hold, bit for bit."""
    case = SMALL.but(dtypes=dtypes, options={"queries": queries, "pool_order": order})
    check(case.but(one_row=True), backend)
    rows = draw(case).run(backend)
    same(draw(case.but(one_row=True)).run(backend), rows.amax(1, keepdim=True), "max over rows")


CROSS = list(
    itertools.product(
        ["paged_hnd", "bthd"],
        QUERIES,
        ["prompt", "visible"],
        [None, 8],
        [None, 3.0],
        ["zero", "valid"],
    )
)


@pytest.mark.parametrize(("layout", "queries", "normalize_over", "window", "softcap", "edge"), CROSS)
def test_options_together(backend, layout, queries, normalize_over, window, softcap, edge):
    options = {
        "queries": queries,
        "normalize_over": normalize_over,
        "window": window,
        "softcap": softcap,
        "pool_edge": edge,
        "pool_kernel_size": 7,
    }
    check(SMALL.but(layout=layout, options=options, key_scale="per_head", dtypes=(BF16, BF16), spare=1), backend)


def test_state_keeps_the_larger_of_before_and_now(backend):
    problem = draw(SMALL)
    live = problem.state == 0
    before = torch.rand(problem.state.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    problem.state = torch.where(live, before, problem.state)
    state = problem.run(backend)
    assert_close(state.numpy(), problem.expected())
    kept = (state == problem.state) & live
    assert kept.any(), "the test wants some old scores to win"
    assert (live & ~kept).any(), "the test wants some new scores to win"
