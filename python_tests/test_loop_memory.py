"""A speculator's memory over the turns of a conversation: the same importance with less work, whole after a failure."""

from __future__ import annotations

import pytest
import torch
from loop_models import FAMILIES, build, prompt

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop.cache import GrowingLayer, full_cache
from specprefill_kernels.loop.memory import SpeculatorMemory
from specprefill_kernels.loop.speculator import NothingToScore, Speculator

MODES = ("look_ahead", "observation_window", "both")
ROWS = {"look_ahead": 1, "observation_window": 8, "both": 11}


def config(queries, chunk=50, **changes):
    return SpecPrefillConfig(queries=queries, observation_rows=11, prefill_chunk=chunk, **changes)


def forwards(model):
    """Tokens of each forward that reached the first layer."""
    lengths = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    return lengths


def same(ours, fresh):
    torch.testing.assert_close(ours.importance, fresh.importance, atol=1e-6, rtol=1e-4)
    for name in ("num_look_ahead", "layers", "look_ahead_tokens"):
        assert getattr(ours, name) == getattr(fresh, name)


@pytest.mark.parametrize("queries", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_scores_as_from_scratch(family, queries):
    """Longer, edited in the middle, shorter, and longer than the buffers."""
    model, text = build(family), prompt(400)
    edited = text.clone()
    edited[0, 100] = (edited[0, 100] + 1) % 300
    memory, rows = SpeculatorMemory(), ROWS[queries]
    speculator = Speculator(model, config(queries))
    turns = [(text[:, :150], 0), (text[:, :230], 150), (edited[:, :260], 100), (edited[:, :70], 70 - rows)]
    for ids, reused in [*turns, (edited, 70)]:
        ours = speculator.score(ids, memory=memory)
        assert ours.reused_tokens == reused
        assert len(memory) == ids.shape[1]
        same(ours, speculator.score(ids))


@pytest.mark.parametrize("chunk", [None, 7, 16])
@pytest.mark.parametrize("queries", MODES)
def test_only_what_is_new_is_computed(queries, chunk):
    model, text = build("llama"), prompt(240)
    speculator, memory = Speculator(model, config(queries, chunk)), SpeculatorMemory()
    speculator.score(text[:, :200], memory=memory)
    lengths = forwards(model)
    ours = speculator.score(text, memory=memory)
    decoded = len(ours.look_ahead_tokens)
    prefill = lengths[: len(lengths) - decoded]
    assert sum(prefill) == 40
    assert max(prefill) <= max(chunk or 40, ROWS[queries])
    same(ours, speculator.score(text))


@pytest.mark.parametrize("queries", MODES)
def test_the_same_prompt_again_runs_only_the_query_rows(queries):
    model, ids = build("gemma3"), prompt()
    speculator, memory = Speculator(model, config(queries)), SpeculatorMemory()
    first = speculator.score(ids, memory=memory)
    lengths = forwards(model)
    again = speculator.score(ids, memory=memory)
    assert lengths[0] == ROWS[queries]
    assert again.reused_tokens == ids.shape[1] - ROWS[queries]
    same(again, first)


@pytest.mark.parametrize("queries", MODES)
@pytest.mark.parametrize("length", [1, 5, 8, 12])
def test_short_prompts(queries, length):
    model, text = build("llama"), prompt()
    speculator, memory = Speculator(model, config(queries)), SpeculatorMemory()
    for size in (length, length, length + 1, 150, length):
        ids = text[:, :size]
        ours = speculator.score(ids, memory=memory)
        assert ours.reused_tokens <= max(0, size - min(size, ROWS[queries]))
        same(ours, speculator.score(ids))


def test_look_ahead_keys_behind_the_prompt_are_not_scored():
    """The second turn's buffer holds the first one's look-ahead keys until they are written over."""
    model, text = build("llama"), prompt(300)
    for normalize_over in ("prompt", "visible"):
        speculator = Speculator(model, config("look_ahead", normalize_over=normalize_over))
        memory = SpeculatorMemory()
        for size in (200, 150, 152, 201, 300):
            same(speculator.score(text[:, :size], memory=memory), speculator.score(text[:, :size]))


def test_look_ahead_tokens_do_not_stay():
    model, ids = build("llama"), prompt()
    memory = SpeculatorMemory()
    Speculator(model, config("look_ahead")).score(ids, memory=memory)
    assert [layer.get_seq_length() for layer in memory._cache.layers] == [150] * 4
    # Two KV heads of 16 in fp32, keys and values, four layers.
    assert memory.nbytes == 150 * 2 * 16 * 4 * 2 * 4


def test_an_early_eos_in_one_turn_leaves_the_next_right():
    model, text = build("llama"), prompt(300)
    speculator, memory = Speculator(model, config("look_ahead")), SpeculatorMemory()
    tokens = speculator.score(text[:, :200]).look_ahead_tokens
    step = next(s for s in range(1, 7) if tokens[s] not in tokens[:s])
    model.generation_config.eos_token_id = tokens[step]
    short = Speculator(model, config("look_ahead"))
    assert short.score(text[:, :200], memory=memory).num_look_ahead == step + 1
    same(speculator.score(text, memory=memory), speculator.score(text))


def test_a_subset_of_layers_is_remembered_without_the_rest():
    model, text = build("llama"), prompt(200)
    speculator, memory = Speculator(model, config("observation_window", score_layers=(0, 2))), SpeculatorMemory()
    speculator.score(text[:, :150], memory=memory)
    ours = speculator.score(text, memory=memory)
    assert ours.reused_tokens == 150
    same(ours, speculator.score(text))
    # Layers 0 and 1 with values, layer 2 keys only, layer 3 nothing.
    assert memory.nbytes == 200 * 2 * 16 * 4 * 5


@pytest.mark.parametrize(
    "change",
    [
        lambda model: Speculator(model, config("look_ahead")),  # needs the layers above, and values of layer 2
        lambda model: Speculator(model, config("observation_window", score_layers=(1,))),
        lambda _: Speculator(build("llama", seed=9), config("observation_window", score_layers=(0, 2))),
    ],
    ids=["decodes", "fewer layers", "another model"],
)
def test_a_memory_of_other_layers_starts_anew(change):
    model, text = build("llama"), prompt(200)
    memory = SpeculatorMemory()
    first = Speculator(model, config("observation_window", score_layers=(0, 2)))
    first.score(text[:, :150], memory=memory)
    other = change(model)
    ours = other.score(text, memory=memory)
    assert ours.reused_tokens == 0
    same(ours, other.score(text))
    same(first.score(text, memory=memory), first.score(text))


def test_other_rows_of_the_same_layers_share_a_memory():
    model, text = build("llama"), prompt(200)
    memory = SpeculatorMemory()
    Speculator(model, config("look_ahead")).score(text[:, :150], memory=memory)
    both = Speculator(model, config("both"))
    ours = both.score(text, memory=memory)
    assert ours.reused_tokens == 150
    same(ours, both.score(text))


def test_a_prompt_that_is_too_long_leaves_the_memory_as_it_was():
    model, text = build("llama", max_position_embeddings=160), prompt(200)
    speculator, memory = Speculator(model, config("look_ahead")), SpeculatorMemory()
    speculator.score(text[:, :150], memory=memory)
    with pytest.raises(NothingToScore, match="at most 160 tokens"):
        speculator.score(text, memory=memory)
    assert len(memory) == 150
    ours = speculator.score(text[:, :160], memory=memory)
    assert ours.reused_tokens == 150
    same(ours, speculator.score(text[:, :160]))


@pytest.mark.parametrize("queries", MODES)
@pytest.mark.parametrize("when", range(1, 18, 3))
def test_a_failure_anywhere_leaves_what_was_reusable(queries, when):
    """Attention fails at its `when`-th call of the second turn: in either chunk, or while decoding."""
    model, text = build("llama"), prompt(240)
    speculator, memory = Speculator(model, config(queries, 30)), SpeculatorMemory()
    speculator.score(text[:, :150], memory=memory)
    calls = []

    def fail(*_):
        calls.append(0)
        if len(calls) == when:
            raise KeyboardInterrupt

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(fail) for layer in model.model.layers]
    edited = text.clone()
    edited[0, 120] = (edited[0, 120] + 1) % 300
    if when <= (9 if queries == "observation_window" else 16):
        with pytest.raises(KeyboardInterrupt):
            speculator.score(edited, memory=memory)
        assert len(memory) == 120
    for hook in hooks:
        hook.remove()
    ours = speculator.score(text, memory=memory)
    assert ours.reused_tokens >= 120
    same(ours, speculator.score(text))


