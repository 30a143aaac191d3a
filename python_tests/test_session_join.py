"""What a turn keeps of a cache: never more to compute than from scratch, and nothing that is wanted is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conversations import planned, positions
from loop_models import config

from specprefill_kernels.loop.held import join

T = 200


def peaks(*places):
    """Importance [T] with peaks, the first the highest."""
    importance = torch.full((T,), 0.001)
    for rank, place in enumerate(places):
        importance[place] = 1.0 / (1 + rank)
    return importance


def spans(joined):
    return joined.selection.spans


def test_an_empty_cache_gives_the_selection_itself():
    anew = planned(T, positions((16, 32), (190, T)))
    joined = join(anew, positions(), config())
    assert (joined.reused, joined.selection.reason, spans(joined)) == (0, "planned", ((16, 32), (190, T)))


def test_only_the_best_of_the_budget_brings_tokens_back():
    """Chunks at 64, 32, 96 and 128, best first; the cache has the two best. The new turn's is the best of all."""
    importance = peaks(195, 64, 32, 96, 128)
    anew = planned(T, positions((32, 48), (64, 80), (96, 112), (128, 144), (192, T)), importance=importance)
    held = positions((0, 16), (32, 48), (64, 80), (160, 170))

    def kept(share):
        return spans(join(anew, held, config(), bring_back=share))

    assert kept(0.5) == ((0, 16), (32, 48), (64, 80), (160, 170), (192, T))
    assert kept(0.74) == kept(0.5)
    assert kept(0.0) == kept(0.01) == kept(0.5)
    assert kept(0.75) == ((0, 16), (32, 48), (64, 80), (96, 112), (128, 144), (192, T))
    assert kept(1.0) == kept(0.75)


def test_one_chunk_at_least_comes_back():
    anew = planned(T, positions((32, 48), (64, 80), (192, T)), importance=peaks(195, 64, 32))
    held = positions((0, 16), (100, 120))
    assert spans(join(anew, held, config(), bring_back=0.01)) == ((0, 16), (64, 80), (192, T))


def test_a_protected_token_always_comes_back():
    anew = planned(T, positions((100, 101), (190, T)), importance=peaks(195), protected=((100, 101),))
    joined = join(anew, positions((0, 50), (120, 130)), config(), bring_back=0.0)
    assert spans(joined) == ((0, 50), (100, 101), (190, T))
    assert joined.reused == 50
    assert "from position 100 on" in joined.selection.reason


def test_without_importance_everything_comes_back():
    """A selection whose prompt a cache had seen only in part has none."""
    anew = planned(T, positions((16, 32), (190, T)))
    assert spans(join(anew, positions((0, 16), (40, 60)), config(), bring_back=0.0)) == ((0, 32), (190, T))


def test_a_dense_selection_keeps_everything():
    joined = join(planned(T, torch.arange(T)), positions((0, 50), (60, 90)), config(), bring_back=0.0, growth=1.0)
    assert (joined.selection.mode, spans(joined), joined.reused) == ("dense", ((0, T),), 50)


def test_a_cache_that_fills_the_gaps_makes_the_turn_dense():
    joined = join(planned(T, positions((150, T))), positions((0, 150)), config())
    assert (joined.selection.mode, joined.selection.kept_tokens, joined.reused) == ("dense", T, 150)


@pytest.mark.parametrize(("growth", "kept"), [(None, 110), (4.0, 80), (2.0, 40), (1.0, 20)])
def test_growth_limits_what_is_kept(growth, kept):
    """Twenty tokens from scratch, all at the end, and a hundred in the cache."""
    anew = planned(T, positions((180, T)))
    joined = join(anew, positions((0, 90)), config(), growth=growth)
    assert joined.selection.kept_tokens == kept
    assert joined.reused == kept - 20
    assert ("outgrown" in joined.selection.reason) == (growth is not None)


def test_short_prompts_may_keep_what_they_have():
    anew = planned(T, positions((180, T)))
    assert join(anew, positions((0, 90)), config(min_prompt_tokens=256), growth=1.0).reused == 90


def test_more_than_the_budget_is_reported():
    held = positions((0, 90))
    assert join(planned(T, positions((180, T))), held, config(keep_tokens=64)).selection.overflow
    assert not join(planned(T, positions((180, T))), held, config(keep_tokens=112)).selection.overflow


def test_exactly_the_budget_is_not_more_than_it():
    anew, settings = planned(T, positions((180, T))), config(keep_tokens=96)
    assert not join(anew, positions((0, 76)), settings).selection.overflow
    assert join(anew, positions((0, 77)), settings).selection.overflow


def test_a_selection_that_had_to_exceed_the_budget_still_says_so():
    anew = replace(planned(T, positions((180, T))), overflow=True)
    assert join(anew, positions((0, 10)), config(keep_tokens=96)).selection.overflow


@pytest.mark.parametrize("seed", range(30))
def test_no_turn_computes_more_than_a_run_from_scratch(seed):
    """Random caches and selections: the promises of the docstring, one by one."""
    random = torch.Generator().manual_seed(seed)
    importance = torch.rand(T, generator=random)
    chosen = (torch.rand(T // 8, generator=random) < 0.3).repeat_interleave(8)
    chosen[-1] = True
    held = (torch.rand(T - 20, generator=random) < 0.4).nonzero()[:, 0]
    anew = planned(T, chosen.nonzero()[:, 0], importance=importance, protected=((50, 53),) if chosen[50] else ())
    share, growth = float(torch.rand(1, generator=random)), 1.5
    joined = join(anew, held, config(chunk_size=8), bring_back=share, growth=growth)
    kept = set(joined.selection.kept_indices.tolist())
    fresh, cached = set(anew.kept_indices.tolist()), set(held.tolist())
    new = sorted(kept)[joined.reused :]
    assert set(sorted(kept)[: joined.reused]) <= cached
    assert len(new) <= len(fresh)
    assert len(kept) <= growth * len(fresh)
    first = new[0]
    assert {i for i in fresh if i >= first} <= kept
    assert {i for i in kept if i < first} <= cached
    # of what was chosen in front of the cache's end: protected tokens, and the best chunks of the rest, whole
    protected = {i for i in (50, 51, 52) if i in fresh}
    assert protected <= kept
    rest = sorted(i for i in fresh - protected if i <= held[-1])
    chunks = {}
    for i in rest:
        chunks.setdefault(i // 8, []).append(float(importance[i]))
    best, size = set(), 0
    for chunk in sorted(chunks, key=lambda c: -sum(chunks[c]) / len(chunks[c])):
        size += len(chunks[chunk])
        if best and size > share * len(rest):
            break
        best.add(chunk)
    assert {i for i in rest if i // 8 in best} <= kept
