"""Sparse prefill: kept tokens at their original positions, decode from position T on, windows by position."""

from __future__ import annotations

import pytest
import torch
from loop_models import FAMILIES, PROMPT, SLIDING, build, logits_by_hand, prompt
from transformers import AttentionInterface, DynamicCache
from transformers.models.gemma2 import modeling_gemma2

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop.attention import PREFIX
from specprefill_kernels.loop.prefill import BaseRun, PositionalAttention
from specprefill_kernels.loop.speculator import Speculator

KEPT = torch.cat([torch.arange(0, 20), torch.arange(37, 60), torch.arange(118, PROMPT)])


def run_by_hand(model, ids, steps):
    """Greedy tokens and the logits of each step, every step from scratch with hand-made masks."""
    positions, tokens, logits = KEPT, ids[:, KEPT], []
    for step in range(steps):
        logits.append(logits_by_hand(model, tokens, positions)[-1])
        tokens = torch.cat([tokens, logits[-1].argmax().reshape(1, 1)], dim=1)
        positions = torch.cat([positions, torch.tensor([PROMPT + step])])
    return torch.stack(logits)


def run_sparse(model, ids, steps):
    run = BaseRun(model, ids.shape[1], sparse=True)
    logits = [run.prefill(ids[:, KEPT], KEPT)[0]]
    for _ in range(steps - 1):
        logits.append(run.step(logits[-1].argmax().reshape(1, 1))[0])
    return torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_gapped_prefill_and_decode_equal_a_mask_by_position(family):
    model, ids = build(family), prompt()
    torch.testing.assert_close(run_sparse(model, ids, 5), run_by_hand(model, ids, 5), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_gives_the_same(family):
    model, ids = build(family, attn="eager"), prompt()
    torch.testing.assert_close(run_sparse(model, ids, 3), run_by_hand(model, ids, 3), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("attn", [None, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_may_come_in_pieces(family, attn):
    """Several queries behind a cache: SDPA's own is_causal would count from the first key."""
    model, ids = build(family, attn=attn), prompt()
    run, cut = BaseRun(model, PROMPT, sparse=True), 31  # 31 falls into the second kept span
    run.prefill(ids[:, KEPT[:cut]], KEPT[:cut])
    logits = run.prefill(ids[:, KEPT[cut:]], KEPT[cut:])
    torch.testing.assert_close(logits, run_by_hand(model, ids, 1), atol=2e-4, rtol=2e-4)


class Watched:
    """Stands in for a model's attention function: notes the mask that arrives."""

    def __init__(self):
        self.masks = []

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        self.masks.append(attention_mask)
        return query, None


@pytest.mark.parametrize(
    ("implementation", "queries", "keys", "masked"),
    [
        ("sdpa", 5, 5, False),
        ("sdpa", 1, 9, False),
        ("sdpa", 5, 9, True),
        ("eager", 1, 9, False),
        ("eager", 5, 5, True),
        ("eager", 5, 9, True),
        ("flash_attention_2", 5, 9, False),
        ("kernels-community/flash-attn", 5, 5, False),
    ],
)
@pytest.mark.parametrize("wrong_size", [False, True])
def test_a_mask_is_made_only_where_attention_is_not_causal_by_itself(implementation, queries, keys, masked, wrong_size):
    """A mask of the wrong size is Transformers', measured on another layer's cache."""
    watched, positions = Watched(), torch.arange(100, 100 + keys)
    handler = PositionalAttention(implementation, positions[keys - queries :], positions, 200)
    given = torch.ones(1, 1, queries, keys + 3, dtype=torch.bool) if wrong_size else None
    handler(watched, None, torch.zeros(1, 2, queries, 4), torch.zeros(1, 2, keys, 4), None, given)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    (mask,) = watched.masks
    if not masked:
        assert mask is None
    elif implementation == "eager":
        assert torch.equal(mask[0, 0] == 0, seen)
    else:
        assert torch.equal(mask[0, 0], seen)


def test_a_mask_of_the_right_size_is_passed_on():
    watched, positions, given = Watched(), torch.arange(5), torch.zeros(1, 1, 5, 5)
    query = torch.zeros(1, 2, 5, 4)
    PositionalAttention("eager", positions, positions, 5)(watched, None, query, query, query, given)
    assert watched.masks[0] is given


def test_without_a_cache_gaps_would_be_read_as_packed_sequences():
    """Negative control: the naive call differs, so the tests above can fail."""
    model, ids = build("llama"), prompt()
    with torch.no_grad():
        naive = model(input_ids=ids[:, KEPT], position_ids=KEPT[None], use_cache=False).logits[0, -1]
    right = logits_by_hand(model, ids[:, KEPT], KEPT)[-1]
    assert (naive - right).abs().max() > 0.05


@pytest.mark.parametrize("family", SLIDING)
def test_windows_by_slot_would_differ(family):
    """Negative control: Transformers' own sliding cache and masks, which count slots."""
    model, ids = build(family), prompt()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        by_slot = model(input_ids=ids[:, KEPT], position_ids=KEPT[None], past_key_values=cache).logits[0, -1]
    assert (by_slot - logits_by_hand(model, ids[:, KEPT], KEPT)[-1]).abs().max() > 0.05


def test_decode_goes_on_at_position_t():
    model, ids = build("llama"), prompt()
    seen = []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append((kwargs.get("position_ids", args[-1])).tolist()), with_kwargs=True
    )
    run_sparse(model, ids, 4)
    hook.remove()
    assert seen == [[KEPT.tolist()], [[PROMPT]], [[PROMPT + 1]], [[PROMPT + 2]]]


def test_full_attention_models_keep_is_causal():
    """No mask may reach SDPA, or its flash kernels are off."""
    model, ids = build("llama", attn="sdpa"), prompt()
    masks, ordinary = [], AttentionInterface()["sdpa"]

    def watch(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return ordinary(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("sdpa", watch)
    try:
        run_sparse(model, ids, 3)
    finally:
        AttentionInterface.register("sdpa", ordinary)
    assert len(masks) == 3 * model.config.num_hidden_layers
    assert all(mask is None for mask in masks)


class FakeFlash:
    """Stands in for flash attention, which no CPU has: notes what reaches it, computes with SDPA."""

    def __init__(self, model):
        self.calls = []
        self.stand_in = None
        AttentionInterface.register("flash_attention_2", self)
        self.model = model
        model.config._attn_implementation_internal = "flash_attention_2"

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        # The real one loads its kernel by this name, and reads these attributes.
        assert module.config._attn_implementation == "flash_attention_2"
        assert module.config.hidden_size == self.model.config.hidden_size
        assert module.is_causal
        assert any(isinstance(layer, torch.nn.Linear) for layer in module.modules())
        self.calls.append((module.layer_idx, attention_mask, dict(kwargs)))
        kwargs.pop("position_ids", None)
        if self.stand_in is not None:
            later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1 + key.shape[2] - query.shape[2])
            mask = torch.zeros(later.shape).masked_fill(later, torch.finfo(torch.float32).min)
            return self.stand_in(module, query, key, value, mask[None, None], **kwargs)
        return AttentionInterface()["sdpa"](module, query, key, value, None, **kwargs)


@pytest.fixture
def flash():
    ordinary = AttentionInterface()["flash_attention_2"]
    yield FakeFlash
    AttentionInterface.register("flash_attention_2", ordinary)
    AttentionInterface._global_mapping.pop(PREFIX + "flash_attention_2", None)


def test_flash_attention_never_sees_gapped_position_ids(flash):
    """It would split the prompt into packed sequences at the gaps."""
    model, ids = build("llama"), prompt()
    right = run_by_hand(model, ids, 3)
    fake = flash(model)
    torch.testing.assert_close(run_sparse(model, ids, 3), right, atol=2e-4, rtol=2e-4)
    assert len(fake.calls) == 3 * model.config.num_hidden_layers
    assert all(mask is None and kwargs.get("position_ids") is None for _, mask, kwargs in fake.calls)


def test_a_speculator_keeps_flash_attention(flash):
    model, ids = build("llama"), prompt()
    plain = Speculator(model, SpecPrefillConfig()).score(ids)
    fake = flash(model)
    hooked = Speculator(model, SpecPrefillConfig()).score(ids)
    torch.testing.assert_close(hooked.importance, plain.importance)
    assert len(fake.calls) == 8 * model.config.num_hidden_layers - 1  # the last row's last layer is not run
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("family", ["qwen2_sliding", "gemma3"])
def test_only_sliding_layers_leave_flash_attention(flash, family):
    model, ids = build(family), prompt()
    right = run_by_hand(model, ids, 3)
    fake = flash(model)
    torch.testing.assert_close(run_sparse(model, ids, 3), right, atol=2e-4, rtol=2e-4)
    assert sorted({layer for layer, _, _ in fake.calls}) == [1, 3]


def test_soft_capped_sliding_layers_go_to_eager(flash):
    """SDPA would leave the softcap out."""
    model, ids = build("gemma2"), prompt()
    right = run_by_hand(model, ids, 3)
    fake = flash(model)
    fake.stand_in = modeling_gemma2.eager_attention_forward
    torch.testing.assert_close(run_sparse(model, ids, 3), right, atol=2e-4, rtol=2e-4)
    assert sorted({layer for layer, _, _ in fake.calls}) == [1, 3]


def test_a_window_longer_than_the_prompt_needs_no_mask():
    model, ids = build("mistral", sliding_window=10 * PROMPT), prompt()
    right = run_by_hand(model, ids, 2)
    masks, ordinary = [], AttentionInterface()["sdpa"]

    def watch(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return ordinary(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("sdpa", watch)
    try:
        torch.testing.assert_close(run_sparse(model, ids, 2), right, atol=2e-4, rtol=2e-4)
    finally:
        AttentionInterface.register("sdpa", ordinary)
    assert masks
    assert all(mask is None for mask in masks)
