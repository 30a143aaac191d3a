"""A conversation on warm caches: each turn equals a run from scratch with the same tokens and computes what is new."""

from __future__ import annotations

import pytest
import torch
from conversations import assert_as_from_scratch, counted, follow, plan_next, positions
from loop_models import PROMPT, build, config, ordinary, pipeline, prompt
from transformers import set_seed

from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.selection_cache import SelectionCache
from specprefill_kernels.loop.session import Session

FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gemma3")
FIRST = ((0, 20), (40, 61), (118, PROMPT))  # what turn 1 keeps in the planned tests
KEPT = len(positions(*FIRST))


def started(family="llama", **changes):
    """A session after a planned first turn of four tokens: (session, the second turn's prompt)."""
    sp = pipeline(family)
    session, ids = Session(sp, **{"growth": None, **changes}), prompt()
    plan_next(sp, *FIRST)
    return session, follow(ids, session.generate(ids, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_to_bring_back_only_the_new_turn_is_computed(family):
    session, ids = started(family)
    length = ids.shape[1]
    # the last of the four answer tokens was not fed yet
    for turn in range(2):
        plan_next(session.loop, (0, 20), (length - 10, length))
        with counted(session.loop.base) as calls:
            result = session.generate(ids, 4)
        new = 10
        assert calls == [new, 1, 1, 1]
        assert result.prefilled_tokens == new
        assert result.kept_tokens == KEPT + (3 + new) * (turn + 1)
        assert result.mode == "sparse"
        assert f"{result.kept_tokens - new} of them from the cache;" in result.reason
        ids = follow(ids, result)
        length = ids.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_three_turns_equal_runs_from_scratch(family):
    session, ids = started(family)
    for spans in [(0, 20)], [(10, 25), (70, 90), (100, 130)]:
        length = ids.shape[1]
        plan_next(session.loop, *spans, (length - 15, length))
        ids = follow(ids, assert_as_from_scratch(session, ids))


def test_what_comes_back_is_computed_with_all_that_follows_it():
    session, ids = started(bring_back=1.0)
    length = ids.shape[1]
    plan_next(session.loop, (0, 10), (70, 90), (120, 130), (length - 10, length))
    with counted(session.loop.base) as calls:
        result = assert_as_from_scratch(session, ids)
    # in front of position 70 what was cached; from there on what a run from scratch would keep
    expected = positions((0, 20), (40, 61), (70, 90), (120, 130), (length - 10, length))
    assert result.selection.kept_indices.tolist() == expected.tolist()
    assert calls[0] == result.prefilled_tokens == 20 + 10 + 10
    assert "from position 70 on" in result.reason
    assert result.spans == ((0, 20), (40, 61), (70, 90), (120, 130), (length - 10, length))


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_equals_that_of_a_run_from_scratch(family):
    sp, ids = pipeline(family), prompt()
    session = Session(sp)
    ids = follow(ids, session.generate(ids, 4))
    scratch = sp.select(ids)
    speculator = sp.selector._speculator.model
    with counted(speculator) as calls:
        result = session.generate(ids, 4)
    torch.testing.assert_close(result.selection.importance, scratch.importance, atol=1e-6, rtol=1e-4)
    assert result.selection.look_ahead_tokens == scratch.look_ahead_tokens
    assert result.selection.reused_tokens >= PROMPT - 1
    assert sum(calls) == ids.shape[1] - result.selection.reused_tokens + 7  # seven look-ahead tokens


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_real_selections_of_five_turns_equal_runs_from_scratch(family):
    session, ids = Session(pipeline(family, keep_tokens=64)), prompt()
    reused = 0
    for turn in range(5):
        result = assert_as_from_scratch(session, ids)
        scratch = session.loop.select(ids).kept_tokens
        assert result.prefilled_tokens <= scratch
        assert result.kept_tokens <= 2 * scratch
        reused += result.kept_tokens - result.prefilled_tokens
        ids = follow(ids, result, new=30, seed=turn)
    assert reused > 0


def test_the_answer_is_that_of_the_loop_alone_on_the_first_turn():
    sp, ids = pipeline(), prompt()
    alone, first = sp.generate(ids, 6), Session(sp).generate(ids, 6)
    assert (first.tokens, first.spans, first.reason) == (alone.tokens, alone.spans, alone.reason)
    assert first.prefilled_tokens == first.kept_tokens
    assert first.selection.reused_tokens == 0
    set_seed(0)
    sampled = sp.generate(ids, 6, do_sample=True, temperature=3.0)
    set_seed(0)
    assert Session(sp).generate(ids, 6, do_sample=True, temperature=3.0).tokens == sampled.tokens


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_dense_and_sparse_turns_follow_each_other(family):
    session, ids = Session(pipeline(family), growth=None), prompt()
    modes = []
    for spans in [(0, PROMPT)], [(0, 10)], [(0, None)], [(5, 10)]:
        length = ids.shape[1]
        plan_next(session.loop, *((start, end or length) for start, end in spans), (length - 10, length))
        result = assert_as_from_scratch(session, ids)
        modes.append((result.mode, result.kept_tokens == length, result.prefilled_tokens))
        ids = follow(ids, result)
    # All; ten new tokens behind that; from the gap on, which the second turn left, all; ten new tokens behind that.
    gap = 1 + 20 + 4 + 20
    assert modes == [("dense", True, PROMPT), ("sparse", False, 10), ("dense", True, gap), ("sparse", False, 10)]


def test_the_same_prompt_again_computes_its_last_token_alone():
    session, _ = started()
    plan_next(session.loop, *FIRST)
    with counted(session.loop.base) as calls:
        result = assert_as_from_scratch(session, prompt(), 3)
    assert calls[:3] == [1, 1, 1]
    assert result.prefilled_tokens == 1
    assert result.kept_tokens == KEPT


def test_a_shorter_prompt_cuts_the_cache_back():
    session, _ = started()
    plan_next(session.loop, (0, 20), (40, 50))
    result = assert_as_from_scratch(session, prompt()[:, :50])
    assert (result.kept_tokens, result.prefilled_tokens) == (30, 1)


def edited(ids, place):
    ids = ids.clone()
    ids[0, place] = 3 + (int(ids[0, place]) + 50) % 200
    return ids


@pytest.mark.parametrize(("place", "reused"), [(0, 0), (45, 25), (30, KEPT + 3)], ids=["start", "kept", "dropped"])
def test_an_edited_history_reuses_what_the_base_read_before_the_edit(place, reused):
    """A dropped token was never read, so editing one invalidates nothing."""
    session, ids = started()
    ids = edited(ids, place)
    plan_next(session.loop, *FIRST, (PROMPT, ids.shape[1]))
    result = assert_as_from_scratch(session, ids)
    assert result.kept_tokens - result.prefilled_tokens == reused


def test_an_edit_that_moves_everything_reuses_what_is_in_front_of_it():
    session, ids = started()
    ids = torch.cat([ids[:, :50], prompt(1, seed=9), ids[:, 50:]], dim=1)
    plan_next(session.loop, *FIRST, (PROMPT, ids.shape[1]))
    result = assert_as_from_scratch(session, ids)
    assert 30 <= result.kept_tokens - result.prefilled_tokens <= 32  # a token may be the same by chance


def test_a_completely_different_prompt_starts_over():
    session, _ = started()
    other = edited(prompt(80, seed=77), 0)
    other[0, 0] = 299 if int(prompt()[0, 0]) != 299 else 298
    plan_next(session.loop, (0, 40), (60, 80))
    result = assert_as_from_scratch(session, other)
    assert (result.prefilled_tokens, result.kept_tokens, result.reason) == (60, 60, "planned")


def test_one_token_and_eos_at_once():
    sp, ids = pipeline(), prompt()
    session = Session(sp)
    one = session.generate(ids, 1)
    assert len(one.tokens) == 1
    ids = follow(ids, one)
    result = assert_as_from_scratch(session, ids)
    at_once = session.generate(ids, 4, eos_token_id=result.tokens[0])
    assert at_once.tokens == result.tokens[:1]
    assert at_once.prefilled_tokens <= result.prefilled_tokens
    assert_as_from_scratch(session, follow(ids, at_once))


def test_kept_tokens_do_not_outgrow_the_budget_without_bound():
    session, ids = Session(pipeline(keep_tokens=32), growth=1.5), prompt()
    seen = []
    for turn in range(6):
        result = session.generate(ids, 12)  # answers alone would fill the budget in three turns
        assert result.kept_tokens <= 1.5 * session.loop.select(ids).kept_tokens
        assert result.selection.overflow == (result.kept_tokens > 32)
        seen.append(result.reason)
        ids = follow(ids, result, new=10, seed=turn)
    assert any("outgrown the budget" in reason for reason in seen)
    assert_as_from_scratch(session, ids)


def test_the_new_turn_gets_in_however_full_the_cache_is():
    session, ids = Session(pipeline(keep_tokens=32), growth=None), prompt()
    for turn in range(4):
        result = session.generate(ids, 20)
        ids = follow(ids, result, new=40, seed=turn)
    result = session.generate(ids, 1)
    anew = set(session.loop.select(ids).kept_indices.tolist())
    new = {position for position in anew if position >= ids.shape[1] - 40}
    assert new
    assert new <= set(result.selection.kept_indices.tolist())


def test_a_base_that_cannot_prefill_sparsely_runs_plainly_each_turn():
    base = build("llama")
    base._supports_attention_backend = False
    session, ids = Session(SpecPrefill(base, build("llama"), config())), prompt()
    for _ in range(2):
        result = session.generate(ids, 4)
        everything = torch.ones_like(ids)  # an answer may hold the id of padding
        assert list(result.tokens) == ordinary(base, ids, 4, do_sample=False, attention_mask=everything)
        assert (result.mode, result.prefilled_tokens) == ("dense", ids.shape[1])
        assert "unsupported base" in result.reason
        ids = follow(ids, result)


def test_without_a_speculator_that_can_be_scored_dense_turns_reuse_the_cache():
    speculator = build("llama", seed=3)
    speculator._supports_attention_backend = False
    session, ids = Session(SpecPrefill(build("llama", seed=7), speculator, config())), prompt()
    ids = follow(ids, session.generate(ids, 4))
    result = assert_as_from_scratch(session, ids)
    assert (result.mode, result.kept_tokens, result.prefilled_tokens) == ("dense", ids.shape[1], 21)
    assert "unsupported speculator" in result.reason


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_self_layers_score_with_a_cache_of_their_own(family):
    session, ids = Session(pipeline(family, self_layers=(1, 2))), prompt()
    for _ in range(3):
        result = assert_as_from_scratch(session, ids)
        torch.testing.assert_close(
            result.selection.importance, session.loop.select(ids).importance, atol=1e-6, rtol=1e-4
        )
        ids = follow(ids, result)
    assert result.selection.reused_tokens > 0


def test_wrong_arguments_are_named():
    sp = pipeline()
    for wrong in (-0.1, 1.5, True, "1", float("nan")):
        with pytest.raises(ValueError, match=r"^bring_back: "):
            Session(sp, bring_back=wrong)
    for wrong in (0.5, True, "2", float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^growth: "):
            Session(sp, growth=wrong)
    with pytest.raises(ValueError, match=r"^prompt: expected one conversation"):
        Session(sp).generate([[4, 5], [6, 7]])
    with pytest.raises(ValueError, match=r"^tokenizer: "):
        Session(sp).ask("hello")
    with pytest.raises(ValueError, match=r"^max_new_tokens: "):
        Session(sp).generate(prompt(), 0)


def test_a_session_uses_the_loops_selection_cache():
    sp = SpecPrefill(build("llama", seed=7), build("llama", seed=3), config(), selection_cache=SelectionCache())
    first, second, ids = Session(sp), Session(sp), prompt()
    result = first.generate(ids, 4)
    again = second.generate(ids, 4)
    assert (again.selection.cached, again.tokens, again.spans) == (True, result.tokens, result.spans)
    ids = follow(ids, again)
    assert not assert_as_from_scratch(second, ids).selection.cached
