"""A conversation on warm caches: each turn equals a run from scratch with the same tokens and computes what is new."""

from __future__ import annotations

import pytest
import torch
from conversations import assert_as_from_scratch, counted, from_scratch, plan_next, positions
from loop_models import PROMPT, build, byte_tokenizer, config, ordinary, pipeline, prompt
from transformers import set_seed

from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.selection_cache import SelectionCache
from specprefill_kernels.loop.session import Session

FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gemma3")
FIRST = ((0, 20), (40, 61), (118, PROMPT))  # what turn 1 keeps in the planned tests
KEPT = len(positions(*FIRST))


def follow(ids, result, new=20, seed=5):
    """The conversation after `result`: the prompt, the answer, and `new` other tokens."""
    answer = torch.tensor([list(result.tokens)])
    return torch.cat([torch.as_tensor(ids).reshape(1, -1), answer, prompt(new, seed=seed)], dim=1)


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


class Accident(RuntimeError):
    pass


def fail(*_):
    raise Accident


def fail_in_the_base(session, ids):
    """In the middle of a forward: some layers have the new tokens and some have not."""
    with session.loop.base.model.layers[2].register_forward_pre_hook(fail):
        session.generate(ids, 4)


def fail_at_the_second_token(session, ids):
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 2:
            fail()

    with session.loop.base.model.layers[2].register_forward_pre_hook(hook):
        session.generate(ids, 4)


def fail_in_the_speculator(session, ids):
    with session.loop.selector._speculator.model.model.layers[2].register_forward_pre_hook(fail):
        session.generate(ids, 4)


def fail_in_the_look_ahead(session, ids):
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 4:
            fail()

    with session.loop.selector._speculator.model.model.layers[2].register_forward_pre_hook(hook):
        session.generate(ids, 4)


def interrupt_a_stream(session, ids):
    stream = session.stream(ids, 4)
    next(stream)
    with session.loop.base.model.layers[1].register_forward_pre_hook(raise_interrupt):
        next(stream)


def raise_interrupt(*_):
    raise KeyboardInterrupt


ACCIDENTS = (
    fail_in_the_base,
    fail_at_the_second_token,
    fail_in_the_speculator,
    fail_in_the_look_ahead,
    interrupt_a_stream,
)


@pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda accident: accident.__name__)
@pytest.mark.parametrize("first", [False, True], ids=["second_turn", "first_turn"])
def test_after_an_accident_the_next_call_is_right(accident, first):
    sp = pipeline("gemma3")
    session, ids = Session(sp), prompt()
    if not first:
        ids = follow(ids, session.generate(ids, 4))
    with pytest.raises((Accident, KeyboardInterrupt)):
        accident(session, ids)
    result = assert_as_from_scratch(session, ids)
    torch.testing.assert_close(result.selection.importance, sp.select(ids).importance, atol=1e-6, rtol=1e-4)
    assert_as_from_scratch(session, follow(ids, result))


@pytest.mark.parametrize("read", [1, 3])
def test_an_abandoned_stream_leaves_what_it_computed(read):
    session, ids = Session(pipeline()), prompt()
    stream = session.stream(ids, 10)
    tokens = [next(stream) for _ in range(read)]
    kept = session.cached_tokens
    ids = torch.cat([ids, torch.tensor([tokens]), prompt(20, seed=4)], dim=1)
    result = assert_as_from_scratch(session, ids)
    assert result.kept_tokens - result.prefilled_tokens <= kept
    with pytest.raises(RuntimeError, match="started another generation"):
        next(stream)
    with pytest.raises(RuntimeError, match="read to its end"):
        _ = stream.result
    assert_as_from_scratch(session, follow(ids, result))


def test_streams_of_one_session_must_not_interleave():
    session, ids = Session(pipeline()), prompt()
    first, second = session.stream(ids, 6), session.stream(ids, 6)
    next(first)
    expected = session.loop.generate(ids, 6).tokens
    tokens = [next(second)]
    with pytest.raises(RuntimeError, match="started another generation"):
        next(first)
    assert (*tokens, *second) == expected
    third = session.stream(ids, 6)
    next(third)
    session.reset()
    with pytest.raises(RuntimeError, match="or was reset"):
        next(third)


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


