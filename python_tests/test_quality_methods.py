"""Baselines read exactly as many tokens as the selection, the forced ones among them, and the right ones otherwise."""

from __future__ import annotations

import pytest
import torch

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop.results import PromptSelection
from specprefill_kernels.quality.methods import BASELINES, baseline, forced_tokens, random_chunk


def mask(length: int, *spans: tuple[int, int]) -> torch.Tensor:
    out = torch.zeros(length, dtype=torch.bool)
    for start, end in spans:
        out[start:end] = True
    return out


def selection(length: int, kept: torch.Tensor, protected=()) -> PromptSelection:
    return PromptSelection(
        input_ids=torch.zeros(length, dtype=torch.int64), importance=None, kept_indices=kept.nonzero()[:, 0], spans=(),
        mode="sparse", reason="", seconds={}, backend="none", protected=tuple(protected),
    )  # fmt: skip


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("count", [13, 14, 40, 99, 100])
def test_every_baseline_reads_exactly_the_count_and_all_that_is_forced(method: str, count: int) -> None:
    forced = mask(100, (0, 5), (50, 52), (94, 100))
    read = baseline(method, forced, count, 16, "a")
    assert read.shape == (count,)
    assert bool((read.diff() > 0).all())
    assert bool(torch.isin(forced.nonzero()[:, 0], read).all())


def test_last_reads_the_end() -> None:
    assert baseline("last", mask(20, (18, 20)), 6, 4, "").tolist() == [14, 15, 16, 17, 18, 19]
    assert baseline("last", mask(20, (2, 4), (19, 20)), 6, 4, "").tolist() == [2, 3, 16, 17, 18, 19]
    assert baseline("last", mask(20, (2, 4)), 2, 4, "").tolist() == [2, 3]


def test_first_last_reads_half_of_what_is_free_at_each_end() -> None:
    assert baseline("first_last", mask(20, (18, 20)), 6, 4, "").tolist() == [0, 1, 16, 17, 18, 19]
    assert baseline("first_last", mask(20, (19, 20)), 6, 4, "").tolist() == [0, 1, 2, 17, 18, 19]
    assert baseline("first_last", mask(20, (0, 2)), 5, 4, "").tolist() == [0, 1, 2, 3, 19]


def test_random_reads_whole_chunks_but_for_one() -> None:
    forced = mask(103, (96, 103))  # the short last chunk
    read = set(baseline("random", forced, 7 + 3 * 16 + 5, 16, "seed").tolist())
    sizes = sorted(sum(position in read for position in range(c, min(c + 16, 96))) for c in range(0, 96, 16))
    assert sizes == [0, 0, 5, 16, 16, 16]
    # What is cut is the end of the last chunk drawn.
    part = next(c for c in range(0, 96, 16) if sum(p in read for p in range(c, c + 16)) == 5)
    assert all(part + i in read for i in range(5))


def test_random_completes_chunks_that_are_partly_forced() -> None:
    forced = mask(64, (4, 6), (60, 64))
    reads = [set(baseline("random", forced, 6 + 14, 16, str(seed)).tolist()) for seed in range(40)]
    assert any(set(range(16)) <= read for read in reads)


def test_random_draws_by_seed_and_all_over_the_prompt() -> None:
    forced = mask(320, (288, 320))
    draws = [tuple(baseline("random", forced, 96, 32, f"task/{seed}/0.3").tolist()) for seed in range(200)]
    assert draws[3] == tuple(baseline("random", forced, 96, 32, "task/3/0.3").tolist())
    counts = [sum(chunk * 32 in draw for draw in draws) for chunk in range(9)]
    # Two of nine chunks: 44 of 200 each, standard deviation 6.
    assert min(counts) > 20
    assert max(counts) < 70


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="count: expected between 5 forced tokens and 20"):
        baseline("last", mask(20, (0, 5)), 4, 4, "")
    with pytest.raises(ValueError, match="count: expected between 5 forced tokens and 20"):
        baseline("last", mask(20, (0, 5)), 21, 4, "")
    with pytest.raises(ValueError, match="method: expected one of"):
        baseline("middle", mask(20), 4, 4, "")


def test_forced_are_protected_sink_and_tail_and_nothing_that_importance_chose() -> None:
    config = SpecPrefillConfig(chunk_size=10, sink=3, tail=1)
    kept = mask(95, (0, 10), (30, 40), (52, 54), (80, 95))
    forced = forced_tokens(selection(95, kept, protected=[(52, 54)]), config)
    assert torch.equal(forced, mask(95, (0, 10), (52, 54), (90, 95)))


def test_without_protection_the_last_chunk_is_what_is_forced() -> None:
    kept = mask(96, (0, 32), (64, 96))
    forced = forced_tokens(selection(96, kept), SpecPrefillConfig(chunk_size=32))
    assert torch.equal(forced, mask(96, (64, 96)))


def test_forced_tokens_are_among_the_kept_even_where_the_selection_left_some_out() -> None:
    kept = mask(96, (0, 32), (90, 96))
    assert torch.equal(forced_tokens(selection(96, kept), SpecPrefillConfig(chunk_size=32)), mask(96, (90, 96)))


def test_random_chunks_are_no_smaller_than_the_papers() -> None:
    assert random_chunk(SpecPrefillConfig(chunk_size=8)) == 32
    assert random_chunk(SpecPrefillConfig(chunk_size=64)) == 64
