"""What a generation asks of the base: tokens it reads, forwards it makes, cache it reserves."""

from __future__ import annotations

import pytest
import torch
from loop_models import PROMPT, byte_tokenizer, pipeline, prompt

from specprefill_kernels.loop import continuing, prefill


def lengths_read(model):
    """A list that grows by the tokens of each forward through the model's first layer."""
    lengths = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    return lengths


def test_prefilled_tokens_are_those_that_the_base_read():
    sp = pipeline()
    lengths = lengths_read(sp.base)
    result = sp.generate(prompt(), 2)
    assert lengths == [result.kept_tokens, 1]
    assert result.prefilled_tokens == result.kept_tokens < PROMPT
    dense = pipeline(keep_ratio=1.0).generate(prompt(), 2)
    assert dense.prefilled_tokens == dense.kept_tokens == PROMPT


@pytest.mark.parametrize(("module", "changes"), [(prefill, {}), (continuing, {"self_layers": (0, 1)})])
@pytest.mark.parametrize(("wanted", "reserved"), [(3, 3), (1024, 1024), (10**9, 1024)])
def test_a_generous_limit_reserves_a_bounded_cache(monkeypatch, module, changes, wanted, reserved):
    rooms, full_cache = [], module.full_cache
    monkeypatch.setattr(module, "full_cache", lambda layers, room: rooms.append(room) or full_cache(layers, room))
    stream = pipeline(**changes).stream(prompt(), wanted)
    next(stream)
    assert rooms == [reserved]


def test_continuing_layers_read_the_prompt_in_the_chunks_of_the_config():
    whole, chunked = (pipeline(self_layers=(0, 1), prefill_chunk=chunk) for chunk in (None, 64))
    lengths = lengths_read(chunked.base)
    result = chunked.generate(prompt(), 4)
    assert lengths[:-3] == [64, 64, PROMPT - 128]
    assert result.tokens == whole.generate(prompt(), 4).tokens


def test_continuing_layers_refuse_an_option_before_they_read():
    sp = pipeline(self_layers=(0, 1))
    lengths = lengths_read(sp.base)
    with pytest.raises(ValueError, match="num_beams"):
        sp.generate(prompt(), 2, num_beams=2)
    assert lengths == []


def test_an_answers_text_has_no_special_tokens():
    tokenizer = byte_tokenizer()
    special, letter = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer("a")["input_ids"][0]

    def force(input_ids, scores):
        wanted = special if input_ids.shape[1] == PROMPT + 1 else letter
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([wanted]), 0.0)

    result = pipeline(tokenizer=tokenizer).generate(prompt(), 3, logits_processor=[force])
    assert result.tokens == (letter, special, letter)
    assert result.text == "aa"
