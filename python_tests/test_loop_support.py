"""Which models can play which part, and why not."""

from __future__ import annotations

import pytest
import torch
from loop_models import FAMILIES, VOCAB, build
from transformers import GPT2Config, GPT2LMHeadModel

from specprefill_kernels.loop.continuing import ContinuingRun
from specprefill_kernels.loop.support import check_continuing_layers, continuing_problem, decoder_layers

LAYERS = 4


@pytest.mark.parametrize(("layers", "error"), [((1, 3), "last < 3"), ((0, 9), "last < 3"), ((2, 1), "0 <= first")])
def test_layers_must_be_left_to_go_on(layers, error):
    with pytest.raises(ValueError, match=f"^self_layers: expected .*{error}"):
        ContinuingRun(build("llama"), layers)
    with pytest.raises(ValueError, match=r"^self_layers: "):
        check_continuing_layers(layers, LAYERS)
    assert check_continuing_layers((1, 2), LAYERS) == (1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_are_found(family):
    model = build(family)
    assert decoder_layers(model) == list(model.model.layers)
    assert continuing_problem(model) is None


def test_lists_of_experts_are_not_taken_for_layers():
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(LAYERS))
    assert decoder_layers(model) == list(model.model.layers)


def test_shared_layers_are_a_problem():
    model = build("llama")
    model.model.layers[3] = model.model.layers[2]
    assert "decoder layers" in continuing_problem(model)
    with pytest.raises(ValueError, match=r"^model: expected one whose upper layers"):
        ContinuingRun(model, (0, 1))


def test_models_that_reshape_to_the_prompts_length_are_refused():
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 2, "eos_token_id": None, "bos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    with pytest.raises(ValueError, match=r"^model: .*as many tokens after the last layer as before"):
        ContinuingRun(model, (0, 0))
