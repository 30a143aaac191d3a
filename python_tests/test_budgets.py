"""What each budget keeps when single tokens must survive, and when speculative prefill does not pay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_models import PROMPT, VOCAB, build, byte_tokenizer, config, pipeline, prompt

from specprefill_kernels import SpecPrefillConfig, select_chunks
from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.budgets import budget_tokens, keep_tokens, spans_of_mask
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.costs import CostModel, PrefillCost
from specprefill_kernels.loop.memory import SpeculatorMemory
from specprefill_kernels.loop.prompts import Prompt
from specprefill_kernels.loop.protection import Protection
from specprefill_kernels.loop.scoring import Speculation
from specprefill_kernels.loop.selecting import Selector
from specprefill_kernels.loop.speculator import Speculator


def definition(importance: list[float], protected: set[int], cfg: SpecPrefillConfig) -> tuple[set[int], bool]:
    """Chunk by chunk: the forced ones, then the best of the others as long as everything fits."""
    count, size = len(importance), cfg.chunk_size
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    total = sum(importance)
    mass = [sum(importance[i] for i in chunk) for chunk in chunks]
    forced = [c for c, chunk in enumerate(chunks) if chunk[0] < cfg.sink or chunk[-1] >= count - max(cfg.tail, 1)]
    if cfg.keep_mass is not None:
        others = sorted(set(range(len(chunks))) - set(forced), key=lambda c: (-mass[c], c))
        kept, held = set(forced), sum(mass[c] for c in forced)
        for c in others:
            if held >= (cfg.keep_mass - 1e-9) * total:
                break
            kept.add(c)
            held += mass[c]
        return protected | {i for c in kept for i in chunks[c]}, False
    wanted = round(cfg.keep_ratio * 1000) * len(chunks) / 1000 if cfg.keep_tokens is None else cfg.keep_tokens / size
    whole = int(wanted) if cfg.rounding == "floor" or wanted == int(wanted) else int(wanted) + 1
    budget = min(max(whole, 1), len(chunks))
    kept = protected | {i for c in forced for i in chunks[c]}
    others = sorted(set(range(len(chunks))) - set(forced), key=lambda c: (-mass[c] / len(chunks[c]), c))
    for c in others[: max(budget - len(forced), 0) if not protected else None]:
        if len(kept | set(chunks[c])) > budget * size:
            break
        kept |= set(chunks[c])
    return kept, len(protected | {i for c in forced for i in chunks[c]}) > budget * size


@st.composite
def cases(draw):
    count = draw(st.integers(1, 90))
    size = draw(st.integers(1, 9))
    # Eighths: sums are exact, and many chunks tie.
    levels = draw(st.sampled_from([2, 9, 200]))
    importance = [value / 8 for value in draw(st.lists(st.integers(0, levels), min_size=count, max_size=count))]
    protected = set(draw(st.lists(st.integers(0, count - 1), max_size=draw(st.sampled_from([0, 3, 40])))))
    budget = draw(
        st.one_of(
            st.builds(lambda r: {"keep_ratio": r / 100}, st.integers(1, 100)),
            st.builds(lambda n: {"keep_tokens": n}, st.integers(1, 100)),
            st.builds(lambda m: {"keep_mass": m / 8}, st.integers(1, 7)),
        )
    )
    edges = {"sink": draw(st.sampled_from([0, 0, 1, 5, 30])), "tail": draw(st.sampled_from([0, 0, 1, 5, 30]))}
    rounding = draw(st.sampled_from(["ceil", "floor"]))
    if sum(importance) == 0:
        importance[0] = 1.0
    return importance, protected, SpecPrefillConfig(chunk_size=size, rounding=rounding, **edges, **budget)


@settings(max_examples=250, deadline=None)
@given(case=cases())
def test_kept_tokens_are_those_of_the_definition(case):
    importance, protected, cfg = case
    count = len(importance)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[sorted(protected)] = True
    got = keep_tokens(torch.tensor(importance), mask, cfg)
    kept, overflow = definition(importance, protected, cfg)
    assert set(got.mask.nonzero()[:, 0].tolist()) == kept
    assert got.overflow == overflow
    assert count - 1 in kept
    limit = budget_tokens(cfg, count)
    if limit is not None and not overflow:
        assert len(kept) <= limit
    # The same set of tokens in another order of calls: nothing depends on chance.
    assert torch.equal(keep_tokens(torch.tensor(importance), mask, cfg).mask, got.mask)


@settings(max_examples=80, deadline=None)
@given(case=cases(), nothing=st.booleans())
def test_with_nothing_protected_it_is_select_chunks_own(case, nothing):
    importance, _, cfg = case
    tensor = torch.tensor(importance)
    got = keep_tokens(tensor, None if nothing else torch.zeros(len(importance), dtype=torch.bool), cfg)
    options = {"chunk_size": cfg.chunk_size, "rounding": cfg.rounding, "sink": cfg.sink, "tail": max(cfg.tail, 1)}
    own = select_chunks(tensor[None], **cfg.budget, **options)
    assert torch.equal(got.mask, own.mask(len(importance))[0])
    assert got.overflow == bool(own.overflow[0])
    assert spans_of_mask(got.mask) == tuple(own.spans(0))


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_more_budget_keeps_more_and_never_loses_a_token(case):
    importance, protected, cfg = case
    mask = torch.zeros(len(importance), dtype=torch.bool)
    mask[sorted(protected)] = True
    before = torch.zeros_like(mask)
    for tokens in range(1, len(importance) + cfg.chunk_size, cfg.chunk_size):
        wider = cfg.replace(keep_tokens=tokens, keep_mass=None, rounding="ceil")
        after = keep_tokens(torch.tensor(importance), mask, wider).mask
        assert bool((after | ~before).all())
        before = after
    assert bool(before.all())


def test_a_role_marker_costs_its_tokens_and_not_a_chunk():
    importance = torch.zeros(320)
    importance[32:64] = 3
    importance[64:96] = 2
    importance[96:128] = 1
    markers = torch.zeros(320, dtype=torch.bool)
    markers[5::40] = True  # 8 tokens in as many chunks
    got = keep_tokens(importance, markers, SpecPrefillConfig(keep_tokens=128))
    assert int(got.mask.sum()) == 3 * 32 + 8 - int(markers[32:96].sum()) - int(markers[288:].sum())
    assert bool(got.mask[32:96].all())
    assert not bool(got.mask[96:128].all())
    assert not got.overflow
    whole = select_chunks(importance[None], keep_tokens=128, protect=markers[None], tail=1)
    assert bool(whole.overflow[0])


def test_the_budget_may_be_spent_to_the_last_token():
    importance = torch.arange(640, 0, -1) / 640
    must_keep = torch.zeros(640, dtype=torch.bool)
    must_keep[:32] = True  # costs nothing: the best chunk
    must_keep[400:432] = True
    got = keep_tokens(importance, must_keep, SpecPrefillConfig(keep_tokens=256))
    assert int(got.mask.sum()) == 256
    assert spans_of_mask(got.mask) == ((0, 192), (400, 432), (608, 640))


def test_few_selections_are_made_whatever_is_protected(monkeypatch):
    import specprefill_kernels.loop.budgets as budgets

    calls = []
    monkeypatch.setattr(budgets, "select_chunks", lambda *a, **k: calls.append(1) or select_chunks(*a, **k))
    importance = torch.rand(64_000, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(64_000, generator=torch.Generator().manual_seed(1)) < 0.1
    got = keep_tokens(importance, mask, SpecPrefillConfig(keep_ratio=0.3))
    assert budget_tokens(SpecPrefillConfig(keep_ratio=0.3), 64_000) - 32 < int(got.mask.sum()) <= 19_200
    assert len(calls) <= 12


def chosen(importance, cfg, *, protected=None):
    """`Selector.choose` on an importance made by hand."""
    selector = Selector(None, None, cfg, None, torch.device("cpu"))
    ids = Prompt(torch.arange(len(importance))[None])
    speculation = Speculation(torch.as_tensor(importance, dtype=torch.float32), 8, (0,), (), "reference")
    mask = None
    if protected is not None:
        mask = torch.zeros(len(importance), dtype=torch.bool)
        mask[protected] = True
    spans = () if mask is None else spans_of_mask(mask)
    protection = Protection(mask, spans, {} if mask is None else {"user": int(mask.sum())})
    return selector.choose(ids, protection, speculation, StageClock())


def test_keep_mass_follows_the_content():
    peaked = [0.001] * 960
    peaked[100:110] = [1.0] * 10
    cfg = config(keep_mass=0.8)
    narrow, wide = chosen(peaked, cfg), chosen([1.0] * 960, cfg)
    assert narrow.kept_tokens == 2 * 16  # the peak's chunk and the last one
    assert 0.8 * 960 <= wide.kept_tokens < 0.8 * 960 + 32
    kept = narrow.importance[narrow.kept_indices].sum() / narrow.importance.sum()
    assert kept >= 0.8
    guarded = chosen(peaked, cfg, protected=[3, 500])
    assert set(guarded.kept_indices.tolist()) == {3, 500, *narrow.kept_indices.tolist()}
    assert not guarded.overflow


def test_protected_tokens_are_paid_first_and_overflow_is_said():
    importance = torch.rand(320, generator=torch.Generator().manual_seed(0))
    guarded = chosen(importance, config(keep_tokens=96), protected=list(range(10, 50)))
    assert set(range(10, 50)) <= set(guarded.kept_indices.tolist())
    assert 96 - 16 < guarded.kept_tokens <= 96
    assert "40 protected (user 40)" in guarded.reason
    over = chosen(importance, config(keep_tokens=48), protected=[*range(10, 50), 200])
    assert over.overflow
    assert set(over.kept_indices.tolist()) == {*range(10, 50), 200, *range(304, 320)}
    assert "41 tokens that must survive and the last chunk exceed the budget of 48 (keep_tokens=48)" in over.reason


def test_costs_count_until_a_memory_holds_something():
    """The first turn of a conversation is a whole prompt; of later ones whole-prompt seconds say nothing."""
    base, speculator, settings = build("llama", seed=7), build("llama", seed=3), config()
    costs = CostModel(PrefillCost(per_token=1e-3), PrefillCost(per_token=1e-3))
    selector = Selector(Speculator(speculator, settings), None, settings, None, base.device, costs)
    memory = SpeculatorMemory()

    def mode(ids):
        return selector.select(Prompt(ids), Protection(), StageClock(), memory=memory).mode

    assert mode(prompt()) == "dense"
    Speculator(speculator, settings).score(prompt(), memory=memory)
    assert mode(prompt()) == "sparse"


def test_one_speculation_serves_every_budget():
    sp, ids = pipeline(), prompt()
    read, protection = sp.read(ids, [(3, 5)], None, StageClock())
    speculation = sp.selector.speculate(read, StageClock())
    for changes in ({"keep_ratio": 0.2}, {"keep_ratio": 0.5}, {"keep_tokens": 40}, {"keep_mass": 0.5}):
        again = sp.selector.choose(read, protection, speculation, StageClock(), config=config(**changes))
        alone = pipeline(**changes).select(ids, protect=[(3, 5)])
        assert (again.spans, again.reason, again.mode) == (alone.spans, alone.reason, alone.mode)
        assert torch.equal(again.importance, alone.importance)


@pytest.mark.parametrize("changes", [{"keep_ratio": 0.3}, {"keep_tokens": 70}, {"keep_mass": 0.4}], ids=str)
def test_budgets_hold_through_the_whole_loop(changes):
    tokenizer = byte_tokenizer()
    sp = pipeline(tokenizer=tokenizer, turn_end_tokens=12, **changes)
    messages = [{"role": "user", "content": "tell me of a fox. " * 12}]
    for answer in ("it ran over the hill, they say. " * 6, "no more of it. " * 8):
        result = sp.generate(messages, 3)
        kept = set(result.selection.kept_indices.tolist())
        assert result.mode == "sparse"
        assert result.kept_tokens == len(kept)
        assert all(set(range(start, end)) <= kept for start, end in result.selection.protected)
        limit = budget_tokens(sp.config, result.prompt_tokens)
        assert result.selection.overflow == ("exceed the budget" in result.reason)
        if limit is not None:
            assert result.kept_tokens <= limit or result.selection.overflow
        else:
            mass = result.selection.importance
            assert mass[result.selection.kept_indices].sum() >= 0.4 * mass.sum()
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and a dog? " * 9}]


def priced(costs, **changes):
    sp = pipeline(**changes)
    sp.selector._costs = costs
    return sp


CHEAP_SPECULATOR = CostModel(PrefillCost(per_token=1e-3), PrefillCost(per_token=1e-5))
DEAR_SPECULATOR = CostModel(PrefillCost(per_token=1e-3), PrefillCost(per_token=2e-3))


def test_a_prompt_that_would_not_pay_runs_dense_and_says_both_times():
    sp = priced(DEAR_SPECULATOR)
    selection = sp.select(prompt())
    assert selection.mode == "dense"
    assert selection.importance is None
    assert "speculator_prefill" not in selection.seconds
    assert selection.reason.startswith("sparse prefill would not pay: ")
    prediction = selection.prediction
    assert prediction.full == pytest.approx(PROMPT * 1e-3)
    assert prediction.sparse == pytest.approx(PROMPT * 2e-3 + 64 * 1e-3)  # 4 of 10 chunks of 16
    assert f"{prediction.full:.3g} s" in selection.reason
    assert f"{prediction.sparse:.3g} s" in selection.reason
    assert sp.generate(prompt(), 2).reason == selection.reason


def test_a_prompt_that_pays_runs_sparse_and_tells_the_prediction():
    selection = priced(CHEAP_SPECULATOR).select(prompt())
    assert selection.mode == "sparse"
    assert selection.prediction.pays
    assert selection.prediction.kept_tokens == 64
    assert selection.spans == pipeline().select(prompt()).spans


def test_what_is_protected_counts_in_the_prediction():
    costs = CostModel(PrefillCost(per_token=1e-3), PrefillCost(per_token=0.3e-3))
    assert priced(costs).select(prompt()).mode == "sparse"
    selection = priced(costs).select(prompt(), protect=[(0, PROMPT - 20)])
    assert selection.mode == "dense"
    assert selection.prediction.kept_tokens == PROMPT - 20


def test_keep_mass_is_predicted_again_after_scoring():
    """Before scoring only the least is known; the speculator's time is spent when the rest is."""
    costs = CostModel(PrefillCost(per_token=1e-3), PrefillCost(per_token=0.5e-3))
    selection = priced(costs, keep_mass=0.8).select(prompt())
    assert selection.mode == "sparse"
    assert selection.prediction.kept_tokens == selection.kept_tokens
    assert not selection.prediction.pays
    assert "known after scoring: sparse prefill did not pay" in selection.reason
    assert f"{selection.prediction.sparse:.3g} s" in selection.reason
    never = priced(DEAR_SPECULATOR, keep_mass=0.95).select(prompt())
    assert never.mode == "dense"
    assert never.prediction.kept_tokens == 16
    pays = priced(CHEAP_SPECULATOR, keep_mass=0.5).select(prompt())
    assert "did not pay" not in pays.reason
    assert pays.prediction.kept_tokens == pays.kept_tokens


