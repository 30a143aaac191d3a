"""Lower layers read the whole prompt once, upper ones the kept tokens: equal to the same layers called by hand."""

from __future__ import annotations

import threading

import pytest
import torch
from loop_models import FAMILIES, PROMPT, SLIDING, build, ordinary, prompt
from transformers import AttentionInterface, DynamicCache

from specprefill_kernels.loop.attention import PREFIX
from specprefill_kernels.loop.continuing import ContinuingRun

KEPT = torch.cat([torch.arange(0, 20), torch.arange(37, 60), torch.arange(118, PROMPT)])
LAYERS = 4


def keep(kept=KEPT):
    return lambda captured: kept


def run(model, ids, steps, *, layers=(0, 1), kept=KEPT, **options):
    """Logits of the prefill and of greedy steps, [steps, V]; and the run."""
    sut = ContinuingRun(model, layers, **options)
    logits = [sut.prefill(ids, keep(kept))[0]]
    for _ in range(steps - 1):
        logits.append(sut.step(logits[-1].argmax().reshape(1, 1))[0])
    return torch.stack(logits), sut


def mask(model, layer, positions):
    """4D, causal and windowed by position, in the form that this model's attention takes."""
    types = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None)
    if types is not None and types[layer] != "sliding_attention":
        window = None
    distance = positions[:, None] - positions[None, :]
    seen = (distance >= 0) & (distance < (window or 10**9))
    if model.config._attn_implementation == "eager":
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    return seen[None, None]


@torch.no_grad()
def by_hand(model, ids, last, kept):
    """Last-token logits: hidden states of the ordinary model after layer `last`, upper layers one by one, no cache."""
    body, seq_len = model.model, ids.shape[1]
    hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[last + 1][:, kept]
    for index in range(last + 1, LAYERS):
        rotary = (hidden, kept[None])
        if model.config.model_type == "gemma3_text":
            rotary = (*rotary, model.config.layer_types[index])
        hidden = body.layers[index](
            hidden,
            attention_mask=mask(model, index, kept),
            position_embeddings=body.rotary_emb(*rotary),
            position_ids=kept[None],
        )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    assert seq_len > int(kept[-1])
    logits = model.lm_head(body.norm(hidden))[0, -1]
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def greedy_by_hand(model, ids, last, steps):
    """Each step from scratch: generated tokens go through both parts."""
    logits, kept = [], KEPT
    for step in range(steps):
        logits.append(by_hand(model, ids, last, kept))
        ids = torch.cat([ids, logits[-1].argmax().reshape(1, 1)], dim=1)
        kept = torch.cat([kept, torch.tensor([PROMPT + step])])
    return torch.stack(logits)


