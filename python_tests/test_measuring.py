"""How the time to measure costs is spent, on a fake clock; and what tiny and real models cost."""

from __future__ import annotations

import contextlib

import pytest
import torch
from loop_models import build, byte_tokenizer, config

from specprefill_kernels import SpecPrefillConfig, models
from specprefill_kernels.loop import measuring
from specprefill_kernels.loop.costs import CostModel, PrefillCost, identity_of
from specprefill_kernels.loop.measuring import Part, sample

BASE = PrefillCost(0.5, 10e-3, 2e-6)
SMALL = PrefillCost(0.1, 1e-3, 1e-6)


class Machine:
    """A fake clock, and parts that take `cost.seconds(n)` on it; the first run of each takes ten times as long."""

    def __init__(self, *costs, limit=10_000):
        self.now, self.runs = 0.0, []
        self.parts = [Part(self.runner(index, cost), limit) for index, cost in enumerate(costs)]

    def runner(self, index, cost):
        def run(n):
            first = all(part != index for part, _ in self.runs)
            self.runs.append((index, n))
            seconds = cost.seconds(n) * (10 if first else 1)
            self.now += seconds
            return {f"part {index}": seconds}

        return run

    def sample(self, seconds, **options):
        return sample(self.parts, seconds=seconds, now=lambda: self.now, **options)


class TestTime:
    def test_the_first_run_is_not_counted(self):
        machine = Machine(BASE)
        found = machine.sample(30.0)["part 0"]
        assert found == [(n, pytest.approx(BASE.seconds(n))) for n, _ in found]
        assert PrefillCost.fit(found).seconds(5000) == pytest.approx(BASE.seconds(5000), rel=1e-6)

    @pytest.mark.parametrize("seconds", [10.0, 20.0, 100.0, 1000.0])
    def test_it_stays_within_its_time(self, seconds):
        machine = Machine(BASE, SMALL)
        machine.sample(seconds)
        assert machine.now <= 10 * (BASE.seconds(64) + SMALL.seconds(64)) + 1.1 * seconds

    def test_more_time_gives_longer_prompts(self):
        longest = [Machine(BASE).sample(seconds)["part 0"][-1][0] for seconds in (5, 20, 100, 1000)]
        assert longest == sorted(set(longest))

    def test_two_lengths_are_timed_whatever_they_take(self):
        assert [n for n, _ in Machine(BASE).sample(0.01)["part 0"]] == [64, 256]

    def test_a_slow_base_does_not_stop_the_speculator(self):
        found = Machine(BASE, SMALL).sample(20.0)
        assert found["part 1"][-1][0] >= 4 * found["part 0"][-1][0]

    def test_parts_take_turns_at_each_length(self):
        machine = Machine(SMALL, SMALL)
        machine.sample(3.0)
        assert machine.runs[:6] == [(0, 64), (1, 64), (0, 64), (1, 64), (0, 256), (1, 256)]

    def test_left_over_time_repeats_and_no_more_than_twice(self):
        machine = Machine(SMALL, limit=512)
        machine.sample(1000.0)
        assert sorted(machine.runs) == [(0, 64)] * 4 + [(0, 256)] * 3 + [(0, 512)] * 3

    @pytest.mark.parametrize(
        ("limit", "lengths"), [(10, [10]), (64, [64]), (100, [64, 100]), (1000, [64, 256, 512, 1000])]
    )
    def test_no_prompt_is_longer_than_a_model_reads(self, limit, lengths):
        assert [n for n, _ in Machine(SMALL, limit=limit).sample(1000.0)["part 0"]] == lengths

    def test_the_median_counts(self):
        times = iter([9.0, 1.0, 1.0, 5.0, 2.0, 2.0, 3.0])  # warm-up; 64, 256; 64, 256; 64, 256

        def run(n):
            return {"cost": next(times)}

        found = sample([Part(run, 256)], seconds=100.0, now=lambda: 0.0)["cost"]
        assert found == [(64, 2.0), (256, 2.0)]

    def test_progress_ends_at_one(self):
        seen = []
        Machine(BASE, SMALL).sample(20.0, report=seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == 1.0


class TestMeasure:
    def test_two_models(self):
        base, small = build("llama"), build("llama", num_hidden_layers=1)
        costs = CostModel.measure(base, small, config(), seconds=0.5, longest=256)
        assert costs.look_ahead_steps == 7
        assert costs.measured_tokens <= 256
        assert costs.speculator_ratio == 1
        assert min(costs.base.seconds(200), costs.speculator.seconds(200), costs.look_ahead_step.seconds(200)) > 0
        assert set(costs.predict(200, 50).stages) == {
            "speculator_prefill", "look_ahead", "score", "select", "base_prefill"
        }  # fmt: skip
        costs.check(identity_of(base, small, config()))

    @pytest.mark.parametrize("layers", [(0, 1), 2])
    def test_one_model_that_continues(self, layers):
        costs = CostModel.measure(build("gemma3"), None, config(), self_layers=layers, seconds=0.5, longest=256)
        assert costs.speculator is None
        assert costs.look_ahead_steps == 0
        whole = costs.lower.seconds(200) + costs.upper.seconds(200)
        assert costs.base.seconds(200) == pytest.approx(whole, rel=0.3)
        assert costs.identity["self_layers"] == "0 to 1"

    def test_prompt_rows_alone_decode_nothing(self):
        costs = CostModel.measure(build("llama"), build("llama"), config(queries="observation_window"), seconds=0.2)
        assert costs.look_ahead_steps == 0

    def test_tokenizers_give_the_ratio(self):
        words = byte_tokenizer((("t", "h"), ("th", "e")))
        model = build("llama")
        options = {"tokenizer": words, "speculator_tokenizer": byte_tokenizer(), "seconds": 0.1, "longest": 256}
        assert 1.01 < CostModel.measure(model, model, config(), **options).speculator_ratio < 1.2

    def test_no_prompt_exceeds_a_context(self):
        costs = CostModel.measure(
            build("llama", max_position_embeddings=100), build("llama"), config(), seconds=0.2, longest=256
        )
        assert costs.measured_tokens == 100

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({}, "speculator: .*neither"),
            ({"speculator": "x", "self_layers": (0, 1)}, "speculator: .*both"),
            ({"self_layers": (0, 3)}, "self_layers: expected last < 3"),
            ({"self_layers": (0, 1), "seconds": 0}, "seconds: "),
            ({"self_layers": (0, 1), "longest": 100}, "longest: "),
        ],
    )
    def test_wrong_arguments_are_named(self, options, error):
        with pytest.raises(ValueError, match=f"^{error}"):
            CostModel.measure(build("llama"), config=config(), **options)

    def test_progress_is_reported(self):
        class Task:
            def update(self, done, total=None):
                seen.append((done, total))

        class Progress:
            def task(self, label, size=None, steps=False):
                return contextlib.nullcontext(Task())

        seen = []
        CostModel.measure(build("llama"), build("llama"), config(), seconds=0.2, longest=256, progress=Progress())
        assert seen[-1] == (100, 100)


