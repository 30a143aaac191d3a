"""A conversation on real weights: SmolLM2-135M as speculator and base, about a document of a thousand tokens."""

from __future__ import annotations

import pydoc_data.topics
from itertools import pairwise

import pytest
import torch
from conversations import assert_as_from_scratch, counted

from specprefill_kernels import SpecPrefillConfig, models
from specprefill_kernels.loop import Session, SpecPrefill

pytestmark = [pytest.mark.model, pytest.mark.slow]

FACTS = (
    (120, "The name of the captain's dog is Rufus."),
    (507, "Maria's favourite fruit is the pomegranate."),
    (460, "The secret code of the blue door is 48213."),
)
QUESTIONS = (
    "What is the name of the captain's dog? Answer with the name.",
    "What is Maria's favourite fruit?",
    "What is the secret code of the blue door? Answer with the code.",
)
ANSWERS = ("Rufus", "pomegranate", "48213")


@pytest.fixture(scope="module")
def smollm2():
    return models.load("smollm2-135m", dtype=torch.float32)


def document(words=600):
    """About 1000 tokens of prose with the facts in it."""
    prose = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).split()
    body = prose[18716 : 18716 + words]
    for place, fact in FACTS:
        body.insert(place * words // 600, fact)
    return " ".join(body)


def loop(smollm2):
    """The paper's scoring: with the preset "default" the first turn keeps what the second one asks for already."""
    model, tokenizer = smollm2
    return SpecPrefill(model, model, SpecPrefillConfig(keep_ratio=0.2, turn_end_tokens=64), tokenizer=tokenizer)


def kept_text(session, selection):
    return session.loop.tokenizer.decode(selection.input_ids[selection.kept_indices])


def report(turns):
    for turn in turns:
        seconds = {stage: round(value, 2) for stage, value in turn.seconds.items()}
        print(
            f"\n{turn.prompt_tokens} tokens, {turn.kept_tokens} kept; computed: speculator "
            f"{turn.prompt_tokens - turn.selection.reused_tokens}, base {turn.prefilled_tokens}; first token after "
            f"{turn.ttft:.2f} s {seconds}"
        )


def test_what_each_question_needs_comes_back(smollm2):
    """What a run from scratch keeps is kept, so what it finds is found. (The document is this Python's: another one has
    other neighbours for the facts, and not each of them is found from scratch.)"""
    session, turns, found = Session(loop(smollm2)), [], 0
    for question, answer in zip([document() + "\n\n" + QUESTIONS[0], *QUESTIONS[1:]], ANSWERS):
        scratch = session.loop.select([*session.messages, {"role": "user", "content": question}])
        turns.append(session.ask(question, 8))
        kept = kept_text(session, turns[-1].selection)
        assert answer in kept or answer not in kept_text(session, scratch)
        found += answer in kept
        missing = set(scratch.kept_indices.tolist()) - set(turns[-1].selection.kept_indices.tolist())
        assert len(missing) <= 0.05 * scratch.kept_tokens  # a tie may fall otherwise: other sums, cached or not
        # The model is small and answers as it likes; the conversation goes on as it should have.
        session.messages[-1]["content"] = f"It is {answer}, as the text says."
    report(turns)
    assert found >= 2
    for before, turn in pairwise(turns):
        back = set(turn.selection.kept_indices.tolist()) - set(before.selection.kept_indices.tolist())
        assert min(back) < before.prompt_tokens  # dropped then, kept now
        assert "where dropped tokens come back" in turn.reason
        assert 0 < turn.prefilled_tokens < 0.9 * turn.kept_tokens
        assert turn.prompt_tokens - turn.selection.reused_tokens < 60


def test_with_nothing_to_bring_back_the_next_turns_start_far_sooner(smollm2):
    session, (model, _) = Session(loop(smollm2), bring_back=0.0), smollm2
    turns = [session.ask(document() + "\n\n" + QUESTIONS[0], 4)]
    for question in QUESTIONS[1:]:
        with counted(model) as calls:
            turns.append(session.ask(question, 4))
        # The speculator's new tokens and look-ahead ones, the base's new tokens and decoded ones.
        selection = turns[-1].selection
        new, ahead = turns[-1].prompt_tokens - selection.reused_tokens, len(selection.look_ahead_tokens)
        assert calls == [new, *[1] * ahead, turns[-1].prefilled_tokens, *[1] * (len(turns[-1].tokens) - 1)]
        assert max(new, turns[-1].prefilled_tokens) < 40
        assert turns[-1].ttft < 0.6 * turns[0].ttft
        # The price of bringing nothing back: the control of the test above.
        back = set(turns[-1].selection.kept_indices.tolist()) - set(turns[-2].selection.kept_indices.tolist())
        assert min(back) >= turns[-2].prompt_tokens
    report(turns)


def test_a_turn_equals_a_run_from_scratch(smollm2):
    session = Session(loop(smollm2))
    first = session.ask(document(200) + "\n\n" + QUESTIONS[0], 6)
    tokenizer = session.loop.tokenizer
    messages = [*session.messages, {"role": "user", "content": QUESTIONS[1]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    second = assert_as_from_scratch(session, tokenizer(text, add_special_tokens=False)["input_ids"], 6)
    assert 0 < second.prefilled_tokens < second.kept_tokens
    assert second.selection.reused_tokens >= first.prompt_tokens