@pytest.mark.parametrize("attn", [None, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_the_layers_called_by_hand(family, attn):
    model, ids = build(family, attn=attn), prompt()
    logits, _ = run(model, ids, 5)
    torch.testing.assert_close(logits, greedy_by_hand(model, ids, 1, 5), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("last", [0, 2])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_cut_is_right_above_the_last_layer(family, last):
    model, ids = build(family), prompt()
    logits, _ = run(model, ids, 3, layers=(0, last))
    torch.testing.assert_close(logits, greedy_by_hand(model, ids, last, 3), atol=2e-4, rtol=2e-4)
    assert (logits[0] - by_hand(model, ids, 1, KEPT)).abs().max() > 0.05  # a cut elsewhere would show


@pytest.mark.parametrize(
    ("chunk", "attn"),
    [*((chunk, None) for chunk in (1, 32, 64, 149, 150, 151)), *((chunk, "eager") for chunk in (32, 149))],
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3"])
def test_the_lower_layers_may_read_in_chunks(family, chunk, attn):
    model, ids = build(family, attn=attn), prompt()
    whole, _ = run(model, ids, 3)
    logits, sut = run(model, ids, 3, prefill_chunk=chunk)
    torch.testing.assert_close(logits, whole, atol=2e-4, rtol=2e-4)
    assert lengths(sut.cache) == [PROMPT + 2] * 2 + [len(KEPT) + 2] * 2


def test_a_chunked_prefill_captures_the_same():
    model, ids = build("gemma3"), prompt()
    seen = []
    for chunk in (None, 40):  # 150 tokens: the fourth chunk would be shorter than the 40 rows that are captured

        def choose(captured):
            seen.append({i: (torch.cat(layer.queries, 1), layer.key.clone()) for i, layer in captured.items()})
            return KEPT

        ContinuingRun(model, (0, 1), rows=40, prefill_chunk=chunk).prefill(ids, choose)
    for layer in (0, 1):
        for whole, chunked in zip(seen[0][layer], seen[1][layer]):
            assert whole.shape == chunked.shape
            torch.testing.assert_close(whole, chunked, atol=1e-4, rtol=1e-4)


def test_chunks_need_every_kind_of_layer_below_the_cut():
    """Gemma-3's full layers have position embeddings of their own, which layer 0 (sliding) never gets."""
    model, ids = build("gemma3"), prompt()
    calls = count_attention(model, lambda: run(model, ids, 1, layers=(0, 0), prefill_chunk=32))
    assert [rows for layer, rows, _ in calls if layer == 0] == [PROMPT]


def lengths(cache):
    return [cache.get_seq_length(layer) for layer in range(LAYERS)]


def count_attention(model, work):
    """(layer, query rows, keys) of every attention call."""
    name = model.config._attn_implementation
    calls, before = [], AttentionInterface()[name]

    def watch(module, query, key, *args, **kwargs):
        calls.append((module.layer_idx, query.shape[2], key.shape[2]))
        return before(module, query, key, *args, **kwargs)

    AttentionInterface.register(name, watch)
    try:
        work()
    finally:
        AttentionInterface.register(name, before)
    return calls


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_layer_runs_once_and_the_upper_ones_over_kept_tokens_only(family):
    model, ids, kept = build(family), prompt(), len(KEPT)
    calls = count_attention(model, lambda: run(model, ids, 2))
    first = [(layer, PROMPT if layer < 2 else kept, PROMPT if layer < 2 else kept) for layer in range(LAYERS)]
    second = [(layer, 1, PROMPT + 1 if layer < 2 else kept + 1) for layer in range(LAYERS)]
    assert calls == first + second


def test_caches_have_unequal_lengths():
    _, sut = run(build("llama"), prompt(), 1)
    assert lengths(sut.cache) == [PROMPT] * 2 + [len(KEPT)] * 2
    assert torch.equal(sut.kept, KEPT)


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_token_equals_generate(family, chunk):
    model, ids = build(family), prompt()
    logits, _ = run(model, ids, 8, kept=torch.arange(PROMPT), prefill_chunk=chunk)
    assert logits.argmax(-1).tolist() == ordinary(model, ids, 8, do_sample=False)


def test_the_captured_rows_are_the_last_ones_of_the_layers_asked_for():
    model, ids, got = build("llama"), prompt(), {}

    def choose(captured):
        got.update(captured)
        return KEPT

    ContinuingRun(model, (1, 2), rows=5).prefill(ids, choose)
    assert sorted(got) == [1, 2]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        hidden = model(ids, past_key_values=cache, output_hidden_states=True).hidden_states[1]
        layer = model.model.layers[1]
        query = layer.self_attn.q_proj(layer.input_layernorm(hidden)).view(1, PROMPT, 4, 16)
        cos, sin = model.model.rotary_emb(hidden, torch.arange(PROMPT)[None])
    half = torch.cat([-query[..., 8:], query[..., :8]], -1)
    rotated = query * cos[:, :, None] + half * sin[:, :, None]
    torch.testing.assert_close(torch.cat(got[1].queries, 1), rotated[:, -5:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[2].key, cache.layers[2].keys, atol=1e-5, rtol=1e-5)


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("chunk", [None, 64])
def test_nothing_stays_on_the_model(chunk):
    model, ids = build("gemma3"), prompt()
    implementation, before = model.config._attn_implementation, model(ids).logits
    run(model, ids, 2, prefill_chunk=chunk)

    def fail(captured):
        assert hooks(model) >= LAYERS - 2
        raise KeyError("from choose")

    with pytest.raises(KeyError, match="from choose"):
        ContinuingRun(model, (0, 1), prefill_chunk=chunk).prefill(ids, fail)
    assert hooks(model) == 0
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, before)


def test_another_thread_sees_no_cut():
    model, ids = build("llama"), prompt()
    with torch.no_grad():
        expected = model(ids).logits
    got = []

    def choose(captured):
        with torch.no_grad():
            other = threading.Thread(target=lambda: got.append(model(ids).logits.detach()))
            other.start()
            other.join()
        return KEPT

    logits = ContinuingRun(model, (0, 1)).prefill(ids, choose)
    torch.testing.assert_close(got[0], expected)
    torch.testing.assert_close(logits, run(model, ids, 1)[0])


def test_attention_that_bypasses_the_handler_is_an_error():
    """Two loops on one model in two threads share the config's one attention function."""
    model, ids = build("mistral"), prompt()

    def choose(captured):
        model.config._attn_implementation_internal = "sdpa"
        return KEPT

    with pytest.raises(RuntimeError, match=r"layers \[2, 3\] did not come through"):
        ContinuingRun(model, (0, 1)).prefill(ids, choose)


class FakeFlash:
    """Stands in for flash attention, which no CPU has: causal from the last key on, as the real one."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        assert kwargs.get("position_ids") is None
        self.calls.append(module.layer_idx)
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        return AttentionInterface()["sdpa"](module, query, key, value, seen[None, None], scaling=kwargs.get("scaling"))


@pytest.mark.parametrize("chunk", [None, 64])
def test_flash_attention_stays_on_in_both_parts(chunk):
    model, ids = build("llama"), prompt()
    right, _ = run(model, ids, 3)
    ordinary_flash, fake = AttentionInterface()["flash_attention_2"], FakeFlash()
    AttentionInterface.register("flash_attention_2", fake)
    try:
        model.config._attn_implementation_internal = "flash_attention_2"
        logits, _ = run(model, ids, 3, prefill_chunk=chunk)
    finally:
        AttentionInterface.register("flash_attention_2", ordinary_flash)
        AttentionInterface._global_mapping.pop(PREFIX + "flash_attention_2", None)
    torch.testing.assert_close(logits, right, atol=2e-4, rtol=2e-4)
    chunks_before_the_last = 0 if chunk is None else 2
    assert fake.calls == [0, 1] * chunks_before_the_last + [0, 1, 2, 3] * 3


def test_full_attention_keeps_is_causal():
    """No mask may reach SDPA in a prefill at once, or its flash kernels are off."""
    model, ids, masks = build("llama", attn="sdpa"), prompt(), []
    before = AttentionInterface()["sdpa"]

    def watch(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return before(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("sdpa", watch)
    try:
        run(model, ids, 3)
    finally:
        AttentionInterface.register("sdpa", before)
    assert masks == [None] * 3 * LAYERS


class PositionalBlock(torch.nn.Module):
    """A decoder layer that takes everything by position, as GPT-2's blocks do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, position_embeddings, attention_mask, position_ids, past_key_values):
        return self.layer(
            hidden_states, attention_mask, position_ids, past_key_values, position_embeddings=position_embeddings
        )


class Reordering(torch.nn.Module):
    """Calls its block with positional arguments only."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, **kwargs):
        names = ("position_embeddings", "attention_mask", "position_ids", "past_key_values")
        return self.block(hidden_states, *(kwargs.get(name) for name in names))


@pytest.mark.parametrize("chunk", [None, 64])
def test_layers_may_take_positional_arguments(chunk):
    model, ids = build("llama"), prompt()
    right, _ = run(model, ids, 3)
    blocks = torch.nn.ModuleList(PositionalBlock(layer) for layer in model.model.layers)
    model.model.layers = torch.nn.Sequential(*(Reordering(block) for block in blocks))
    model.model.blocks = blocks
    torch.testing.assert_close(run(model, ids, 3, prefill_chunk=chunk)[0], right, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("kept", "got"),
    [
        ([0, 1], "got 1"),
        ([], "got none"),
        ([3, 3, PROMPT - 1], "ascending"),
        ([9, 3, PROMPT - 1], "ascending"),
        ([-1, PROMPT - 1], "ascending"),
        ([0, PROMPT], f"got {PROMPT}"),
    ],
)
def test_wrong_choices_are_named(kept, got):
    model = build("llama")
    with pytest.raises(ValueError, match=rf"^kept: .*{got}"):
        ContinuingRun(model, (0, 1)).prefill(prompt(), keep(torch.tensor(kept, dtype=torch.int64)))
    assert hooks(model) == 0


@pytest.mark.parametrize("kept", [None, [0, 1], torch.ones(PROMPT, dtype=torch.bool), torch.zeros(1, 3).long()])
def test_choices_are_integer_tensors(kept):
    with pytest.raises(ValueError, match=r"^kept: expected integer positions \[K\]"):
        ContinuingRun(build("llama"), (0, 1)).prefill(prompt(), keep(kept))


def test_int32_positions_do():
    model, ids = build("llama"), prompt()
    assert torch.equal(run(model, ids, 2, kept=KEPT.to(torch.int32))[0], run(model, ids, 2)[0])


def test_a_run_is_one_prompt():
    sut = ContinuingRun(build("llama"), (0, 1))
    with pytest.raises(RuntimeError, match=r"^step: expected a prefill"):
        sut.step(torch.tensor([[1]]))
    sut.prefill(prompt(), keep())
    with pytest.raises(RuntimeError, match=r"^prefill: expected one call"):
        sut.prefill(prompt(), keep())
    failed = ContinuingRun(build("llama"), (0, 1))
    with pytest.raises(ValueError, match=r"^kept: "):
        failed.prefill(prompt(), keep(torch.tensor([0])))
    with pytest.raises(RuntimeError, match=r"^prefill: expected one call"):  # its lower layers hold the prompt already
        failed.prefill(prompt(), keep())
    with pytest.raises(RuntimeError, match=r"^step: expected a prefill"):
        failed.step(torch.tensor([[1]]))


def test_windows_bind_in_these_models():
    for family in SLIDING:
        assert build(family).config.sliding_window < PROMPT // 2
