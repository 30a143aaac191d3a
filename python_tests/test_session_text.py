"""Conversations of messages and of text: `ask`, its streams, tools, and a speculator with other tokens."""

from __future__ import annotations

import pytest
import torch
from conversations import Accident, assert_as_from_scratch, counted, fail, from_scratch
from loop_models import build, byte_tokenizer, config, pipeline

from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.session import Session

# Seven merges, so that an answer and what follows it may be tokenized otherwise.
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
