"""select_chunks against the oracle: the indices exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from grid import on_backends, same
from layouts import place, restride
from properties import given, st
from selecting import compare, select

pytestmark = on_backends("select_chunks")


def ramp(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) ** 4


@pytest.mark.parametrize("rounding", ["ceil", "floor"])
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.2}, {"keep_ratio": 1.0}, {"keep_tokens": 100}, {"keep_mass": 0.5}])
@pytest.mark.parametrize("seq_lens", [None, (300, 299, 1), (32, 33, 31), (288, 64, 65)], ids=str)
def test_budgets(backend, budget, seq_lens, rounding):
    compare(backend, ramp(3, 300), seq_lens, rounding=rounding, **budget)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 32, 64, 299, 300, 1000])
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.3}, {"keep_tokens": 70}, {"keep_mass": 0.7}])
def test_chunk_sizes(backend, budget, chunk_size):
    """Sizes that do not divide the length, single tokens, and chunks longer than the prompt."""
    compare(backend, ramp(2, 300), (300, 123), chunk_size=chunk_size, **budget)


RATIOS = [
    # ratio, chunks, kept with ceil, kept with floor: the decimal that was written counts, not its binary neighbour
    (0.7, 10, 7, 7),
    (0.1, 30, 3, 3),
    (0.3, 10, 3, 3),
    (0.29, 100, 29, 29),
    (0.55, 100, 55, 55),
    (0.07, 100, 7, 7),
    (1 / 3, 3, 1, 1),
    (2 / 3, 3, 2, 2),
    (0.2, 7, 2, 1),
    (0.01, 7, 1, 1),
    (0.999, 7, 7, 6),
    (1.0, 7, 7, 7),
    (1e-12, 7, 1, 1),
]


@pytest.mark.parametrize(("ratio", "chunks", "up", "down"), RATIOS)
def test_a_ratio_is_read_as_the_decimal_it_was_written_as(backend, ratio, chunks, up, down):
    importance = ramp(1, chunks * 4)
    for rounding, wanted in (("ceil", up), ("floor", down)):
        selection = compare(backend, importance, keep_ratio=ratio, chunk_size=4, rounding=rounding)
        assert int(selection.num_kept[0]) == wanted * 4


@pytest.mark.parametrize(("tokens", "up", "down"), [(1, 1, 1), (31, 1, 1), (32, 1, 1), (33, 2, 1), (10**9, 10, 10)])
def test_keep_tokens_counts_whole_chunks(backend, tokens, up, down):
    for rounding, wanted in (("ceil", up), ("floor", down)):
        selection = compare(backend, ramp(1, 320), keep_tokens=tokens, rounding=rounding)
        assert int(selection.num_kept[0]) == wanted * 32


def test_ties_go_to_the_lower_index(backend):
    selection = compare(backend, torch.ones(1, 320), keep_ratio=0.3)
    assert selection.spans(0) == [(0, 96)]
    compare(backend, torch.ones(2, 300), (300, 97), keep_mass=0.4)
    compare(backend, torch.zeros(2, 300), (300, 97), keep_ratio=0.5)


def test_many_ties_among_two_values(backend):
    importance = (ramp(4, 2000, seed=3) > 0.3).float().view(4, 200, 10).amax(2).repeat_interleave(10, 1)
    compare(backend, importance, keep_ratio=0.41, chunk_size=10)


def test_the_rank_is_compared_in_fp32(backend):
    """Two means that differ only beyond fp32 are a tie, and the lower index wins."""
    importance = torch.ones(1, 8)
    importance[0, 7] += 2.0**-23  # mean of the second chunk: 1 + 2^-25, which is 1 in fp32
    assert compare(backend, importance, keep_ratio=0.5, chunk_size=4).spans(0) == [(0, 4)]


def test_the_mean_is_summed_in_fp64(backend):
    """Two large values cancel; in fp32, where steps at 1e8 are 8 wide, they would swallow the small ones between."""
    importance = torch.zeros(1, 64)
    importance[0, :32] = torch.tensor([1e8, *[0.3] * 30, -1e8])
    importance[0, 32] = 8.9
    assert compare(backend, importance, keep_tokens=32).spans(0) == [(0, 32)]


def test_the_short_last_chunk_is_averaged_over_its_own_length(backend):
    importance = torch.full((1, 33), 0.5)
    importance[0, 32] = 0.6
    assert compare(backend, importance, keep_tokens=1).spans(0) == [(32, 33)]
    # ... but ranked by its sum where a mass is asked for
    assert compare(backend, importance, keep_mass=0.5).spans(0) == [(0, 32)]


def test_negative_importance_and_zero_signs(backend):
    importance = ramp(2, 160) - 0.5
    importance[1] = -0.0
    compare(backend, importance, keep_ratio=0.3)


@pytest.mark.parametrize("mass", [1e-9, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0])
def test_keep_mass_keeps_the_fewest_chunks_that_hold_it(backend, mass):
    selection = compare(backend, ramp(2, 640), (640, 333), keep_mass=mass)
    assert not selection.overflow.any()


def test_keep_mass_of_a_known_content(backend):
    importance = torch.zeros(1, 40)
    importance[0, ::10] = torch.tensor([0.125, 0.5, 0.25, 0.125])
    for mass, spans in [(0.5, [(10, 20)]), (0.75, [(10, 30)]), (0.76, [(0, 30)]), (1.0, [(0, 40)])]:
        assert compare(backend, importance, keep_mass=mass, chunk_size=10).spans(0) == spans
    selection = select(backend, torch.zeros(1, 40), keep_mass=1.0, chunk_size=10)
    assert selection.spans(0) == [(0, 10)], "a total of zero keeps one chunk"


def a_mask(batch: int, length: int, positions) -> torch.Tensor:
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[:, list(positions)] = True
    return mask


BUDGETS = [{"keep_ratio": 0.3}, {"keep_tokens": 64}, {"keep_mass": 0.4}]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "positions", [[], [0], [0, 299], [150], [31, 32], range(0, 300, 32), range(60, 200), range(300)], ids=str
)
def test_protected_tokens_keep_their_chunk_and_pay_first(backend, budget, positions):
    compare(backend, ramp(3, 300), (300, 200, 31), protect=a_mask(3, 300, positions), **budget)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("sink", "tail"), [(1, 0), (0, 1), (32, 33), (33, 32), (4, 64), (1000, 0), (0, 1000), (150, 150), (1, 34)]
)
@pytest.mark.parametrize("rounding", ["ceil", "floor"])
def test_sink_and_tail(backend, budget, sink, tail, rounding):
    """The tail is the last tokens of each sequence's own length."""
    compare(backend, ramp(4, 300), (300, 257, 64, 3), sink=sink, tail=tail, rounding=rounding, **budget)