# Conversations of messages. Seven merges, so that an answer and what follows it may be tokenized otherwise.
MERGES = (("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("in", "g"), ("o", "r"), ("e", "r"))
STORY = "the morning and the evening, the finger and the ring, " * 3


def chat(**changes):
    session_options = {name: changes.pop(name) for name in ("system", "tools") if name in changes}
    return Session(pipeline(tokenizer=byte_tokenizer(MERGES), **changes), **session_options)


def test_ask_keeps_the_conversation():
    session = chat(system="be brief")
    first = session.ask(STORY, 5)
    second = session.ask("and then?", 5)
    roles = [message["role"] for message in session.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in session.messages] == ["be brief", STORY, first.text, "and then?", second.text]
    alone = session.loop.tokenizer.apply_chat_template(
        session.messages[:-1], tokenize=False, add_generation_prompt=True
    )
    assert session.loop.tokenizer.decode(second.selection.input_ids) == alone
    session.reset()
    assert session.messages == [{"role": "system", "content": "be brief"}]
    assert session.cached_tokens == 0


def test_asking_equals_runs_from_scratch_whatever_the_answers_tokens_become():
    """Random models answer with bytes that are no text, so that answers come back as other tokens."""
    session = chat()
    session.ask(STORY, 8)
    for question in ("and then?", "the ring", STORY):
        messages = [*session.messages, {"role": "user", "content": question}]
        result = assert_as_from_scratch_chat(session, messages)
        session.messages.extend([messages[-1], {"role": "assistant", "content": result.text}])


def assert_as_from_scratch_chat(session, messages):
    text = session.loop.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = session.loop.tokenizer(text, add_special_tokens=False)["input_ids"]
    by_ids = Session(session.loop)
    by_ids.__dict__.update(session.__dict__)  # the same caches
    return assert_as_from_scratch(by_ids, ids)


def test_a_stream_of_ask_joins_the_conversation_at_its_end():
    session = chat()
    stream = session.ask_stream(STORY, 6)
    pieces = [next(stream)]
    assert session.messages == []
    pieces.extend(stream)
    assert session.messages == [
        {"role": "user", "content": STORY},
        {"role": "assistant", "content": stream.result.text},
    ]
    assert "".join(pieces) == stream.result.text


def test_a_failed_question_leaves_no_trace():
    session = chat()
    session.ask(STORY, 4)
    before = [dict(message) for message in session.messages]
    with pytest.raises(Accident):
        session.ask("well?", 4, logits_processor=[fail])
    abandoned = session.ask_stream("well?", 20)
    next(abandoned)
    assert session.messages == before
    assert session.ask("well?", 4).tokens == chat_again(before, "well?")


def chat_again(messages, question):
    session = chat()
    session.ask(STORY, 4)
    assert session.messages == messages
    return session.ask(question, 4).tokens


def test_tools_reach_the_template_of_every_turn():
    session = chat(tools=[{"name": "look_up"}])
    session.loop.tokenizer.chat_template = (
        "{% for t in tools %}[{{ t['name'] }}]{% endfor %}" + session.loop.tokenizer.chat_template
    )
    for _ in range(2):
        result = session.ask(STORY, 2)
        assert session.loop.tokenizer.decode(result.selection.input_ids).startswith("[look_up]")
    other = session.ask(STORY, 2, template_options={"tools": [{"name": "other"}]})  # a call's own come first
    assert session.loop.tokenizer.decode(other.selection.input_ids).startswith("[other]")
    result = session.ask("found: 7", 2, role="tool")
    assert session.messages[-2] == {"role": "tool", "content": "found: 7"}
    assert result.prompt_tokens > 0


def test_a_session_uses_the_loops_selection_cache():
    sp = SpecPrefill(build("llama", seed=7), build("llama", seed=3), config(), selection_cache=SelectionCache())
    first, second, ids = Session(sp), Session(sp), prompt()
    result = first.generate(ids, 4)
    again = second.generate(ids, 4)
    assert (again.selection.cached, again.tokens, again.spans) == (True, result.tokens, result.spans)
    ids = follow(ids, again)
    assert not assert_as_from_scratch(second, ids).selection.cached


def test_a_speculator_with_other_tokens_remembers_too():
    base, speculator, other = build("llama", seed=7), build("llama", seed=3), byte_tokenizer(MERGES)
    sp = SpecPrefill(base, speculator, config(), tokenizer=byte_tokenizer(), speculator_tokenizer=other)
    session, text = Session(sp), STORY
    for more in ("", "and the thing in the corner. ", "Another thing."):
        text += more
        with counted(speculator) as calls:
            result = session.generate(text, 4)
        assert sum(calls) < (1000 if not more else 40)
        torch.testing.assert_close(result.selection.importance, sp.select(text).importance, atol=1e-6, rtol=1e-4)
        tokens, _ = from_scratch(sp, result.selection.input_ids, result.selection.kept_indices, 4)
        assert list(result.tokens) == tokens
    assert result.selection.reused_tokens > 100
    assert result.selection.reused_tokens < result.prompt_tokens  # counted in the speculator's own, longer tokens
