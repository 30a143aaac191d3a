"""What the options of `generate` do in the loop: the same as in Transformers, or an error that names them."""

from __future__ import annotations

import pytest
import torch
from loop_models import (
    PROMPT,
    VOCAB,
    build,
    ordinary,
    pipeline,
    prompt,
)
from transformers import (
    LogitsProcessor,
    set_seed,
)

from specprefill_kernels.loop.decoding import plan_decoding


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 4, "eos_token_id": 5},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "top_p": 0.8},
        {"bad_words_ids": [[4], [9]]},
    ],
    ids=lambda options: next(name for name in options if name != "do_sample"),
)
def test_generates_own_options_apply(options):
    sp, ids = pipeline(keep_ratio=1.0), prompt()
    expected = ordinary(sp.base, ids, 16, **options)
    set_seed(0)
    assert list(sp.generate(ids, 16, **options).tokens) == expected
    plain = ordinary(sp.base, ids, 16, do_sample=False)
    if "min_new_tokens" not in options and "bad_words_ids" not in options:
        assert expected != plain  # the option really changes the answer


def test_the_models_generation_config_applies():
    base, ids = build("llama", seed=7), prompt()
    base.generation_config.repetition_penalty = 2.0
    plain = ordinary(base, ids, 16, do_sample=False, repetition_penalty=1.0)
    expected = ordinary(base, ids, 16, do_sample=False)
    assert expected != plain
    assert list(pipeline(base=base, keep_ratio=1.0).generate(ids, 16).tokens) == expected


def test_pad_ids_inside_the_prompt_are_tokens():
    """`generate` would take them for padding, and leave them out of the repetition penalty."""
    base, ids = build("llama", seed=7), prompt()
    base.generation_config.pad_token_id = pad = int(ids[0, 0])
    base.generation_config.eos_token_id = 1
    plan = plan_decoding(base, ids, max_new_tokens=4, do_sample=False, repetition_penalty=2.0)
    scores = plan.logits_processor(ids, torch.ones(1, VOCAB))
    assert float(scores[0, pad]) == 0.5


def test_any_of_several_eos_ids_ends_the_answer():
    base, ids = build("llama", seed=7), prompt()
    free = ordinary(base, ids, 16, do_sample=False)
    stop = next(i for i in range(2, 16) if free[i] not in free[:i])
    base.generation_config.eos_token_id = [0, free[stop]]
    result = pipeline(base=base, keep_ratio=1.0).generate(ids, 16)
    assert list(result.tokens) == free[: stop + 1] == ordinary(base, ids, 16, do_sample=False)


def test_processors_see_the_whole_prompt_even_where_tokens_were_dropped():
    seen = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.clone())
            return scores

    sp, ids = pipeline(), prompt()
    result = sp.generate(ids, 3, logits_processor=[Watch()])
    assert result.mode == "sparse"
    assert [s.shape[1] for s in seen] == [PROMPT, PROMPT + 1, PROMPT + 2]
    assert torch.equal(seen[0], ids)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_are_refused(options):
    with pytest.raises(ValueError, match=r"^num_"):
        pipeline().generate(prompt(), 4, **options)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="temprature"):
        pipeline().generate(prompt(), 4, temprature=0.5)
