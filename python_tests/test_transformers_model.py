"""`model.generate` made speculative on real weights: SmolLM2-135M as speculator and base."""

from __future__ import annotations

import threading

import pytest
import torch
from test_loop_model import haystack
from transformers import TextIteratorStreamer, pipeline

from specprefill_kernels import SpecPrefillConfig, models
from specprefill_kernels.integrations.transformers import disable, enable, last_result
from specprefill_kernels.loop import SpecPrefill

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def smollm2():
    return models.load("smollm2-135m", dtype=torch.float32)


@pytest.fixture
def enabled(smollm2):
    """With a config of the test's own."""
    model, tokenizer = smollm2

    def turn_on(**changes):
        keywords = {"self_layers": changes.pop("self_layers", None)}
        speculator = model if keywords["self_layers"] is None else None
        enable(model, speculator, SpecPrefillConfig(**changes), tokenizer=tokenizer, **keywords)
        return model, tokenizer

    yield turn_on
    if "generate" in vars(model):
        disable(model)


def encoded(tokenizer, *chats):
    tokenizer.padding_side = "left"
    return tokenizer.apply_chat_template(
        list(chats), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9}], ids=str)
def test_keeping_everything_equals_generate(smollm2, enabled, options):
    model, tokenizer = smollm2
    inputs = encoded(tokenizer, haystack(50), haystack(30))
    torch.manual_seed(0)
    expected = model.generate(**inputs, max_new_tokens=8, **options)
    enabled(keep_ratio=1.0, min_prompt_tokens=0)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, **options), expected)
    assert last_result(model).mode == "dense"


@pytest.mark.parametrize("self_layers", [None, (0, 20)], ids=["speculator", "self"])
def test_a_pipeline_answers_from_a_part_of_the_prompt(smollm2, enabled, self_layers):
    model, tokenizer = enabled(keep_ratio=0.3, self_layers=self_layers)
    speculator = model if self_layers is None else None
    loop = SpecPrefill(
        model, speculator, SpecPrefillConfig(keep_ratio=0.3), tokenizer=tokenizer, self_layers=self_layers
    )
    expected = loop.generate(haystack(), 16)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = pipe(haystack(), max_new_tokens=16, do_sample=False)
    result = last_result(model)
    assert found["generated_text"][-1]["content"] == expected.text == result.rows[0].text
    assert result.rows[0].spans == expected.spans  # the chat was recognized: the same parts of it survive
    assert result.rows[0].kept_tokens < 0.4 * result.rows[0].prompt_tokens
    if self_layers is None:
        assert "48213" in found["generated_text"][-1]["content"]


def test_a_streamed_answer_is_the_same(enabled):
    model, tokenizer = enabled(keep_ratio=0.3)
    inputs = encoded(tokenizer, haystack())
    sequences = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
    options = {**inputs, "max_new_tokens": 8, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=options, daemon=True)
    thread.start()
    text = "".join(streamer)
    thread.join()
    answer = sequences[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(answer, skip_special_tokens=True) != ""
    assert last_result(model).rows[0].tokens == tuple(answer.tolist())


def test_a_padded_batch_gives_what_its_prompts_give_alone(enabled):
    model, tokenizer = enabled(keep_ratio=0.3)
    chats = [haystack(), haystack(200)]
    alone = []
    for chat in chats:
        inputs = encoded(tokenizer, chat)
        model.generate(**inputs, max_new_tokens=6, do_sample=False)
        alone.append(last_result(model).rows[0])
    model.generate(**encoded(tokenizer, *chats), max_new_tokens=6, do_sample=False)
    rows = last_result(model).rows
    assert [row.tokens for row in rows] == [row.tokens for row in alone]
    assert [row.spans for row in rows] == [row.spans for row in alone]
    assert {row.mode for row in rows} == {"sparse"}
