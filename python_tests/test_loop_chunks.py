"""A prompt read in several forwards: the same importance, no work above the layers needed, memory given back."""

from __future__ import annotations

import weakref

import pytest
import torch
from loop_models import FAMILIES, PROMPT, SLIDING, build, prompt
from test_loop_speculator import importance_by_hand, look_ahead_by_hand
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop import capture as capture_module
from specprefill_kernels.loop import chunks
from specprefill_kernels.loop.cache import GrowingLayer
from specprefill_kernels.loop.chunks import chunk_attention, chunk_lengths, lower_right_attention
from specprefill_kernels.loop.speculator import Speculator

MODES = ("look_ahead", "observation_window", "both")


def config(queries, chunk, **changes):
    return SpecPrefillConfig(queries=queries, observation_rows=11, prefill_chunk=chunk, **changes)


@pytest.mark.parametrize("last", [1, 8, 40])
@pytest.mark.parametrize("chunk", [1, 7, 8, 64, 149, 150, 151])
@pytest.mark.parametrize("total", [1, 7, 8, 64, 150])
def test_chunk_lengths(total, chunk, last):
    lengths = chunk_lengths(total, chunk, last)
    assert sum(lengths) == total
    assert all(length >= 1 for length in lengths)
    if total <= chunk:
        assert lengths == [total]
        return
    assert lengths[-1] >= min(last, total)
    assert max(lengths[:-1], default=0) <= chunk
    assert lengths[-1] <= max(chunk, last)
    assert max(lengths[:-1], default=0) - min(lengths[:-1], default=0) <= 1
    if len(lengths) > 1 and last <= min(lengths):  # no more forwards than needed, all nearly equal
        assert len(lengths) == -(-total // chunk)
        assert max(lengths) - min(lengths) <= 1


def test_no_chunk_is_one_forward():
    assert chunk_lengths(10**6, None, 8) == [10**6]


@pytest.mark.parametrize("queries", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_importance_of_a_chunked_prefill_equals_the_definition(family, queries):
    """Not only the one forward's: 150 tokens in chunks of 50, and of 12 or 13."""
    model, eager, ids = build(family), build(family, attn="eager"), prompt()
    tokens = [] if queries == "observation_window" else look_ahead_by_hand(eager, ids, 7)
    for chunk in (50, 13):
        settings = config(queries, chunk)
        speculation = Speculator(model, settings).score(ids)
        assert speculation.look_ahead_tokens == tuple(tokens)
        expected = importance_by_hand(eager, ids, settings, None, tokens)
        torch.testing.assert_close(speculation.importance.double(), expected, atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunks_of_one_token(family, attn):
    model, ids = build(family, attn=attn), prompt()
    for queries in MODES:
        whole = Speculator(model, config(queries, None)).score(ids)
        ones = Speculator(model, config(queries, 1)).score(ids)
        torch.testing.assert_close(ones.importance, whole.importance, atol=1e-6, rtol=1e-4)
        assert ones.look_ahead_tokens == whole.look_ahead_tokens


@pytest.mark.parametrize("chunk", [PROMPT, PROMPT + 1, 10**6, None])
@pytest.mark.parametrize("queries", MODES)
def test_a_prompt_within_one_chunk_is_one_forward(queries, chunk, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("masks made by chunk_attention")

    monkeypatch.setattr(capture_module, "chunk_attention", refuse)
    model, ids = build("gemma3"), prompt()
    lengths = forwards(model)
    ours = Speculator(model, config(queries, chunk)).score(ids)
    assert lengths[0] == PROMPT
    assert set(lengths[1:]) <= {1}
    assert torch.equal(ours.importance, Speculator(model, config(queries, None)).score(ids).importance)


@pytest.mark.parametrize("queries", MODES)
def test_stretches_of_rows_within_a_chunk(queries, monkeypatch):
    """So few entries that every chunk falls into several stretches, for SDPA and for eager attention."""
    monkeypatch.setattr(chunks, "MAX_ENTRIES", 1000)
    for family in ("llama", "gemma2", "gemma3"):
        model, ids = build(family), prompt()
        whole = Speculator(model, config(queries, None)).score(ids)
        parts = Speculator(model, config(queries, 50)).score(ids)
        torch.testing.assert_close(parts.importance, whole.importance, atol=1e-6, rtol=1e-4)


class Recorder:
    """Lengths of the keys, values and masks that attention was called with."""

    def __init__(self):
        self.masks, self.keys = [], []

    def __call__(self, query, key, value, attn_mask=None, **kwargs):
        self.masks.append(0 if attn_mask is None else attn_mask.numel())
        self.keys.append(key.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **kwargs)


def test_masks_are_small_and_windows_cost_what_they_span(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(chunks, "scaled_dot_product_attention", recorder)
    Speculator(build("mistral"), config("look_ahead", 50)).score(prompt())
    assert max(recorder.keys) == 50 + 24 - 1  # 24: the window
    assert max(recorder.masks) == 50 * 73
    recorder = Recorder()
    monkeypatch.setattr(chunks, "scaled_dot_product_attention", recorder)
    monkeypatch.setattr(chunks, "MAX_ENTRIES", 2000)
    Speculator(build("llama"), config("look_ahead", 50)).score(prompt())
    assert max(recorder.keys) == PROMPT
    assert 0 < max(recorder.masks) <= 2000


def attention_by_hand(query, key, value, scale, window):
    rows, total, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1).double() for x in (key, value))
    position, t = torch.arange(total - rows, total)[:, None], torch.arange(total)[None]
    seen = (t <= position) & (t > position - (window or total))
    scores = (query.double() @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 5, 37, 38])
@pytest.mark.parametrize(("rows", "total"), [(1, 37), (9, 37), (36, 37), (37, 37)])
def test_chunk_attention_equals_the_definition(rows, total, window, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_ENTRIES", 150)  # 4 rows of 37 keys
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 6, rows, 16, generator=generator)
    key, value = (torch.randn(1, 2, total, 16, generator=generator) for _ in range(2))
    module = build("llama").model.layers[0].self_attn
    module.num_key_value_groups = 3
    expected = attention_by_hand(query, key, value, 0.3, window)
    for ordinary in (ALL_ATTENTION_FUNCTIONS["sdpa"], module_eager(module)):
        for extra in ({}, {"s_aux": None, "softcap": None}, {"unknown": 1}):
            output, _ = chunk_attention(
                ordinary, module, query, key, value, scaling=0.3, sliding_window=window, dropout=0.0, **extra
            )
            assert output.shape == (1, rows, 6, 16)
            assert output.is_contiguous()
            torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    if window is None:  # what CUDA runs for half precision
        torch.testing.assert_close(
            lower_right_attention(query, key, value, 0.3).double(), expected, atol=1e-5, rtol=1e-5
        )


def module_eager(module):
    from specprefill_kernels.loop.attention import attention_function

    return attention_function(module, "eager")


def forwards(model):
    """Tokens of each forward that reached the first layer."""
    lengths = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    return lengths


def count_calls(model):
    calls = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: calls.append(("attention", index)))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda *_, index=index: calls.append(("output", index)))
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(("mlp", index)))
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(("head", 0)))
    return calls