def test_overflow_keeps_all_protected_chunks_and_nothing_else(backend):
    protect = a_mask(2, 320, [5, 100, 200])
    protect[1] = False
    selection = compare(backend, ramp(2, 320), protect=protect, keep_tokens=64)
    assert selection.overflow.tolist() == [True, False]
    assert selection.spans(0) == [(0, 32), (96, 128), (192, 224)]


def test_protection_that_fills_the_budget_exactly_is_no_overflow(backend):
    selection = compare(backend, ramp(1, 320), sink=1, tail=1, keep_tokens=64)
    assert not selection.overflow.any()
    assert selection.spans(0) == [(0, 32), (288, 320)]


def test_all_protections_together(backend):
    compare(backend, ramp(2, 300), (300, 190), protect=a_mask(2, 300, [100]), sink=3, tail=40, keep_ratio=0.6)


def test_the_width_does_not_depend_on_content(backend):
    """Output shapes are known from shapes and options: lengths, importance and masks do not change them."""
    for options in ({"keep_ratio": 0.4}, {"keep_ratio": 0.1, "sink": 40, "tail": 70}, {"keep_mass": 0.2}):
        widths = {
            select(backend, ramp(1, 300, seed=seed), [length], **options).indices.shape[1]
            for seed, length in enumerate((300, 290, 33, 1))
        }
        assert len(widths) == 1


@pytest.mark.parametrize("strides", ["permuted", "gaps", "stepped"])
def test_strides(backend, strides):
    importance, protect = ramp(3, 200), a_mask(3, 200, [77])
    kept = select(backend, importance, [200, 64, 31], protect=protect, keep_ratio=0.4)
    strided = (place(restride(x, strides), backend.device) for x in (importance, protect))
    again = select(backend, next(strided), [200, 64, 31], protect=next(strided), keep_ratio=0.4)
    for left, right in zip(kept, again, strict=True):
        same(left, right)


def test_a_long_prompt(backend):
    compare(backend, ramp(1, 131072), keep_ratio=0.1)
    compare(backend, ramp(1, 131071), keep_mass=0.3, chunk_size=7)


@pytest.mark.parametrize("max_len", [300, 301, 1000])
def test_spans_and_mask_say_what_is_kept(backend, max_len):
    importance = ramp(3, 300)
    selection = select(backend, importance, [300, 100, 17], keep_ratio=0.4, chunk_size=16)
    mask = selection.mask(max_len)
    assert mask.shape == (3, max_len)
    assert mask.dtype == torch.bool
    for b in range(3):
        kept = selection.indices[b, : int(selection.num_kept[b])].tolist()
        assert mask[b].nonzero()[:, 0].tolist() == kept
        spans = selection.spans(b)
        assert [t for start, end in spans for t in range(start, end)] == kept
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans)), "touching: not merged"


