"""The loop on real weights: SmolLM2-135M as speculator and base, prompts long enough that selection matters."""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch
from loop_models import byte_tokenizer

from specprefill_kernels import SpecPrefillConfig, models
from specprefill_kernels.loop import SpecPrefill

pytestmark = [pytest.mark.model, pytest.mark.slow]

NEEDLE = "The secret code of the blue door is 48213."
QUESTION = "What is the secret code of the blue door? Answer with the code."
PROSE = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


@pytest.fixture(scope="module")
def smollm2():
    return models.load("smollm2-135m", dtype=torch.float32)


def haystack(words=300):
    """About 600 tokens of prose with one needle in the middle."""
    body = PROSE.split()[3000 : 3000 + words]
    body.insert(words // 2, NEEDLE)
    return [{"role": "user", "content": " ".join(body) + "\n\n" + QUESTION}]


def kept_text(selection, tokenizer):
    return tokenizer.decode(selection.input_ids[selection.kept_indices])


def test_keeping_everything_equals_generate(smollm2):
    model, tokenizer = smollm2
    messages = haystack(100)
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = encoded["input_ids"]
    expected = model.generate(**encoded, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    sp = SpecPrefill(model, model, SpecPrefillConfig(keep_ratio=1.0, min_prompt_tokens=0), tokenizer=tokenizer)
    result = sp.generate(messages, 12)
    assert list(result.tokens) == expected
    assert result.mode == "dense"


def test_a_fifth_of_the_prompt_still_holds_the_needle(smollm2):
    model, tokenizer = smollm2
    sp = SpecPrefill(model, model, SpecPrefillConfig(keep_ratio=0.2), tokenizer=tokenizer)
    stream = sp.stream(haystack(), 8)
    text = "".join(stream)
    result = stream.result
    assert result.text == text != ""
    assert result.mode == "sparse"
    assert result.kept_tokens < 0.25 * result.prompt_tokens
    assert "48213" in kept_text(result.selection, tokenizer)


def test_the_question_makes_the_needle_important(smollm2):
    """Control: the needle's share of the importance falls when nobody asks for it."""
    model, tokenizer = smollm2
    sp = SpecPrefill(model, model, SpecPrefillConfig(keep_ratio=0.2), tokenizer=tokenizer)

    def share(question):
        messages = [{"role": "user", "content": haystack()[0]["content"].replace(QUESTION, question)}]
        selection = sp.select(messages)
        start = tokenizer.decode(selection.input_ids).find("48213")
        ends = [len(tokenizer.decode(selection.input_ids[: i + 1])) for i in range(selection.prompt_tokens)]
        needle = [i for i, end in enumerate(ends) if start < end <= start + 5]
        assert len(needle) == 5  # one token per digit
        return float(selection.importance[needle].mean() / selection.importance.mean())

    asked, silent = share(QUESTION), share("Say hello to me in French, please.")
    assert asked > 1.5 * silent, (asked, silent)


def test_middle_layers_of_the_base_find_it_too(smollm2):
    model, tokenizer = smollm2
    sp = SpecPrefill(model, None, SpecPrefillConfig(keep_ratio=0.25), tokenizer=tokenizer, self_layers=(15, 20))
    selection = sp.select(haystack())
    assert "48213" in kept_text(selection, tokenizer)
    assert selection.scored_layers == tuple(range(15, 21))


def test_importance_crosses_to_other_tokens(smollm2):
    """The same weights speak for a base whose tokens are bytes; its template has the markers that they know."""
    model, tokenizer = smollm2
    config = SpecPrefillConfig(keep_ratio=0.25, chunk_size=128, min_prompt_tokens=0)
    sp = SpecPrefill(model, model, config, tokenizer=byte_tokenizer(), speculator_tokenizer=tokenizer)
    selection = sp.select(haystack())
    assert selection.mode == "sparse"
    assert "48213" in kept_text(selection, byte_tokenizer())
