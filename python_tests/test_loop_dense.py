"""When the loop runs dense: it says why, answers as `generate` does, and does not waste the speculator's time."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from loop_models import PROMPT, VOCAB, build, config, ordinary, pipeline, prompt
from transformers import MambaConfig, MambaForCausalLM

from specprefill_kernels.loop import SpecPrefill


@pytest.mark.parametrize(
    ("changes", "protect", "reason"),
    [
        ({"min_prompt_tokens": PROMPT + 1}, None, "prompt too short: 150 tokens, min_prompt_tokens is 151"),
        ({"keep_tokens": 1000}, None, "the budget keeps everything: keep_tokens=1000"),
        ({}, [(0, PROMPT)], "every token is protected"),
        ({"keep_mass": 1.0}, None, "the selection kept every token"),
    ],
)
def test_dense_says_why(changes, protect, reason):
    sp, ids = pipeline(**changes), prompt()
    result = sp.generate(ids, 4, protect=protect)
    assert result.mode == "dense"
    assert result.reason.startswith(reason)
    assert list(result.tokens) == ordinary(sp.base, ids, 4, do_sample=False)


def test_a_short_prompt_does_not_run_the_speculator():
    result = pipeline(min_prompt_tokens=1000).generate(prompt(), 2)
    assert set(result.seconds) == {"tokenize", "base_prefill", "decode"}
    assert (result.backend, result.selection.importance) == ("none", None)


def test_no_layer_left_runs_dense():
    result = pipeline("mistral", window="skip").generate(prompt(), 2)
    assert result.mode == "dense"
    assert "sliding window" in result.reason


def test_a_base_that_counts_slots_runs_dense(caplog):
    base = build("llama", seed=7)
    base.config.alibi = True
    sp = SpecPrefill(base, build("llama", seed=3), config())
    assert "unsupported base" in caplog.text
    result = sp.generate(prompt(), 4)
    assert (result.mode, result.reason[:16]) == ("dense", "unsupported base")
    assert list(result.tokens) == ordinary(base, prompt(), 4, do_sample=False)


STATE_SPACE = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "eos_token_id": None}


def state_space_base():
    """Mamba: no attention, a cache of its own."""
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**STATE_SPACE, initializer_range=0.5)).eval()
    model.generation_config.pad_token_id = 0
    return model


def test_a_base_without_attention_runs_as_generate_runs_it():
    base, ids = state_space_base(), prompt()
    sp = SpecPrefill(base, build("llama"), config())
    expected = ordinary(base, ids, 8, do_sample=False)
    result = sp.generate(ids, 8)
    assert list(result.tokens) == expected
    assert result.mode == "dense"
    assert result.reason.startswith("unsupported base (MambaForCausalLM): no attention")
    assert set(result.seconds) == {"tokenize", "base_prefill", "decode"}
    assert list(sp.stream(ids, 8)) == expected


def test_errors_of_generate_reach_the_caller():
    sp = SpecPrefill(state_space_base(), build("llama"), config())
    with pytest.raises(ValueError, match="temprature"):
        sp.generate(prompt(), 4, temprature=1.0)


def test_an_abandoned_stream_stops_generating():
    base = state_space_base()
    forwards = []
    base.register_forward_pre_hook(lambda *_: forwards.append(1))
    stream = SpecPrefill(base, build("llama"), config()).stream(prompt(), 400)
    next(stream)
    del stream
    gc.collect()
    seen = len(forwards)
    assert seen < 400
    time.sleep(0.2)
    assert len(forwards) == seen


def test_a_speculator_with_too_short_a_context_runs_dense():
    sp = SpecPrefill(build("llama", seed=7), build("llama", max_position_embeddings=100), config())
    result = sp.generate(prompt(), 3)
    assert (result.mode, result.backend) == ("dense", "none")
    assert result.reason == "the speculator reads at most 100 tokens, the prompt has 150"
