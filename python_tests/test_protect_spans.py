"""What a caller names survives: token spans, passages, and characters of the text or of a message."""

from __future__ import annotations

import random

import pytest
import torch
from chat_templates import CHATML, LLAMA2, PARTS, TEMPLATES, kept_text, pieces, protect
from chat_templates import chat_tokenizer as tokenizer_with
from loop_models import config

from specprefill_kernels.loop import Characters
from specprefill_kernels.loop.prompts import read_prompt
from specprefill_kernels.loop.protection import _occurrences, find_protection


def test_a_callers_spans():
    text = "zero one two one three naïve 🙂 end"
    tokenizer = tokenizer_with(CHATML)
    prompt = read_prompt(text, tokenizer)

    def kept(*spans):
        return pieces(prompt, find_protection(prompt, spans, tokenizer, config()))

    assert kept((0, 4)) == ["zero"]
    assert kept("one") == ["one", "one"]
    assert kept(Characters(5, 8)) == ["one"]
    assert kept(Characters(text.index("🙂"), text.index("🙂") + 1)) == ["🙂"]
    assert kept("one", (0, 4), Characters(4, 5)) == ["zero one", "one"]
    parts = find_protection(prompt, ["one", "one two", "naïve"], tokenizer, config()).parts
    assert parts == {"user": 3 + 7 + 6}
    assert find_protection(read_prompt("aaaa", tokenizer), ["aaa"], tokenizer, config()).spans == ((0, 4),)


def test_characters_of_a_message():
    messages = [
        {"role": "system", "content": "  system words "},
        {"role": "user", "content": "나 one 나"},
        {"role": "assistant", "content": "나 one 나"},
        {"role": "user", "content": "  two 나"},
    ]
    for template in (CHATML, LLAMA2):
        prompt, protection = protect(
            messages, template, [Characters(2, 5, 2), Characters(2, 5, message=-1)], protect="none"
        )
        assert kept_text(prompt, protection).replace("·", " ").split() == ["one", "two"]
        third = prompt.text.index("one", prompt.text.index("one") + 1)
        assert kept_text(prompt, protection).index("one") == third
        assert protection.parts == {"user": 6}


@pytest.mark.parametrize(
    ("span", "error"),
    [
        (Characters(3, 3), r"^protect\[0\]: expected 0 <= start < end <= \d+ characters, got \(3, 3\)"),
        (Characters(-1, 3), "got"),
        (Characters(0, 10**6), "characters"),
        (Characters(0.5, 2), "characters"),
        (Characters(0, 6, 0), r"expected 0 <= start < end <= 5 characters"),
        (Characters(0, 1, 3), r"expected a message in \[-2, 2\), got 3"),
        (Characters(0, 1, 1), r"expected a message whose content is text, got list"),
        ("nowhere", "expected a passage"),
        ("", "expected a passage"),
        (7, r"expected a pair \(start, end\), a passage or Characters"),
        ((0, 10**6), "expected 0 <= start < end"),
        ((0.0, 5.0), r"expected a pair \(start, end\)"),
    ],
)
def test_a_wrong_span_is_named(span, error):
    messages = [{"role": "user", "content": "hello"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}]
    with pytest.raises(ValueError, match=error):
        protect(messages, PARTS, [span])


@pytest.mark.parametrize("given", ["hello", Characters(0, 2), 7])
def test_one_span_that_is_in_no_list_is_refused(given):
    """A bare passage would protect each of its letters, wherever they stand."""
    with pytest.raises(ValueError, match=r"^protect: expected a list"):
        protect([{"role": "user", "content": "hello"}], PARTS, given)


def test_spans_may_be_a_tensor():
    tokenizer = tokenizer_with(CHATML)
    prompt = read_prompt("zero one two", tokenizer)
    found = find_protection(prompt, torch.tensor([[0, 4], [9, 12]]), tokenizer, config())
    assert found.spans == ((0, 4), (9, 12))


def test_a_prompt_of_ids_has_the_text_that_they_decode_to():
    tokenizer = tokenizer_with(CHATML)
    ids = read_prompt("zero one two one", tokenizer).input_ids
    found = find_protection(read_prompt(ids, tokenizer), ["one"], tokenizer, config())
    assert (
        found.spans == find_protection(read_prompt("zero one two one", tokenizer), ["one"], tokenizer, config()).spans
    )
    assert [tokenizer.decode(ids[0, start:end]).strip() for start, end in found.spans] == ["one", "one"]


@pytest.mark.parametrize("passage", ["a", "ab", "aba", "aab", "aabaa", "abcab", "b", "aaaa", "abababab"])
def test_all_occurrences_are_found_those_that_overlap_too(passage):
    generator = random.Random(passage)
    for _ in range(200):
        text = "".join(generator.choice("aab") for _ in range(40)) + passage + "abcabcab"
        starts = [start for start in range(len(text)) if text.startswith(passage, start)]
        covered = {place for start in starts for place in range(start, start + len(passage))}
        found = _occurrences(text, passage, "protect[0]")
        assert {place for start, end in found for place in range(start, end)} == covered


def test_a_passage_of_one_letter_costs_no_range_for_each():
    assert _occurrences("a" * 100_000, "a" * 50_000, "protect[0]") == [(0, 100_000)]
    assert _occurrences("a" * 100_000 + "b" + "a", "a", "protect[0]") == [(0, 100_000), (100_001, 100_002)]


def test_characters_need_what_they_speak_of():
    tokenizer = tokenizer_with(CHATML)
    with pytest.raises(ValueError, match=r"expected message=None for a prompt that is no chat"):
        find_protection(read_prompt("hello", tokenizer), [Characters(0, 1, 0)], tokenizer, config())
    with pytest.raises(ValueError, match=r"expected \(start, end\) token spans where the prompt came as ids and no"):
        find_protection(read_prompt([5, 6], None), [Characters(0, 1)], None, config())
    template = "{% for m in messages %}<{{ m.content | replace('l', 'L') }}>{% endfor %}"
    with pytest.raises(ValueError, match=r"it changes message 0"):
        protect([{"role": "user", "content": "hello"}], template, [Characters(0, 2, 0)])
    with pytest.raises(ValueError, match=r"expected characters that the chat template writes"):
        protect([{"role": "user", "content": "   hello"}], TEMPLATES["gemma"], [Characters(0, 2, 0)])