def counts(calls, kind):
    return [sum(call == (kind, index) for call in calls) for index in range(4)]


def test_every_chunk_stops_after_the_last_scored_layer():
    model = build("llama")
    calls = count_calls(model)
    Speculator(model, config("observation_window", 50, score_layers=(1, 2))).score(prompt())
    assert counts(calls, "attention") == [3, 3, 3, 0]
    assert counts(calls, "output") == counts(calls, "mlp") == [3, 3, 0, 0]  # layer 2 is scored: it need not attend
    assert counts(calls, "head") == [0, 0, 0, 0]


def test_one_look_ahead_row_stops_there_too():
    model = build("llama")
    calls = count_calls(model)
    Speculator(model, config("look_ahead", 50, look_ahead=1, score_layers=(1,))).score(prompt())
    assert counts(calls, "attention") == [3, 3, 0, 0]
    assert counts(calls, "head") == [0, 0, 0, 0]


def test_decoding_needs_all_layers_but_the_top_one_only_for_the_last_chunk():
    model = build("llama")
    calls = count_calls(model)
    Speculator(model, config("look_ahead", 50, look_ahead=3, score_layers=(1,))).score(prompt())
    # Three chunks, one whole decoding step, and one that stops at the scored layer.
    assert counts(calls, "attention") == [5, 5, 4, 4]
    assert counts(calls, "output") == [5, 4, 4, 2]
    assert counts(calls, "head") == [2, 0, 0, 0]


