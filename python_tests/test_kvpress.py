"""The press prunes what the definition says, layer by layer or by a speculator's importance. Needs kvpress."""

from __future__ import annotations

import pytest
import torch
import transformers
from grid import same

pytest.importorskip("kvpress", reason="kvpress is not installed (run.py kvpress tests it)")
from kvpress import AdaKVPress, KnormPress
from loop_models import PROMPT, build, byte_tokenizer, prompt
from transformers import AttentionInterface, DynamicCache, pipeline

import specprefill_kernels as spk
from specprefill_kernels.integrations.kvpress import SpeculativePrefillPress as Press

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "qwen2_sliding", "gemma3")
PAPER = {"pool_kernel_size": 13, "pool_order": "before_max", "reduce": "mean", "chunk_size": 1}


def attention_layers(model):
    return [layer.self_attn for layer in model.model.layers]


def captured(model, ids):
    """[(query, key, scale, window)] as each layer's attention got them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def handler(module, query, key, value, mask, **kwargs):
        seen.append((query, key, kwargs["scaling"], kwargs.get("sliding_window")))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("kvpress_test", handler)
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionMaskInterface.register("kvpress_test", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("kvpress_test")
    try:
        with torch.no_grad():
            model(ids)
    finally:
        model.set_attn_implementation(before)
    return seen


def importances(model, ids, *, rows=8, kernel=13, reduce="mean", order="before_max", heads=slice(None)):
    """Of each layer, [B, T], from what its attention got, by the reference."""
    found = []
    for query, key, scale, window in captured(model, ids):
        group = query.shape[1] // key.shape[1]
        own = slice(heads.start and heads.start * group, heads.stop and heads.stop * group)
        state = spk.new_state(len(ids), rows, ids.shape[1])
        spk.score_layer_(
            state, query[:, own, -rows:].transpose(1, 2), key[:, heads], queries="observation_window", scale=scale,
            window=window, pool_kernel_size=kernel, pool_order=order, backend="reference",
        )  # fmt: skip
        late = {"pool_kernel_size": kernel} if order == "after_max" else {}
        found.append(spk.finalize_importance(state, reduce=reduce, backend="reference", **late))
    return found


def scores(press, model, ids):
    """What the press gives each layer's entries."""
    seen = []

    class Recording(type(press)):
        def score(self, *args, **kwargs):
            seen.append(super().score(*args, **kwargs))
            return seen[-1]

    press.__class__ = Recording
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model.model(ids, past_key_values=cache)
    return seen, cache


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_definition_of_the_layer(family):
    model, ids = build(family), torch.cat([prompt(), prompt(seed=2)])
    seen, _ = scores(Press(0.5, **PAPER), model, ids)
    for score, expected in zip(seen, importances(model, ids), strict=True):
        assert score.shape == (2, 2, PROMPT)
        torch.testing.assert_close(score, expected[:, None].expand(-1, 2, -1), rtol=1e-4, atol=1e-7)


def test_each_kv_head_for_itself():
    model, ids = build("llama"), torch.cat([prompt(), prompt(seed=2)])
    seen, _ = scores(Press(0.5, per_head=True, **PAPER), model, ids)
    for head in range(2):
        expected = importances(model, ids, heads=slice(head, head + 1))
        for score, wanted in zip(seen, expected, strict=True):
            torch.testing.assert_close(score[:, head], wanted, rtol=1e-4, atol=1e-7)
    assert not torch.equal(seen[0][:, 0], seen[0][:, 1])


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_defaults_keep_the_chunks_of_the_preset(ratio):
    """Where the budget is whole chunks: the same tokens as `select_chunks`, in every layer and head."""
    tokens = 160
    model, ids = build("llama"), prompt(tokens)
    _, cache = scores(Press(ratio), model, ids)
    options = {"kernel": 31, "reduce": "max", "order": "after_max"}
    full = DynamicCache()
    with torch.no_grad():
        model.model(ids, past_key_values=full)
    for index, importance in enumerate(importances(model, ids, **options)):
        kept = spk.select_chunks(importance, keep_tokens=round(tokens * (1 - ratio)), chunk_size=8, rounding="floor")
        wanted = kept.indices[0, : int(kept.num_kept[0])].long()
        assert len(wanted) == tokens - round(tokens * ratio)
        actual = cache.layers[index].keys
        # topk gives them best first
        expected = full.layers[index].keys[:, :, wanted]
        assert actual.shape == expected.shape
        assert {tuple(row.tolist()) for row in actual[0, 1]} == {tuple(row.tolist()) for row in expected[0, 1]}


