"""A selection that is known already runs no speculator, and is never another prompt's."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conversations import counted
from loop_models import PROMPT, build, byte_tokenizer, config, prompt

from specprefill_kernels.loop import Session, SpecPrefill
from specprefill_kernels.loop import selection_cache as module
from specprefill_kernels.loop.costs import CostModel, PrefillCost, identity_of
from specprefill_kernels.loop.selection_cache import SelectionCache

BASE, SPECULATOR = build("llama", seed=7), build("llama", seed=3)


def loop(cache, *, base=BASE, speculator=SPECULATOR, tokenizer=None, speculator_tokenizer=None, **changes):
    return SpecPrefill(
        base,
        speculator,
        config(**changes),
        tokenizer=tokenizer,
        speculator_tokenizer=speculator_tokenizer,
        selection_cache=cache,
    )


def tallies(cache):
    return cache.hits, cache.suffix_hits, cache.misses


def same(a, b):
    assert a.spans == b.spans
    assert torch.equal(a.kept_indices, b.kept_indices)
    assert torch.equal(a.importance, b.importance)
    assert (a.mode, a.reason, a.overflow, a.look_ahead_tokens) == (b.mode, b.reason, b.overflow, b.look_ahead_tokens)
    assert torch.equal(a.input_ids, b.input_ids)


def test_the_same_prompt_again_runs_no_speculator():
    cache = SelectionCache()
    sp, ids = loop(cache), prompt()
    with counted(SPECULATOR) as calls:
        first = sp.select(ids)
        assert calls == [PROMPT] + [1] * 7
        again = sp.select(ids)
    assert len(calls) == 8
    same(first, again)
    assert (first.cached, again.cached, tallies(cache)) == (False, True, (1, 0, 1))
    assert set(again.seconds) == {"tokenize", "select"}
    assert again.kept_indices.dtype == torch.int64


def test_generate_and_stream_use_it():
    cache = SelectionCache()
    sp, ids = loop(cache), prompt()
    first, again = sp.generate(ids, 5), sp.generate(ids, 5)
    stream = sp.stream(ids, 5)
    assert list(stream) == list(first.tokens) == list(again.tokens)
    assert stream.result.selection.cached
    assert "speculator_prefill" not in again.seconds
    assert tallies(cache) == (2, 0, 1)


@pytest.mark.parametrize(
    "changes",
    [{"keep_ratio": 0.5}, {"look_ahead": 4}, {"pool_kernel_size": 5}, {"score_layers": (1,)}, {"tail": 20}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_configuration_is_another_entry(changes):
    cache = SelectionCache()
    loop(cache).select(prompt())
    other = loop(cache, **changes).select(prompt())
    assert not other.cached
    same(other, loop(None, **changes).select(prompt()))
    assert loop(cache, **changes).select(prompt()).cached


def test_other_protection_is_another_entry():
    cache = SelectionCache()
    sp = loop(cache)
    for protect in (None, [(30, 40)], [(30, 41)], [(31, 40)]):
        assert not sp.select(prompt(), protect=protect).cached
    again = sp.select(prompt(), protect=[(30, 35), (35, 40)])  # the same tokens
    assert again.cached
    assert set(range(30, 40)) <= set(again.kept_indices.tolist())
    assert len(cache) == 4


def test_tokens_protected_for_another_reason_are_another_entry():
    """Else a result would name parts of a chat template in a prompt that has none."""
    tokenizer = byte_tokenizer()
    sp = loop(SelectionCache(), tokenizer=tokenizer, turn_end_tokens=8)
    chat = sp.select([{"role": "user", "content": "The quick brown fox. " * 10}])
    assert set(chat.protected_parts) == {"markers", "turn end"}
    ids = sp.select(chat.input_ids.tolist(), protect=list(chat.protected))
    assert ids.protected == chat.protected
    assert set(ids.protected_parts) == {"user"}
    assert "(user " in ids.reason


def test_one_token_more_or_another_one_is_another_prompt():
    cache = SelectionCache()
    sp, ids = loop(cache), prompt()
    sp.select(ids)
    changed = ids.clone()
    changed[0, 70] += 1
    for other in (ids[:, :-1], torch.cat([ids, ids[:, :1]], dim=1), changed):
        assert not sp.select(other).cached
    assert tallies(cache) == (0, 0, 4)


def test_equal_hashes_do_not_give_a_wrong_selection(monkeypatch):
    monkeypatch.setattr(module._Key, "__hash__", lambda _: 7)
    cache = SelectionCache()
    sp = loop(cache)
    prompts = [prompt(seed=seed) for seed in (1, 2, 3)]
    for ids in prompts + prompts:
        same(sp.select(ids), loop(None).select(ids))
    assert tallies(cache) == (3, 0, 3)


def test_loops_of_one_speculator_share_and_others_do_not():
    cache = SelectionCache()
    first = loop(cache).select(prompt())
    shared = loop(cache, base=build("qwen3", seed=9)).select(prompt())
    assert shared.cached
    same(first, shared)
    twin = build("llama", seed=3)  # equal weights, but another model: nobody compares weights
    assert not loop(cache, speculator=twin).select(prompt()).cached


def test_layers_of_the_base_itself_are_part_of_who_scores():
    cache = SelectionCache()

    def select(self_layers):
        return SpecPrefill(BASE, None, config(), self_layers=self_layers, selection_cache=cache).select(prompt())

    assert not select((0, 1)).cached
    assert not select((1, 2)).cached
    assert select((0, 1)).cached


def test_a_base_that_cannot_skip_tokens_never_gets_a_sparse_selection():
    cache = SelectionCache()
    loop(cache).select(prompt())
    plain = build("llama", seed=7)
    plain._supports_attention_backend = False
    assert loop(cache, base=plain).select(prompt()).mode == "dense"


def test_other_tokenizers_are_part_of_it():
    text = "the quick brown fox jumps over the lazy dog, " * 4
    cache, own = SelectionCache(), byte_tokenizer()
    for merges, cached in [((), False), ((("t", "h"),), False), ((("t", "h"),), False)]:
        sp = loop(cache, tokenizer=own, speculator_tokenizer=byte_tokenizer(merges))
        assert sp.select(text).cached is cached
        assert sp.select(text).cached
    # With the base's own tokens (no merges) the text does not matter, with others it does.
    plain = loop(cache, tokenizer=own)
    assert plain.select(own(text)["input_ids"]).cached
    assert not sp.select(own(text)["input_ids"]).cached


def test_the_least_recently_used_entry_goes_first():
    cache = SelectionCache(entries=2)
    sp = loop(cache)
    a, b, c = (prompt(seed=seed) for seed in (1, 2, 3))
    sp.select(a), sp.select(b), sp.select(a), sp.select(c)
    assert len(cache) == 2
    assert sp.select(a).cached
    assert sp.select(c).cached
    assert not sp.select(b).cached
    cache.clear()
    assert len(cache) == 0
    assert not sp.select(b).cached


def test_a_start_that_is_used_for_a_longer_prompt_is_used():
    cache = SelectionCache(entries=2, suffix_tokens=10)
    sp, first, second, third = loop(cache), *(prompt(seed=seed) for seed in (1, 2, 3))
    for ids in (first, second):
        sp.select(ids)
    assert sp.select(torch.cat([first, prompt(5, seed=9)], dim=1)).cached
    sp.select(third)
    assert sp.select(first).cached
    assert not sp.select(second).cached


def test_a_known_selection_reused_no_speculator_tokens():
    cache = SelectionCache()
    sp, ids = loop(cache), prompt()
    session = Session(sp)
    session.generate(ids[:, :100], 1)
    assert session.generate(ids, 1).selection.reused_tokens == 100
    again = sp.select(ids)
    assert (again.cached, again.reused_tokens) == (True, 0)


def test_loops_of_other_costs_do_not_share():
    cache, settings = SelectionCache(), config()
    identity = identity_of(BASE, SPECULATOR, settings)
    each = [CostModel(PrefillCost(per_token=s), PrefillCost(per_token=1e-5), identity=identity) for s in (1.0, 2.0)]
    for costs in (None, *each):
        sp = SpecPrefill(BASE, SPECULATOR, settings, costs=costs, selection_cache=cache)
        prediction = sp.select(prompt()).prediction
        assert (prediction is None) == (costs is None)
        assert costs is None or prediction.full == PROMPT * costs.base.per_token
    assert tallies(cache) == (0, 0, 3)


def test_what_a_caller_does_to_a_result_does_not_reach_the_cache():
    cache = SelectionCache()
    sp = loop(cache)
    right = loop(None).select(prompt())
    for _ in range(3):
        selection = sp.select(prompt())
        same(selection, right)
        selection.importance.zero_()
        selection.kept_indices.zero_()


def test_prompts_that_run_dense_unscored_are_not_stored():
    cache = SelectionCache()
    sp = loop(cache, min_prompt_tokens=1000)
    assert [sp.select(prompt()).cached for _ in range(2)] == [False, False]
    assert (len(cache), tallies(cache)) == (0, (0, 0, 0))
    all_kept = loop(cache, keep_ratio=None, keep_mass=1.0)
    assert [(s.mode, s.cached) for s in (all_kept.select(prompt()) for _ in range(2))] == [
        ("dense", False),
        ("dense", True),
    ]


def test_a_model_is_not_kept_alive_and_its_successor_is_another():
    cache = SelectionCache()
    speculator = build("llama", seed=11)
    gone = weakref.ref(speculator)
    loop(cache, speculator=speculator).select(prompt())
    del speculator
    gc.collect()
    assert gone() is None
    assert len(cache) == 1
    assert not loop(cache, speculator=build("llama", seed=12)).select(prompt()).cached


def test_a_failed_selection_stores_nothing():
    cache = SelectionCache()
    sp = loop(cache)

    def fail(*_):
        raise RuntimeError("broken")

    with SPECULATOR.model.layers[1].register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="broken"):
        sp.select(prompt())
    assert len(cache) == 0
    assert not sp.select(prompt()).cached


def more(ids, count, seed=8):
    return torch.cat([ids, prompt(count, seed=seed)], dim=1)


def test_a_longer_prompt_uses_its_start_and_keeps_the_rest():
    cache = SelectionCache(suffix_tokens=10)
    sp, ids = loop(cache), prompt()
    first = sp.select(ids)
    with counted(SPECULATOR) as calls:
        longer = sp.select(more(ids, 10))
        assert not calls
    assert longer.cached
    assert longer.kept_indices.tolist() == [*first.kept_indices.tolist(), *range(PROMPT, PROMPT + 10)]
    assert longer.spans[-1][1] == longer.prompt_tokens == PROMPT + 10
    assert longer.importance is None
    assert f"kept {first.kept_tokens + 10} of {PROMPT + 10} tokens: the budget was spent on the first" in longer.reason
    assert not sp.select(more(ids, 11)).cached
    assert not sp.select(ids[:, :-1]).cached
    assert tallies(cache) == (0, 1, 3)
    result = sp.generate(more(ids, 5), 4)
    assert (result.selection.cached, result.kept_tokens) == (True, first.kept_tokens + 5)


def test_a_prediction_for_the_start_is_none_for_what_is_longer():
    costs = CostModel(
        PrefillCost(per_token=1.0), PrefillCost(per_token=0.1), identity=identity_of(BASE, SPECULATOR, config())
    )
    sp = SpecPrefill(BASE, SPECULATOR, config(), costs=costs, selection_cache=SelectionCache(suffix_tokens=10))
    assert sp.select(prompt()).prediction.prompt_tokens == PROMPT
    longer = sp.select(more(prompt(), 10))
    assert (longer.cached, longer.prediction) == (True, None)


def test_the_longest_known_start_is_used_and_what_it_gave_is_not_stored():
    cache = SelectionCache(suffix_tokens=10)
    sp, ids = loop(cache), prompt()
    sp.select(ids)
    assert sp.select(more(ids, 8)).cached
    assert not sp.select(more(ids, 16)).cached  # the eight tokens beyond the first prompt were not stored
    longest = sp.select(more(ids, 20))
    assert longest.cached
    assert f"the first {PROMPT + 16}," in longest.reason


def test_protected_tokens_of_a_longer_prompt_are_kept_too():
    cache = SelectionCache(suffix_tokens=10)
    sp, ids = loop(cache, keep_tokens=32), prompt()
    kept = set(sp.select(ids).kept_indices.tolist())
    dropped = next(i for i in range(PROMPT) if i not in kept)
    longer = sp.select(more(ids, 4), protect=[(dropped, dropped + 1)])
    assert longer.cached
    assert set(longer.kept_indices.tolist()) == kept | {dropped} | set(range(PROMPT, PROMPT + 4))
    assert longer.protected == ((dropped, dropped + 1),)


@pytest.mark.parametrize(("name", "value"), [("entries", 0), ("entries", True), ("suffix_tokens", -1)])
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        SelectionCache(**{name: value})
