"""Times to first token: published shapes, and that a few layers stand for all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the bench is not part of the package

from bench import ttft_layers, ttft_models, ttft_plans
from bench.ttft_layers import BaseLayers, SpeculatorLayers, TooLarge, extrapolated, fit
from bench.ttft_models import Sizes, build, config_of
from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop import capture
from specprefill_kernels.loop.chunks import chunk_lengths
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.support import decoder_layers

PROMPT = 700
# As the models' publishers count them.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
    "qwen3-32b": 32_762_123_264,
}


def ids_and_gaps(count: int = 260) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, K] ids at K of PROMPT positions, in stretches with gaps between them."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.randperm(PROMPT, generator=generator)[:count].sort().values
    return torch.randint(512, (1, count), generator=generator), positions


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_published_shapes_have_the_published_number_of_parameters(name):
    sizes = Sizes.of(config_of(name)[0])
    assert sizes.layers * sizes.layer + sizes.outside == PARAMETERS[name]


def test_rope_and_context_are_the_published_ones():
    one, eight = (config_of(name)[0].rope_parameters for name in ("llama-1b", "llama-8b"))
    assert (one["factor"], eight["factor"]) == (32.0, 8.0)
    assert one["rope_type"] == eight["rope_type"] == "llama3"
    assert one["rope_theta"] == 500000.0
    for name in ("llama-1b", "llama-405b"):
        with pytest.raises(ValueError, match="at most 131072, the context of Llama"):
            config_of(name, 131073)


def test_qwen3_reads_long_prompts_with_its_published_yarn_and_says_so():
    short, note = config_of("qwen3-32b", 40960)
    assert (short.rope_parameters["rope_type"], note) == ("default", "")
    long, note = config_of("qwen3-32b", 131072)
    assert (long.rope_parameters["rope_type"], long.rope_parameters["factor"]) == ("yarn", 4.0)
    assert "YaRN" in note
    with pytest.raises(ValueError, match="131072"):
        config_of("qwen3-32b", 131073)


def test_a_prompt_as_long_as_the_context_still_looks_ahead():
    config, _ = config_of("tiny", 131072)
    config.max_position_embeddings = 300
    speculator = SpeculatorLayers(build(config), 3, SpecPrefillConfig())
    assert speculator.seconds(torch.randint(512, (1, 300)))[1].num_look_ahead == 8


def test_no_random_token_ends_the_look_ahead():
    config, _ = config_of("tiny")
    config.eos_token_id = list(range(512))
    speculator = SpeculatorLayers(build(config), 3, SpecPrefillConfig())
    assert speculator.seconds(torch.randint(512, (1, 300)))[1].num_look_ahead == 8


def test_weights_fill_the_shape_and_activations_stay_finite():
    model = build(config_of("tiny-base")[0], dtype=torch.bfloat16)
    assert all(bool(weight.isfinite().all()) and float(weight.float().abs().sum()) > 0 for weight in model.parameters())
    logits = model(torch.randint(512, (1, 300))).logits.float()
    assert bool(logits.isfinite().all())
    assert 0.2 < float(logits.std()) < 5


def test_few_layers_are_the_first_of_all():
    config, _ = config_of("tiny-base")
    whole, few = build(config).state_dict(), build(config, layers=2).state_dict()
    assert set(few) < set(whole)
    for name, weight in few.items():
        assert torch.equal(weight, whole[name]), name
    assert not torch.equal(few["model.layers.0.mlp.up_proj.weight"], few["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("sparse", [False, True])
def test_few_layers_compute_what_the_first_of_all_compute(chunk, sparse):
    """At positions with gaps too, and read in chunks: against a forward of all layers under a mask made by hand."""
    config, _ = config_of("tiny-base")
    whole, few = build(config), build(config, layers=2)
    ids, positions = ids_and_gaps()
    if not sparse:
        positions = torch.arange(ids.shape[1])
    seen = (positions[:, None] >= positions[None])[None, None]
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        states = whole(ids, attention_mask=mask, position_ids=positions[None], output_hidden_states=True).hidden_states
        expected = whole.lm_head(whole.model.norm(states[2][:, -1]))
    kept = []
    handle = decoder_layers(few)[-1].register_forward_hook(lambda module, given, output: kept.append(output))
    _, logits = BaseLayers(few, 6, chunk).parts(ids, positions, PROMPT, sparse=sparse)
    handle.remove()
    found = torch.cat([one[0] if isinstance(one, tuple) else one for one in kept], dim=1)
    torch.testing.assert_close(found, states[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_later_chunks_need_no_mask_of_the_whole_prompt(monkeypatch):
    """Which would be 2 GiB for 16K tokens behind 112K, and keep flash attention away."""
    ordinary, seen = capture.chunk_attention, []

    def counted(function, module, query, key, *rest, **more):
        seen.append((query.shape[2], key.shape[2]))
        return ordinary(function, module, query, key, *rest, **more)

    monkeypatch.setattr(capture, "chunk_attention", counted)
    ids, positions = ids_and_gaps()
    BaseLayers(build(config_of("tiny-base")[0], layers=2), 6, 100).parts(ids, positions, PROMPT, sparse=True)
    lengths = chunk_lengths(ids.shape[1], 100, 1)
    assert len(lengths) == 3
    assert seen == [(lengths[1], sum(lengths[:2]))] * 2 + [(lengths[2], ids.shape[1])] * 2


class Counted:
    """A clock that stands still but for modules at work: a layer takes 1 s, half at its beginning."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(StageClock, "_now", lambda clock: self.now)

    def passes(self, seconds: float):
        def work(*_):
            self.now += seconds

        return work

    def watch(self, model: torch.nn.Module) -> torch.nn.Module:
        for layer in decoder_layers(model):
            layer.register_forward_pre_hook(self._with_tokens(0.5))
            layer.register_forward_hook(lambda module, given, output: self._with_tokens(0.5)(module, given))
        model.get_input_embeddings().register_forward_hook(self.passes(0.3))
        model.get_output_embeddings().register_forward_hook(self.passes(7.0))
        return model

    def _with_tokens(self, seconds: float):
        def work(module, given, *_):
            self.now += seconds * given[0].shape[1]

        return work


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_few_layers_take_the_time_of_all(monkeypatch, chunk, sparse, layers):
    clock, (config, _) = Counted(monkeypatch), config_of("tiny-base")
    ids, positions = ids_and_gaps()
    whole = BaseLayers(clock.watch(build(config)), 6, chunk)
    few = BaseLayers(clock.watch(build(config, layers=layers)), 6, chunk)
    expected = whole.seconds(ids, positions, PROMPT, sparse=sparse)
    reads = 1 if chunk is None else 3
    assert expected == pytest.approx(6 * ids.shape[1] + 0.3 * reads + 7.0)
    assert few.seconds(ids, positions, PROMPT, sparse=sparse) == pytest.approx(expected)