def test_a_failure_of_the_first_turn_leaves_it_empty():
    model, ids = build("llama"), prompt()

    def fail(*_):
        raise ZeroDivisionError

    memory = SpeculatorMemory()
    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        Speculator(model, config("look_ahead")).score(ids, memory=memory)
    hook.remove()
    assert len(memory) == memory.nbytes == 0
    same(*[Speculator(model, config("look_ahead")).score(ids, memory=m) for m in (memory, None)])


def test_ids_changed_in_place_by_the_caller_do_not_count():
    model, ids = build("llama"), prompt()
    speculator, memory = Speculator(model, config("look_ahead")), SpeculatorMemory()
    speculator.score(ids, memory=memory)
    ids[0, 60] = (ids[0, 60] + 1) % 300
    ours = speculator.score(ids, memory=memory)
    assert ours.reused_tokens == 60
    same(ours, speculator.score(ids))


def test_clearing():
    model, ids = build("llama"), prompt()
    speculator, memory = Speculator(model, config("look_ahead")), SpeculatorMemory()
    speculator.score(ids, memory=memory)
    memory.clear()
    assert len(memory) == memory.nbytes == 0
    assert speculator.score(ids, memory=memory).reused_tokens == 0


def test_a_truncated_layer_goes_on_behind_what_is_left():
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randn(1, 2, length, 4, generator=generator) for length in (7, 5, 6)]
    layer = GrowingLayer(room=30)
    layer.update(pieces[0], 2 * pieces[0])
    before, _ = layer.update(pieces[1], 2 * pieces[1])
    kept = before.clone()
    layer.truncate(9)
    assert layer.get_seq_length() == 9
    assert torch.equal(before, kept)  # nothing moved yet
    keys, values = layer.update(pieces[2], 2 * pieces[2])
    assert torch.equal(keys, torch.cat([pieces[0], pieces[1][:, :, :2], pieces[2]], dim=2))
    assert torch.equal(values, 2 * keys)
    layer.truncate(99)
    assert layer.get_seq_length() == 15
    layer.crop(-14)
    assert torch.equal(layer.keys, pieces[0][:, :, :1])
    layer.crop(0)
    assert layer.get_seq_length() == 1
    with pytest.raises(ValueError, match="tokens_to_remove: expected a negative number or 0, got 3"):
        layer.crop(3)
    layer.truncate(0)
    assert layer.get_seq_length() == 0
    keys, _ = layer.update(pieces[0], pieces[0])
    assert torch.equal(keys, pieces[0])


def test_a_truncated_cache_of_transformers_goes_on():
    """`Cache.crop`, which a caller may use: it goes through the layers."""
    model, ids = build("llama"), prompt()
    cache = full_cache(4, room=4)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        cache.crop(-20)
        cropped = model(input_ids=ids[:, 130:131], past_key_values=cache).logits
        torch.testing.assert_close(cropped, model(input_ids=ids[:, :131]).logits[:, -1:], atol=1e-4, rtol=1e-4)


def test_reserved_room_is_taken_once():
    layer = GrowingLayer(room=0)
    layer.reserve(40)
    where = set()
    for _ in range(8):
        keys, _ = layer.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
        where.add(keys.data_ptr())
    assert len(where) == 1
    assert layer.keys.untyped_storage().nbytes() == 40 * 2 * 4 * 4
