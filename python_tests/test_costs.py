"""The cost model: fits, predictions, what real runs change, and files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from loop_models import build, config

from specprefill_kernels.loop.costs import CostModel, Prediction, PrefillCost, identity_of

BASE = PrefillCost(0.5, 10e-3, 2e-6)
SMALL = PrefillCost(0.1, 1e-3, 1e-6)
TWO_MODELS = CostModel(
    base=BASE,
    speculator=SMALL,
    look_ahead_step=PrefillCost(0.02, 1e-6),
    look_ahead_steps=7,
    score=PrefillCost(0.003, 2e-6),
    select=PrefillCost(0.001, 1e-7),
    measured_tokens=1024,
)
ONE_MODEL = CostModel(base=BASE, lower=BASE.scaled(0.25), upper=BASE.scaled(0.75), score=PrefillCost(0.003))


class TestFit:
    @pytest.mark.parametrize(
        "cost", [PrefillCost(0.5, 2e-3, 3e-7), PrefillCost(0.0, 2e-3, 3e-7), PrefillCost(0.5, 0.0, 3e-7)], ids=str
    )
    def test_exact_samples_give_the_cost_back(self, cost):
        found = PrefillCost.fit([(n, cost.seconds(n)) for n in (64, 128, 256, 512, 1024)])
        for n in (64, 1000, 100_000):
            assert found.seconds(n) == pytest.approx(cost.seconds(n), rel=1e-6)

    def test_a_line_needs_no_square(self):
        found = PrefillCost.fit([(n, 0.25 + 0.002 * n) for n in (64, 128, 256, 512)])
        assert found.per_token_squared == pytest.approx(0, abs=1e-12)
        assert (found.constant, found.per_token) == (pytest.approx(0.25), pytest.approx(0.002))

    @pytest.mark.parametrize("seed", range(20))
    def test_no_term_is_negative_and_no_other_fit_is_nearer(self, seed):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(5, generator=generator).tolist()
        samples = [(64 * 2**i, (0.2 + noise[i]) * (0.1 + 0.001 * 64 * 2**i)) for i in range(5)]

        def error(cost):
            return sum((cost.seconds(n) / seconds - 1) ** 2 for n, seconds in samples)

        best = PrefillCost.fit(samples)
        terms = [best.constant, best.per_token, best.per_token_squared]
        assert min(terms) >= 0
        for step in ([1e-4, 0, 0], [0, 1e-6, 0], [0, 0, 1e-9], [1e-4, -1e-6, 0], [-1e-4, 1e-6, 0], [0, 1e-6, -1e-9]):
            other = [max(0.0, term + delta) for term, delta in zip(terms, step)]
            assert error(PrefillCost(*other)) >= error(best) - 1e-9

    def test_falling_times_are_a_constant(self):
        found = PrefillCost.fit([(64, 1.2), (128, 1.0), (256, 0.8)])
        assert (found.per_token, found.per_token_squared) == (0, 0)
        assert 0.8 < found.constant < 1.2

    def test_long_prompts_weigh_no_more_than_short_ones(self):
        """Errors are relative: 10% too much at 64 tokens counts as much as at 4096."""
        slow_start = PrefillCost.fit([(64, 0.11), (4096, 4.096), (4096, 4.096)])
        assert slow_start.seconds(64) == pytest.approx(0.11, rel=1e-6)

    def test_few_lengths_allow_few_terms(self):
        one = PrefillCost.fit([(100, 2.0)])
        assert (one.constant, one.per_token, one.per_token_squared) == (0, pytest.approx(0.02), 0)
        line = PrefillCost.fit([(100, 2.0), (200, 3.0)])
        assert line.seconds(400) == pytest.approx(5.0)
        assert line.per_token_squared == 0

    @pytest.mark.parametrize("samples", [[], [(0, 1.0)], [(5, 0.0)], [(5, math.inf)], [(5, math.nan)]])
    def test_samples_must_be_positive(self, samples):
        with pytest.raises(ValueError, match=r"^samples: "):
            PrefillCost.fit(samples)

    @pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan, "1", True])
    def test_costs_are_not_negative(self, value):
        with pytest.raises(ValueError, match=r"^per_token: expected seconds"):
            PrefillCost(0.0, value)


class TestPrediction:
    def test_two_models_add_up_their_stages(self):
        found = TWO_MODELS.predict(1000, 200, 1200)
        assert found.full == pytest.approx(0.5 + 10 + 2)
        assert dict(found.stages) == {
            "speculator_prefill": pytest.approx(0.1 + 1.2 + 1.44),
            "look_ahead": pytest.approx(7 * (0.02 + 1.2e-3)),
            "score": pytest.approx(0.003 + 2.4e-3),
            "select": pytest.approx(0.001 + 1.2e-4),
            "base_prefill": pytest.approx(0.5 + 2 + 0.08),
        }
        assert found.sparse == pytest.approx(sum(found.stages.values()))
        assert found.pays

    def test_one_model_reads_all_below_and_the_kept_above(self):
        found = ONE_MODEL.predict(1000, 100)
        assert dict(found.stages) == {
            "speculator_prefill": pytest.approx(0.25 * 12.5),
            "score": pytest.approx(0.003),
            "select": 0,
            "base_prefill": pytest.approx(0.75 * (0.5 + 1 + 0.02)),
        }
        assert found.pays
        # All tokens through both parts are a full prefill, and the scores on top.
        everything = ONE_MODEL.predict(1000, 1000)
        assert everything.sparse - everything.full == pytest.approx(0.003)
        assert not everything.pays

    def test_more_kept_costs_more_until_it_does_not_pay(self):
        pays = [TWO_MODELS.predict(1000, kept).pays for kept in range(1, 1001)]
        assert pays == sorted(pays, reverse=True)
        assert pays[0]
        assert not pays[-1]

    def test_the_same_model_twice_never_pays(self):
        same = replace(TWO_MODELS, speculator=BASE)
        assert not any(same.predict(n, max(1, n // 100)).pays for n in (64, 1000, 100_000))

    def test_speculator_tokens_default_to_the_measured_ratio(self):
        wordy = replace(TWO_MODELS, speculator_ratio=1.5)
        assert wordy.predict(1001, 10).speculator_tokens == 1502
        assert wordy.predict(1001, 10) == wordy.predict(1001, 10, 1502)
        assert wordy.predict(1001, 10).sparse > TWO_MODELS.predict(1001, 10).sparse

    def test_the_text_has_both_times(self):
        assert TWO_MODELS.predict(1000, 200).text == (
            "keeping 200 of 1000 tokens is predicted to take 4.83 s, 2.6x faster than the 12.5 s of a full prefill"
        )
        assert "no faster than the 12.5 s" in TWO_MODELS.predict(1000, 1000).text
        slightly = Prediction(1.0, 0.97, {}, 100, 50, 100)
        assert not slightly.pays
        assert "hardly faster than the 1 s" in slightly.text

    def test_the_text_says_when_it_extrapolates(self):
        assert "extrapolated" not in TWO_MODELS.predict(2048, 5).text
        assert TWO_MODELS.predict(2049, 5).text.endswith("(extrapolated: costs were measured up to 1024 tokens)")

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [((0, 1), "prompt_tokens"), ((5, 0), "kept_tokens"), ((5, 6), "kept_tokens"), ((5, 5, 0), "speculator_tokens")],
    )
    def test_wrong_counts_are_named(self, arguments, name):
        with pytest.raises(ValueError, match=f"^{name}: "):
            TWO_MODELS.predict(*arguments)

    @pytest.mark.parametrize("parts", [{}, {"lower": BASE}, {"speculator": BASE, "lower": BASE, "upper": BASE}])
    def test_costs_are_of_two_models_or_of_two_parts(self, parts):
        with pytest.raises(ValueError, match=r"^costs: expected those of a speculator, or of lower and upper"):
            CostModel(BASE, **parts)


def result(mode="sparse", prompt=1000, kept=200, prediction=None, **seconds):
    selection = SimpleNamespace(cached=False, reused_tokens=0, prediction=prediction)
    return SimpleNamespace(
        mode=mode, prompt_tokens=prompt, kept_tokens=kept, prefilled_tokens=kept, selection=selection, seconds=seconds
    )


class TestObserve:
    def test_what_was_predicted_changes_nothing(self):
        stages = TWO_MODELS.predict(1000, 200).stages
        seen = TWO_MODELS.observe(result(**stages)).predict(1000, 200)
        assert seen.sparse == pytest.approx(TWO_MODELS.predict(1000, 200).sparse)

    def test_costs_move_toward_what_was_seen_and_get_there(self):
        costs, stages = TWO_MODELS, TWO_MODELS.predict(1000, 200).stages
        slower = result(speculator_prefill=3 * stages["speculator_prefill"], base_prefill=stages["base_prefill"])
        once = costs.observe(slower)
        assert once.speculator.seconds(1000) == pytest.approx(costs.speculator.seconds(1000) * 2**0.2)
        assert once.base == costs.base.scaled(1.0)
        for _ in range(60):
            costs = costs.observe(slower)
        assert costs.predict(1000, 200).stages["speculator_prefill"] == pytest.approx(
            3 * stages["speculator_prefill"], rel=0.01
        )

    def test_a_dense_run_speaks_for_the_base_alone(self):
        seen = TWO_MODELS.observe(result("dense", kept=1000, base_prefill=12.5 * 1.5), weight=1)
        assert seen.base.seconds(1000) == pytest.approx(12.5 * 1.5)
        assert seen.speculator == TWO_MODELS.speculator

    def test_parts_of_one_model(self):
        stages = ONE_MODEL.predict(1000, 200).stages
        seen = ONE_MODEL.observe(result(**{name: 1.5 * value for name, value in stages.items()}), weight=1)
        assert seen.lower.seconds(1000) == pytest.approx(1.5 * stages["speculator_prefill"])
        assert seen.upper.seconds(200) == pytest.approx(1.5 * stages["base_prefill"])

    def test_a_base_that_starts_again_says_nothing_of_its_upper_layers(self):
        prediction = ONE_MODEL.predict(1000, 200, continues=False)
        seconds = {name: 1.5 * value for name, value in prediction.stages.items()}
        seen = ONE_MODEL.observe(result(prediction=prediction, **seconds), weight=1)
        assert seen.upper == ONE_MODEL.upper
        assert seen.base.seconds(200) == pytest.approx(1.5 * ONE_MODEL.base.seconds(200))

    @pytest.mark.parametrize("other", [{"cached": True}, {"reused_tokens": 5}])
    def test_work_that_was_not_done_says_nothing(self, other):
        run = result(speculator_prefill=9.0, base_prefill=9.0)
        run.selection = SimpleNamespace(**{"cached": False, "reused_tokens": 0, **other})
        assert TWO_MODELS.observe(run) is TWO_MODELS
        run = result(speculator_prefill=9.0, base_prefill=9.0)
        run.prefilled_tokens = 50
        assert TWO_MODELS.observe(run) is TWO_MODELS


class TestFiles:
    @pytest.mark.parametrize("costs", [TWO_MODELS, ONE_MODEL], ids=["two", "one"])
    def test_a_file_gives_the_same_costs(self, costs, tmp_path):
        costs = replace(costs, speculator_ratio=1.25, identity={"base": "a, b", "threads": "2"})
        costs.save(tmp_path / "costs.json")
        assert CostModel.load(tmp_path / "costs.json", {"base": "a, b", "threads": "2"}) == costs

    def test_costs_of_something_else_are_refused_by_name(self, tmp_path):
        small, large, settings = build("llama"), build("llama", num_hidden_layers=5), config()
        costs = replace(TWO_MODELS, identity=identity_of(small, small, settings))
        file = tmp_path / "costs.json"
        costs.save(file)
        assert CostModel.load(file, identity_of(small, build("llama", seed=9), settings)) == costs  # weights differ
        for name, other in (
            ("base", identity_of(large, small, settings)),
            ("speculator", identity_of(small, large, settings)),
            ("base", identity_of(build("llama").to(torch.bfloat16), small, settings)),
            ("base", identity_of(build("llama", attn="eager"), small, settings)),
            ("queries", identity_of(small, small, config(look_ahead=4))),
            ("queries", identity_of(small, small, config(queries="observation_window"))),
            ("score_layers", identity_of(small, small, config(score_layers=(1, 2)))),
            ("prefill_chunk", identity_of(small, small, config(prefill_chunk=64))),
            ("self_layers", identity_of(small, None, settings, (0, 1))),
        ):
            with pytest.raises(
                ValueError, match=rf"costs\.json: expected costs measured with {name} = .*measure again"
            ):
                CostModel.load(file, other)

    def test_threads_count_on_a_cpu(self, threads):
        model = build("llama")
        threads(1)
        one = identity_of(model, model, config())
        threads(2)
        with pytest.raises(ValueError, match="threads = 2, got 1"):
            replace(TWO_MODELS, identity=one).check(identity_of(model, model, config()))

    @pytest.mark.parametrize(
        "change",
        [
            lambda record: record.update(version=2),
            lambda record: record.pop("base"),
            lambda record: record.update(base=[1, 2, 3, 4]),
            lambda record: record.update(base=[-1, 0, 0]),
            lambda record: record.update(look_ahead_steps="many"),
            lambda record: record.update(identity=[]),
        ],
    )
    def test_other_contents_are_named(self, change, tmp_path):
        record = json.loads(TWO_MODELS.to_json())
        change(record)
        (tmp_path / "x.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match=r"x\.json: expected costs as CostModel"):
            CostModel.load(tmp_path / "x.json")

    def test_files_that_are_no_json_are_named(self, tmp_path):
        (tmp_path / "x.json").write_text("hello")
        with pytest.raises(ValueError, match=r"x\.json: expected costs"):
            CostModel.load(tmp_path / "x.json")