def test_the_measurement_leaves_no_hooks_even_after_an_exception(monkeypatch):
    layers = BaseLayers(build(config_of("tiny-base")[0], layers=2), 6, None)
    with pytest.raises(IndexError):
        layers.seconds(torch.full((1, 10), 10**6), torch.arange(10), 10, sparse=True)
    for layer in decoder_layers(layers.model):
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize("queries", ["look_ahead", "observation_window"])
def test_few_speculator_layers_take_the_time_of_all(monkeypatch, layers, queries):
    """Chunks end in the middle of the last layer, which would be a larger part of few layers."""
    clock, (config, _) = Counted(monkeypatch), config_of("tiny-base")
    how = SpecPrefillConfig(prefill_chunk=100, queries=queries)
    ids, _ = ids_and_gaps()
    expected, _ = SpeculatorLayers(clock.watch(build(config)), 6, how).seconds(ids)
    found, speculation = SpeculatorLayers(clock.watch(build(config, layers=layers)), 6, how).seconds(ids)
    assert expected["speculator_prefill"] > 4 * ids.shape[1]
    assert found == pytest.approx(expected)
    assert len(speculation.layers) == layers


def test_one_layer_of_a_speculator_tells_too_little():
    with pytest.raises(ValueError, match="at least 2 of 6, got 1"):
        SpeculatorLayers(build(config_of("tiny-base")[0], layers=1), 6, SpecPrefillConfig())