def test_one_model_on_both_sides_has_one_cost(monkeypatch):
    """Whatever a busy machine does to one of the two timings."""
    timed = {"base": [(64, 4.0), (256, 9.0)], "speculator": [(64, 1.0), (256, 2.0)], "look_ahead_step": [(64, 0.1)]}
    monkeypatch.setattr(measuring, "sample", lambda *_, **__: {name: list(values) for name, values in timed.items()})
    model, other = build("llama"), build("llama", seed=1)
    alone, pair = CostModel.measure(model, model, config()), CostModel.measure(model, other, config())
    assert alone.base == alone.speculator == PrefillCost.fit(sorted([*timed["base"], *timed["speculator"]]))
    assert not alone.predict(1000, 1).pays
    assert pair.base != pair.speculator
    assert pair.predict(1000, 1).pays


@pytest.mark.model
@pytest.mark.slow
def test_a_model_that_is_its_own_speculator_never_pays():
    model, _ = models.load("smollm2-135m", dtype=torch.float32)
    settings = SpecPrefillConfig(keep_ratio=0.1)
    costs = CostModel.measure(model, model, settings, seconds=12.0)
    for prompt in (300, 700, 1500, 3000):
        for ratio in (0.1, 0.8):
            prediction = costs.predict(prompt, int(ratio * prompt))
            assert not prediction.pays, prediction.text