def test_a_short_prompt_needs_no_prediction():
    selection = priced(CHEAP_SPECULATOR, min_prompt_tokens=1000).select(prompt())
    assert selection.prediction is None
    assert selection.reason.startswith("prompt too short")


def test_a_pair_is_predicted_in_the_speculators_own_tokens():
    base, other = byte_tokenizer(), byte_tokenizer((("t", "h"), ("th", "e"), ("o", "w")))
    text = "the brown cow and the other cow. " * 9
    for budget in (config(), config(keep_ratio=None, keep_mass=0.3)):  # keep_mass is predicted again after scoring
        sp = SpecPrefill(
            build("llama", seed=7), build("llama", seed=3), budget, tokenizer=base, speculator_tokenizer=other
        )
        sp.selector._costs = CHEAP_SPECULATOR
        prediction = sp.select(text).prediction
        assert prediction.prompt_tokens == len(text)
        assert prediction.speculator_tokens == len(other(text)["input_ids"]) < len(text)


@pytest.mark.parametrize("changes", [{"tail": 60}, {"sink": 60}], ids=str)
def test_sink_and_tail_that_exceed_the_budget_are_named(changes):
    over = pipeline(keep_tokens=16, **changes).select(prompt())
    assert over.overflow
    assert over.reason.endswith("; the chunks of sink and tail exceed the budget of 16 (keep_tokens=16)")


def test_a_dense_selection_names_what_is_protected_too():
    dense = pipeline(keep_ratio=1.0).select(prompt(), protect=[(3, 9)])
    assert dense.mode == "dense"
    assert (dense.protected, dict(dense.protected_parts)) == (((3, 9),), {"user": ((3, 9),)})


def test_the_first_id_that_the_speculator_has_not_is_refused():
    ids = prompt()
    sp = pipeline(base=build("llama", seed=7, vocab_size=VOCAB + 1))
    ids[0, 5] = VOCAB
    with pytest.raises(ValueError, match=rf"^speculator: expected a vocabulary that holds id {VOCAB}, got one of"):
        sp.select(ids)
    ids[0, 5] = VOCAB - 1
    assert sp.select(ids).mode == "sparse"