def test_nothing_is_allocated_above_the_last_scored_layer(monkeypatch):
    made = []
    grown = GrowingLayer._grown
    monkeypatch.setattr(
        GrowingLayer,
        "_grown",
        lambda self, new, end, which: made.append((id(self), which, grown(self, new, end, which))) or made[-1][2],
    )
    Speculator(build("llama"), config("observation_window", 50, score_layers=(0, 2))).score(prompt())
    keys, values = ([buffer for _, kind, buffer in made if kind == which] for which in (0, 1))
    assert (len(keys), len(values)) == (3, 2)  # layer 2 is scored but never attends: no values
    assert all(buffer.shape[2] == PROMPT for buffer in keys + values)  # once, and not larger than the prompt


def test_values_and_unscored_keys_are_freed_behind_the_last_chunk(monkeypatch):
    """Seen from inside the last chunk: when layer i begins, the layers below it hold what will be scored, no more."""
    model, layers, made, seen = build("llama"), [], [], []
    grown = GrowingLayer._grown

    def watched(self, new, end, which):
        buffer = grown(self, new, end, which)
        if self not in layers:
            layers.append(self)
        made.append((layers.index(self), which, weakref.ref(buffer)))
        return buffer

    monkeypatch.setattr(GrowingLayer, "_grown", watched)
    attention_calls = []
    for index, layer in enumerate(model.model.layers):

        def note(*_args, index=index):
            attention_calls.append(index)
            if attention_calls.count(index) == 3:
                seen.append((index, sorted((layer, which) for layer, which, ref in made if ref() is not None)))

        layer.register_forward_pre_hook(note)
    Speculator(model, config("observation_window", 50, score_layers=(1, 2))).score(prompt())
    key, value = 0, 1
    everything = [(0, key), (0, value), (1, key), (1, value), (2, key)]
    assert seen[0] == (0, everything)
    assert seen[1] == (1, [(1, key), (1, value), (2, key)])
    assert seen[2] == (2, [(1, key), (2, key)])


@pytest.mark.parametrize("family", [family for family in SLIDING if family not in ("mistral", "phi3")])
def test_a_subset_with_windows_left_out(family):
    model, ids = build(family), prompt()
    settings = config("observation_window", 50, window="skip")
    whole = Speculator(model, settings.replace(prefill_chunk=None)).score(ids)
    torch.testing.assert_close(
        Speculator(model, settings).score(ids).importance, whole.importance, atol=1e-6, rtol=1e-4
    )


def test_early_eos_behind_chunks():
    model, ids = build("llama"), prompt()
    tokens = look_ahead_by_hand(model, ids, 7)
    step = next(s for s in range(1, 7) if tokens[s] not in tokens[:s])
    model.generation_config.eos_token_id = tokens[step]
    for queries in ("look_ahead", "both"):
        whole = Speculator(model, config(queries, None)).score(ids)
        parts = Speculator(model, config(queries, 40)).score(ids)
        assert parts.look_ahead_tokens == whole.look_ahead_tokens == tuple(tokens[:step])
        assert parts.num_look_ahead == whole.num_look_ahead
        torch.testing.assert_close(parts.importance, whole.importance, atol=1e-6, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize(("rows", "total"), [(1, 300), (100, 300), (300, 300)])
def test_chunk_attention_on_a_gpu(rows, total, window, dtype):
    """Half precision without a window runs flash attention aligned at the end; all else masks in stretches of rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(1, 4, rows, 64, generator=generator, device="cuda").to(dtype)
    key, value = (torch.randn(1, 2, total, 64, generator=generator, device="cuda").to(dtype) for _ in range(2))
    module = build("llama").model.layers[0].self_attn  # two query heads for each key head
    output, _ = chunk_attention(
        ALL_ATTENTION_FUNCTIONS["sdpa"], module, query, key, value, scaling=0.125, sliding_window=window, dropout=0.0
    )
    expected = attention_by_hand(query.cpu(), key.cpu(), value.cpu(), 0.125, window)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.cpu().double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunks_on_a_gpu(family, queries):
    model, ids = build(family).to("cuda"), prompt().to("cuda")
    whole = Speculator(model, config(queries, None)).score(ids)
    parts = Speculator(model, config(queries, 40)).score(ids)
    assert parts.look_ahead_tokens == whole.look_ahead_tokens
    torch.testing.assert_close(parts.importance, whole.importance, atol=1e-5, rtol=1e-2)