def test_as_many_entries_as_other_presses_keep():
    model, ids = build("llama"), prompt()
    for ratio in (0.0, 0.13, 0.5, 0.99, 0.999):
        _, ours = scores(Press(ratio), model, ids)
        _, theirs = scores(KnormPress(ratio), model, ids)
        assert ours.get_seq_length() == theirs.get_seq_length() == max(1, int(PROMPT * (1 - ratio)))


def test_ranks_break_ties_and_short_chunks_count_their_own_tokens():
    press = Press(0.5, chunk_size=4, importance=torch.tensor([1.0, 1, 1, 1, 5, 0, 0, 0, 1, 1, 1, 1, 1.2]))
    assert order(press, 13) == [4, 5, 6, 7, 12, 0, 1, 2, 3, 8, 9, 10, 11]
    press = Press(0.5, chunk_size=4, importance=torch.zeros(5001))
    assert order(press, 5001) == list(range(5001))


def order(press, tokens):
    """Positions, the best first, as `topk` has them."""
    keys = torch.zeros(1, 2, tokens, 4)
    score = press.score(None, torch.zeros(1, tokens, 4), keys, keys, None, {})
    assert score.shape == (1, 2, tokens)
    same(score[:, 0], score[:, 1])
    return score[0, 0].topk(tokens).indices.tolist()


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_protected_tokens_come_first(chunk_size):
    given = torch.arange(16.0)
    press = Press(0.5, chunk_size=chunk_size, sink=3, tail=2, importance=given)
    assert set(order(press, 16)[:5]) == {0, 1, 2, 14, 15}
    same(given, torch.arange(16.0))
    for large in (2.0**24, 1e30, torch.finfo(torch.float32).max):  # to which nothing adds 1
        given = torch.zeros(16)
        given[5:7] = given[8:] = large
        assert set(order(Press(0.5, chunk_size=chunk_size, sink=3, tail=2, importance=given), 16)[:5]) == {
            0,
            1,
            2,
            14,
            15,
        }
    given = torch.arange(16.0)
    with pytest.raises(ValueError, match="sink \\+ tail: expected at most 8, the entries kept of 16, got 9"):
        order(Press(0.5, sink=7, tail=2, importance=given), 16)


def test_importance_from_outside_decides_for_all_layers():
    model, ids = build("llama"), prompt()
    importance = torch.rand(PROMPT, generator=torch.Generator().manual_seed(3))
    seen, _ = scores(Press(0.5, importance=importance), model, ids)
    assert len(seen) == 4
    for score in seen:
        same(score, seen[0])
    same(scores(Press(0.5, chunk_size=1, importance=importance), model, ids)[0][2][0, 1], importance)
    for wrong in (importance[:-1], importance.expand(2, -1)):
        with pytest.raises(ValueError, match="importance: expected one value for each of the prompt's 150 tokens"):
            scores(Press(0.5, importance=wrong), model, ids)
    with pytest.raises(ValueError, match="importance: expected finite values, got NaN or Inf"):
        scores(Press(0.5, importance=importance * float("nan")), model, ids)