@given(data=st.data())
def test_random_selections(backend, data):
    """Importance is drawn from few values, so that ties are common."""
    batch, width = data.draw(st.integers(1, 4), "batch"), data.draw(st.integers(1, 200), "width")
    random = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    values = data.draw(st.sampled_from([2, 5, 1000]), "values")
    importance = torch.from_numpy(random.integers(0, values, (batch, width)).astype(np.float32)) / values
    seq_lens = data.draw(st.lists(st.integers(1, width), min_size=batch, max_size=batch), "seq_lens")
    budget = data.draw(
        st.one_of(
            st.floats(0.001, 1).map(lambda ratio: {"keep_ratio": ratio}),
            st.integers(1, 300).map(lambda tokens: {"keep_tokens": tokens}),
            st.floats(0.001, 1).map(lambda mass: {"keep_mass": mass}),
        ),
        "budget",
    )
    protect = None
    if data.draw(st.booleans(), "protect"):
        protect = torch.from_numpy(random.random((batch, width)) < 0.03)
    compare(
        backend,
        importance,
        seq_lens,
        protect=protect,
        chunk_size=data.draw(st.integers(1, 50), "chunk_size"),
        rounding=data.draw(st.sampled_from(["ceil", "floor"]), "rounding"),
        sink=data.draw(st.sampled_from([0, 0, 1, 20]), "sink"),
        tail=data.draw(st.sampled_from([0, 0, 1, 20]), "tail"),
        **budget,
    )


def test_a_mean_that_rounds_to_minus_zero_ties_with_zero(backend):
    importance = torch.zeros(1, 8)
    importance[0, 0] = -(2.0**-149)  # a quarter of it is beyond fp32
    assert compare(backend, importance, keep_tokens=4, chunk_size=4).spans(0) == [(0, 4)]


def test_a_chunk_longer_than_a_program_sums(backend):
    size = 70_000
    importance = torch.zeros(1, 3 * size - 5)
    importance[0, :10], importance[0, 2 * size - 10 : 2 * size] = 5, 1
    assert compare(backend, importance, keep_tokens=size, chunk_size=size).spans(0) == [(0, size)]
    protect = a_mask(1, 3 * size - 5, [2 * size])
    assert compare(backend, importance, keep_tokens=size, chunk_size=size, protect=protect).spans(0) == [
        (2 * size, 3 * size - 5)
    ]


@pytest.mark.parametrize("rounding", ["ceil", "floor"])
def test_more_chunks_than_a_program_holds(backend, rounding):
    compare(backend, ramp(2, 140_000), (140_000, 40_001), keep_ratio=0.71, chunk_size=1, rounding=rounding)
    compare(backend, (ramp(1, 70_000) * 3).round(), keep_ratio=0.41, chunk_size=1, rounding=rounding)


def test_a_mass_of_many_chunks(backend):
    compare(backend, torch.ones(2, 9000), (9000, 5100), keep_mass=0.6, chunk_size=1)
    compare(backend, torch.linspace(1, 0.01, 9000)[None], keep_mass=0.3, chunk_size=1)


@pytest.mark.parametrize(("ratio", "chunks", "kept"), [(1 / 3, 6, 2), (1 / 7, 35, 5)])
def test_floor_of_a_ratio_just_below_a_whole_number(backend, ratio, chunks, kept):
    selection = compare(backend, ramp(1, chunks * 4), keep_ratio=ratio, chunk_size=4, rounding="floor")
    assert int(selection.num_kept[0]) == kept * 4


@pytest.mark.parametrize(("mass", "kept"), [(0.07, 7), (0.14, 14), (0.55, 55), (0.68, 68)])
def test_a_mass_that_rounding_carries_beyond_the_sum(backend, mass, kept):
    """The product of fraction and total, in fp64, is above the sum of the chunks that hold it."""
    selection = compare(backend, torch.full((1, 100), 0.1), keep_mass=mass, chunk_size=1)
    assert selection.num_kept.tolist() == [kept]


def test_what_lies_behind_the_end_of_a_long_chunk_protects_nothing(backend):
    importance = ramp(2, 9000)
    importance[:, 6000:] *= 0.01
    protect = torch.zeros(2, 9000, dtype=torch.bool)
    compare(backend, importance, (7000, 3001), protect=protect, chunk_size=3000, keep_tokens=3000)
