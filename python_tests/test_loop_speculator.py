"""The speculator against the definition, computed in fp64 from the attention weights that eager attention returns."""

from __future__ import annotations

import pytest
import torch
from loop_models import FAMILIES, PROMPT, SLIDING, build, prompt, windows
from transformers import AutoModelForCausalLM, GPT2Config

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop.memory import SpeculatorMemory
from specprefill_kernels.loop.speculator import NothingToScore, Speculator


@torch.no_grad()
def look_ahead_by_hand(model, ids, steps, eos=None):
    """Greedy tokens, each from a forward over everything so far, without a cache."""
    tokens = []
    for _ in range(steps):
        everything = torch.cat([ids, torch.tensor([tokens], dtype=torch.int64)], dim=1)
        token = int(model(input_ids=everything, use_cache=False).logits[0, -1].argmax())
        if token == eos:
            break
        tokens.append(token)
    return tokens


def pool(probabilities, width, edge):
    padded = torch.nn.functional.pad(probabilities, (width // 2, width // 2))
    total = padded.unfold(-1, width, 1).sum(-1)
    if edge == "zero":
        return total / width
    inside = torch.nn.functional.pad(torch.ones(probabilities.shape[-1]), (width // 2, width // 2)).unfold(-1, width, 1)
    return total / inside.sum(-1)


@torch.no_grad()
def importance_by_hand(model, ids, config, layers=None, tokens=()):
    """The definition, row by row; `model` must run eager attention."""
    seq_len = ids.shape[1]
    everything = torch.cat([ids, torch.tensor([list(tokens)], dtype=torch.int64)], dim=1)
    attentions = model(input_ids=everything, use_cache=False, output_attentions=True).attentions
    rows = range(seq_len - 1, everything.shape[1])
    if config.queries == "observation_window":
        rows = range(max(0, seq_len - config.look_ahead), seq_len)
    if config.queries == "both":  # each row once, the last prompt row too
        rows = range(max(0, seq_len - config.observation_rows), everything.shape[1])
    heads = []
    for layer, weights in enumerate(attentions):
        if layers is None or layer in layers:
            seen = weights[0, :, list(rows), :seq_len].double()  # [Hq, rows, T]
            if config.normalize_over == "prompt":
                seen = seen / seen.sum(-1, keepdim=True).clamp_min(1e-300)
            heads.append(seen)
    if config.pool_order == "before_max":
        heads = [pool(seen, config.pool_kernel_size, config.pool_edge) for seen in heads]
    state = torch.cat(heads).amax(0)
    if config.pool_order == "after_max":
        state = pool(state, config.pool_kernel_size, config.pool_edge)
    return state.mean(0) if config.reduce == "mean" else state.amax(0)


def check(family, config, layers=None, attn=None):
    model, eager, ids = build(family, attn=attn), build(family, attn="eager"), prompt()
    tokens = []
    if config.queries != "observation_window":
        tokens = look_ahead_by_hand(eager, ids, config.look_ahead - 1)
    speculation = Speculator(model, config).score(ids)
    assert speculation.look_ahead_tokens == tuple(tokens)
    rows = config.look_ahead + (config.observation_rows - 1 if config.queries == "both" else 0)
    assert speculation.num_look_ahead == rows
    expected = importance_by_hand(eager, ids, config, layers, tokens)
    assert expected.max() > 1.2 * expected.min()  # flat importance would prove nothing
    torch.testing.assert_close(speculation.importance.double(), expected, atol=1e-6, rtol=2e-3)
    return speculation


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_equals_the_definition(family):
    speculation = check(family, SpecPrefillConfig())
    assert speculation.layers == (0, 1, 2, 3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize(
    "changes",
    [
        {"normalize_over": "visible"},
        {"queries": "observation_window"},
        {"queries": "observation_window", "pool_order": "after_max", "pool_edge": "valid"},
        {"queries": "both"},
        {"queries": "both", "observation_rows": 5, "normalize_over": "visible"},
        {"queries": "both", "observation_rows": 1, "look_ahead": 4, "pool_order": "after_max", "pool_edge": "valid"},
        {"queries": "both", "observation_rows": 6, "look_ahead": 1, "reduce": "max", "pool_kernel_size": 1},
        {"reduce": "max"},
        {"reduce": "max", "pool_order": "after_max"},
        {"look_ahead": 1, "pool_kernel_size": 1},
        {"look_ahead": 3, "pool_kernel_size": 31, "pool_edge": "valid"},
    ],
    ids=lambda changes: "-".join(f"{value}" for value in changes.values()),
)
def test_every_definition(family, changes):
    check(family, SpecPrefillConfig(**changes))


@pytest.mark.parametrize("queries", ["look_ahead", "observation_window", "both"])
def test_a_subset_of_layers(queries):
    config = SpecPrefillConfig(score_layers=(1, -2), queries=queries)
    assert check("llama", config, layers={1, 2}).layers == (1, 2)


def test_eager_attention_gives_the_same():
    check("gemma3", SpecPrefillConfig(), attn="eager")


@pytest.mark.parametrize("family", [family for family in SLIDING if family not in ("mistral", "phi3")])
def test_window_skip_leaves_sliding_layers_out(family):
    full = {layer for layer, window in enumerate(windows(build(family))) if window is None}
    assert check(family, SpecPrefillConfig(window="skip"), layers=full).layers == tuple(sorted(full))


def test_window_skip_keeps_windows_longer_than_the_prompt():
    model = build("mistral", sliding_window=PROMPT)
    assert Speculator(model, SpecPrefillConfig(window="skip")).score(prompt()).layers == (0, 1, 2, 3)


def test_window_skip_with_nothing_left_says_so():
    with pytest.raises(NothingToScore, match="sliding window"):
        Speculator(build("mistral"), SpecPrefillConfig(window="skip")).score(prompt())


@pytest.mark.parametrize("queries", ["look_ahead", "both"])
def test_eos_ends_the_look_ahead(queries):
    """EOS at step s keeps the first s + 1 rows."""
    eager, ids = build("llama", attn="eager"), prompt()
    tokens = look_ahead_by_hand(eager, ids, 7)
    step = next(s for s in range(1, 7) if tokens[s] not in tokens[:s])
    model = build("llama")
    model.generation_config.eos_token_id = [0, tokens[step]]
    config = SpecPrefillConfig(queries=queries, observation_rows=9)
    speculation = Speculator(model, config).score(ids)
    assert speculation.num_look_ahead == step + (9 if queries == "both" else 1)
    assert speculation.look_ahead_tokens == tuple(tokens[:step])
    expected = importance_by_hand(eager, ids, config, None, tokens[:step])
    torch.testing.assert_close(speculation.importance.double(), expected, atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("remembers", [False, True])
def test_the_look_ahead_ends_with_the_models_context(remembers):
    """A model with learned positions has none behind it."""
    shape = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = AutoModelForCausalLM.from_config(GPT2Config(**shape, n_positions=PROMPT + 3, eos_token_id=None)).eval()
    speculator = Speculator(model, SpecPrefillConfig())
    for length, rows in ((PROMPT - 4, 8), (PROMPT, 4), (PROMPT + 3, 1)):
        memory = SpeculatorMemory() if remembers else None
        speculation = speculator.score(prompt(length), memory=memory)
        assert (speculation.num_look_ahead, len(speculation.look_ahead_tokens)) == (rows, rows - 1)


def test_eos_as_the_first_token_keeps_one_row():
    model, ids = build("llama"), prompt()
    model.generation_config.eos_token_id = look_ahead_by_hand(model, ids, 1)[0]
    speculation = Speculator(model, SpecPrefillConfig()).score(ids)
    assert (speculation.num_look_ahead, speculation.look_ahead_tokens) == (1, ())


@pytest.mark.parametrize("length", [1, 5])
def test_both_kinds_of_rows_of_a_short_prompt(length):
    eager, ids = build("llama", attn="eager"), prompt(length)
    config = SpecPrefillConfig(queries="both", look_ahead=4)
    tokens = look_ahead_by_hand(eager, ids, 3)
    speculation = Speculator(build("llama"), config).score(ids)
    assert (speculation.num_look_ahead, speculation.look_ahead_tokens) == (length + 3, tuple(tokens))
    expected = importance_by_hand(eager, ids, config, None, tokens)
    torch.testing.assert_close(speculation.importance.double(), expected, atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("length", [1, 5])
def test_an_observation_window_longer_than_the_prompt(length):
    eager, ids = build("llama", attn="eager"), prompt(length)
    config = SpecPrefillConfig(queries="observation_window")
    speculation = Speculator(build("llama"), config).score(ids)
    assert speculation.num_look_ahead == length
    expected = importance_by_hand(eager, ids, config)
    torch.testing.assert_close(speculation.importance.double(), expected, atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("layers", [(4,), (-5, 0)])
def test_layers_outside_the_model_are_refused(layers):
    with pytest.raises(ValueError, match="score_layers: expected indices in"):
        Speculator(build("llama"), SpecPrefillConfig(score_layers=layers))