def test_other_presses_may_write_into_the_scores():
    """AdaKV marks its safe entries in place, and needs scores that are comparable."""
    model, ids = build("llama"), prompt()
    importance = torch.rand(PROMPT)
    before = importance.clone()
    with torch.no_grad(), AdaKVPress(Press(0.5, chunk_size=1, importance=importance))(model):
        model.model(ids, past_key_values=DynamicCache())
    same(importance, before)
    with torch.no_grad(), AdaKVPress(Press(0.5, chunk_size=1, per_head=True))(model):
        model.model(ids, past_key_values=DynamicCache())
    for module in attention_layers(model):
        assert len(module.masked_key_indices[0]) == 2 * (PROMPT - PROMPT // 2)


def test_a_prompt_shorter_than_the_window():
    seen, _ = scores(Press(0.5, **PAPER, window_size=64), build("llama"), prompt(9))
    expected = importances(build("llama"), prompt(9), rows=9)
    for score, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(score[:, 0], wanted, rtol=1e-4, atol=1e-7)


def test_padding_is_refused():
    model, ids = build("llama"), torch.cat([prompt(), prompt(seed=2)])
    mask = torch.ones_like(ids)
    with torch.no_grad(), Press(0.5)(model):
        model.model(ids, attention_mask=mask, past_key_values=DynamicCache())
        mask[0, :5] = 0
        with pytest.raises(ValueError, match="attention_mask: expected prompts without padding"):
            model.model(ids, attention_mask=mask, past_key_values=DynamicCache())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression_ratio": 1.0}, r"compression_ratio: expected a fraction in \[0, 1\), got 1"),
        ({"compression_ratio": "half"}, "compression_ratio: expected a number"),
        ({"window_size": 0}, "window_size: expected at least 1, got 0"),
        ({"pool_kernel_size": 4}, "pool_kernel_size: expected an odd number"),
        ({"reduce": "sum"}, "reduce: expected one of"),
        ({"chunk_size": 0}, "chunk_size: expected an int of at least 1"),
        ({"backend": "gpu"}, "backend: expected one of"),
        ({"sink": -1}, "sink: expected an int of at least 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Press(**options)
    with pytest.raises(TypeError, match="per_head: expected a bool, got int"):
        Press(per_head=1)


def test_layers_whose_queries_are_unknown_are_refused():
    model, ids = build("llama"), prompt()
    attention_layers(model)[0].q_norm = torch.nn.Identity()
    with pytest.raises(ValueError, match="got LlamaAttention with q_norm"):
        scores(Press(0.5), model, ids)


def other_model(family):
    """A model whose queries are not always the rotated projection."""
    small = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}  # fmt: skip
    config = {
        "smollm3": lambda: transformers.SmolLM3Config(**small, no_rope_layers=[1, 0, 1, 0]),
        "cohere2": lambda: transformers.Cohere2Config(
            **small, sliding_window=24, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        "olmo": lambda: transformers.OlmoConfig(**small, clip_qkv=0.01),
    }[family]()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["smollm3", "cohere2", "olmo"])
def test_models_that_leave_out_the_rotation_or_clip_are_refused(family):
    model = other_model(family)
    name = type(attention_layers(model)[0]).__name__
    with pytest.raises(
        ValueError, match=f"model: expected an attention layer whose queries .* `importance`, got {name}"
    ):
        scores(Press(0.5), model, prompt())
    _, cache = scores(Press(0.5, importance=torch.rand(PROMPT)), model, prompt())
    assert cache.get_seq_length() == PROMPT // 2


def test_in_kvpress_own_pipeline():
    """With nothing removed the answer is that without a press; with half removed it still answers."""
    model, tokenizer = build("llama"), byte_tokenizer()
    ask = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)
    context, options = "The report was signed by the treasurer. " * 5, {"question": "Who?", "max_new_tokens": 8}
    dense = ask(context, **options)["answer"]
    assert ask(context, press=Press(0.0), **options)["answer"] == dense
    press = Press(0.5)
    seen = []
    press.score = lambda *args, **kwargs: seen.append(Press.score(press, *args, **kwargs)) or seen[-1]
    assert isinstance(ask(context, press=press, **options)["answer"], str)
    assert len(seen) == 4
