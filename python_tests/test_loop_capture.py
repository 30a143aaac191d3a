"""Capture: what the attention function really got, no more layers than needed, and a model left as it was."""

from __future__ import annotations

import threading

import pytest
import torch
from loop_models import PROMPT, build, prompt
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop import attention
from specprefill_kernels.loop.attention import attention_configs, attention_handler
from specprefill_kernels.loop.cache import GrowingLayer, full_cache
from specprefill_kernels.loop.capture import Capture
from specprefill_kernels.loop.speculator import Speculator


def implementations(model):
    return [config._attn_implementation for config in attention_configs(model)]


@torch.no_grad()
def test_captured_queries_and_keys_are_post_rope():
    model, ids = build("llama"), prompt()
    capture = Capture(attention_configs(model), None)
    hidden = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _module, _args, kwargs, index=index: hidden.update({index: kwargs["hidden_states"]}),
            with_kwargs=True,
        )
        for index, layer in enumerate(model.model.layers)
    ]
    with capture.running(3):
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    cos, sin = model.model.rotary_emb(hidden[0], torch.arange(PROMPT)[None])
    for index, layer in enumerate(model.model.layers):
        query = layer.self_attn.q_proj(hidden[index]).view(1, PROMPT, 4, 16).transpose(1, 2)
        key = layer.self_attn.k_proj(hidden[index]).view(1, PROMPT, 2, 16).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        torch.testing.assert_close(capture.layers[index].queries[0], query[:, :, -3:].transpose(1, 2))
        torch.testing.assert_close(capture.layers[index].key, key)
        assert capture.layers[index].scale == 16**-0.5
        # Three rows and not the memory of the whole prompt's queries.
        assert capture.layers[index].queries[0].untyped_storage().nbytes() == 3 * 4 * 16 * 4


@torch.no_grad()
def test_output_is_the_models_own():
    model, ids = build("gemma2"), prompt()
    plain = model(input_ids=ids, use_cache=False).logits
    capture = Capture(attention_configs(model), None)
    with capture.running(1):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
    assert [(layer.softcap, layer.window) for layer in capture.layers.values()] == [(5.0, 24), (5.0, None)] * 2


def count_calls(model):
    calls = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(("layer", index)))
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(("mlp", index)))
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(("head", 0)))
    return calls


def test_a_scoring_pass_stops_after_the_last_layer_needed():
    model = build("llama")
    calls = count_calls(model)
    config = SpecPrefillConfig(queries="observation_window")
    assert Speculator(model, config, layer_range=(1, 2)).score(prompt()).layers == (1, 2)
    assert calls == [("layer", 0), ("mlp", 0), ("layer", 1), ("mlp", 1), ("layer", 2)]


def test_the_last_look_ahead_step_stops_early_too():
    model = build("llama")
    calls = count_calls(model)
    Speculator(model, SpecPrefillConfig(look_ahead=3, score_layers=(1,))).score(prompt())
    assert calls.count(("head", 0)) == 2  # the prefill and one step; the last step's output is not needed
    assert calls.count(("layer", 1)) == 3
    assert calls.count(("layer", 3)) == 2


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_implementation_comes_back(attn):
    model = build("llama", attn=attn)
    before = implementations(model)
    assert set(before) == {attn}
    Speculator(model, SpecPrefillConfig()).score(prompt())
    assert implementations(model) == before


def test_the_implementation_comes_back_after_an_exception():
    model = build("llama")
    before = implementations(model)

    during = []

    def broken(*_args, **_kwargs):
        during.extend(implementations(model))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), attention_handler(attention_configs(model), broken):
        model(input_ids=prompt())
    assert set(during).isdisjoint(before)
    assert attention._handler.get() is None
    assert implementations(model) == before
    with torch.no_grad():
        model(input_ids=prompt())


@pytest.mark.parametrize(("attn", "behind"), [("sdpa", False), ("sdpa", True), ("eager", True)])
def test_another_thread_is_not_captured(attn, behind):
    """The handler belongs to the thread that set it, even on the same model; masks made here are for that thread."""
    model, ids = build("gemma3", attn=attn), prompt()
    capture = Capture(attention_configs(model), None)
    result = {}

    def other():
        with torch.no_grad():
            result["logits"] = model(input_ids=ids, use_cache=False).logits

    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    with capture.running(1, behind=behind):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert torch.equal(result["logits"], plain)
    assert not capture.layers


def test_a_growing_layer_holds_what_was_written():
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randn(1, 2, length, 4, generator=generator) for length in (7, 1, 1, 5, 1, 1, 1)]
    layer = GrowingLayer(room=3)
    for count in range(1, len(pieces) + 1):
        piece = pieces[count - 1]
        keys, values = layer.update(piece, 2 * piece)
        assert torch.equal(keys, torch.cat(pieces[:count], dim=2))
        assert torch.equal(values, 2 * keys)
        assert layer.get_seq_length() == keys.shape[2]


def test_decode_within_the_reserved_room_copies_nothing():
    model, ids = build("llama"), prompt()
    cache = full_cache(4, room=2)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        where = [layer.keys.data_ptr() for layer in cache.layers]
        for _ in range(2):
            model(input_ids=ids[:, :1], past_key_values=cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == where