def test_extrapolation_is_linear_and_noise_makes_nothing_faster():
    assert extrapolated({4: {"a": 5.0}, 2: {"a": 3.0}}, 10) == {"a": 11.0}
    assert extrapolated({4: {"a": 5.0}}, 4) == {"a": 5.0}
    assert extrapolated({4: {"a": 5.0}, 2: {"a": 5.5}}, 10) == {"a": 5.0}


GIB = 2**30


def sizes(pair: str, tokens: int) -> tuple[Sizes, Sizes]:
    speculator, base = (Sizes.of(config_of(name, tokens)[0]) for name in pair.split(":"))
    return base, speculator


def test_what_fits_is_measured_whole():
    plan = fit(*sizes("llama-1b:llama-8b", 4096), 4096, 400, 2, 78 * GIB)
    assert (plan.base_layers, plan.speculator_layers, plan.chunk) == (32, 16, None)


@pytest.mark.parametrize("pair", ["llama-8b:llama-405b", "qwen3-0.6b:qwen3-32b", "llama-8b:llama-70b"])
@pytest.mark.parametrize("memory", [30, 45, 78, 139])
def test_the_plan_needs_no_more_than_there_is(pair, memory):
    base, speculator = sizes(pair, 131072)
    plan = fit(base, speculator, 131072, 13107, 2, memory * GIB)
    weights = base.weight_bytes(plan.base_layers, 2) + speculator.weight_bytes(plan.speculator_layers, 2)
    assert weights < plan.bytes <= 0.9 * memory * GIB
    assert plan.base_layers in (*range(1, ttft_layers.MOST_LAYERS + 1), base.layers)
    rows = min(plan.chunk or 131072, 131072)
    assert base.activation_bytes(rows, 2) < 0.5 * memory * GIB


def test_405b_at_128k_keeps_its_speculator_whole_on_one_gpu():
    plan = fit(*sizes("llama-8b:llama-405b", 131072), 131072, 13107, 2, 78 * GIB)
    assert plan.speculator_layers == 32
    assert plan.chunk is not None


def test_too_little_memory_is_refused_with_both_figures():
    with pytest.raises(TooLarge, match=r"expected \d+\.\d GiB for 1 of 126 layers .* got 3\.6 GiB"):
        fit(*sizes("llama-8b:llama-405b", 4096), 4096, 400, 2, 4 * GIB)
    with pytest.raises(TooLarge, match="for 126 of 126 layers"):
        fit(*sizes("llama-8b:llama-405b", 4096), 4096, 400, 2, 78 * GIB, base_layers=126)


def test_the_bytes_of_weights_are_those_of_the_model():
    config, _ = config_of("tiny-base")
    model = build(config, layers=2)
    found = sum(weight.nbytes for weight in model.parameters())
    assert Sizes.of(config).weight_bytes(2, 4) == found


def test_free_memory_is_of_this_machine():
    assert 2**20 < ttft_layers.free_memory("cpu") < 2**50


def test_flops_of_a_prefill():
    """One layer by hand: q, k, v, o, gate, up, down; causal attention; one token's head."""
    found = Sizes.of(config_of("tiny")[0])
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert found.layer == layer
    assert found.flops(100) == (2 * 3 * layer * 100 + 2 * 512 * 64, 2 * 3 * 64 * 100 * 100)
    pairs = sum(min(i + 0.5, 40) for i in range(100))
    assert found.flops(100, keys=40)[1] == 4 * 3 * 64 * pairs
    assert found.flops(30, keys=40) == found.flops(30)


def test_the_plans_name_models_that_there_are():
    for works in ttft_plans.PLANS.values():
        for work in works:
            for name in (work.speculator, work.base):
                config_of(name, work.tokens)
                assert name in ttft_models.SHAPES
