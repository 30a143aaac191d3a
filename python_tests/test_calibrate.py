"""Calibration: planted layers are found, sets are scored as the speculator scores them, and nothing is read twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loop_models import build, byte_tokenizer
from typer.testing import CliRunner

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop.prompts import read_prompt
from specprefill_kernels.loop.speculator import Speculator
from specprefill_kernels.quality import calibrate as room
from specprefill_kernels.quality.calibrate import Calibration, Reading, calibrate, compare, read
from specprefill_kernels.quality.tasks import make

CONFIG = SpecPrefillConfig(chunk_size=8, pool_kernel_size=5, look_ahead=3, queries="look_ahead", keep_ratio=0.2)
LENGTH = 160
TOKENS = 600  # bytes


def planted(good, *, prompts=12, layers=8, seed=0):
    """Readings in which the layers `good` look at the evidence, and every other layer more strongly elsewhere."""
    random = torch.Generator().manual_seed(seed)
    readings = []
    for number in range(prompts):
        states = 0.01 * torch.rand(layers, 3, LENGTH, generator=random)
        start = 8 * int(torch.randint(1, 18, (1,), generator=random))
        evidence = torch.zeros(LENGTH, dtype=torch.bool)
        evidence[start : start + 8] = True
        for layer in range(layers):
            if layer in good:
                states[layer, :, start : start + 8] += 0.5
            else:
                wrong = torch.randperm(LENGTH // 8 - 1, generator=random)[:6]
                wrong = wrong[wrong != start // 8]
                states[layer].view(3, -1, 8)[:, wrong] += 0.9
        readings.append(Reading("niah_single", number, evidence, tuple(range(layers)), 3, states))
    return readings


@pytest.mark.parametrize("good", [{5}, {2, 3}, {1, 4, 6}])
def test_the_planted_layers_are_chosen(good):
    found = compare(planted(good), CONFIG, (0.1, 0.2), {})
    assert found.score_layers == tuple(sorted(good))
    assert found.choices[found.chosen].evidence == {"0.1": 1.0, "0.2": 1.0}
    assert found.choices[found.chosen].complete == {"0.1": 1.0, "0.2": 1.0}
    assert found.choices["all"].score < 0.6
    assert {figures.layers[0] for figures in found.single if figures.score == 1} == good
    assert found.unseen["chosen"] == 1
    assert found.unseen["difference"]["low"] > 0


def test_where_every_layer_is_as_good_all_are_kept():
    found = compare(planted(set(range(8))), CONFIG, (0.2,), {})
    assert found.chosen == "all"
    assert found.score_layers is None
    assert found.unseen["difference"]["estimate"] == 0


def test_layers_without_any_signal_gain_nothing_on_unseen_prompts():
    """The best of many useless sets looks good on the prompts that chose it; the figure from the others does not."""
    readings = planted(set(), prompts=16)
    for reading in readings:
        reading.states.copy_(torch.rand(reading.states.shape, generator=torch.Generator().manual_seed(reading.seed)))
    found = compare(readings, CONFIG, (0.1, 0.2, 0.5), {})
    best = max(figures.score for figures in found.choices.values())
    assert best > found.unseen["chosen"]
    assert found.unseen["difference"]["low"] <= 0.0


def test_halves_never_judge_their_own_choice():
    """Even seeds plant layer 1, odd seeds layer 6: what either half chooses is wrong for the other."""
    even, odd = planted({1}, prompts=12), planted({6}, prompts=12)
    readings = [(odd if number % 2 else even)[number] for number in range(12)]
    found = compare(readings, CONFIG, (0.1,), {})
    assert found.unseen["chosen"] < 0.5
    assert {1, 6} <= {figures.layers[0] for figures in found.single if figures.score >= 0.5}


def test_figures_count_what_is_kept_by_hand():
    """Two chunks of 20 are kept: the last, and the best. Evidence in chunks 2 and 3, one of them kept."""
    state = torch.zeros(1, 3, LENGTH)
    state[0, :, 16:24] = 1.0
    evidence = torch.zeros(LENGTH, dtype=torch.bool)
    evidence[22:26] = True
    readings = [Reading("niah_single", seed, evidence, (4,), 3, state) for seed in (0, 1)]
    figures = compare(readings, CONFIG.replace(pool_kernel_size=1), (0.1,), {}).choices["all"]
    assert figures.evidence == {"0.1": 0.5}
    assert figures.complete == {"0.1": 0.0}
    assert figures.score == 0.25
    assert figures.tasks == {"niah_single": 0.25}


@pytest.mark.parametrize("queries", ["look_ahead", "observation_window", "both"])
@pytest.mark.parametrize("pool_order", ["before_max", "after_max"])
def test_the_maximum_of_the_states_is_what_the_speculator_scores(queries, pool_order):
    from specprefill_kernels.ops.finalize import finalize_importance

    config = CONFIG.replace(queries=queries, pool_order=pool_order, observation_rows=5)
    tokenizer, model = byte_tokenizer(), build("qwen2_sliding")
    sample = make("niah_single", 0, TOKENS, tokenizer)
    reading = read(Speculator(model, config), tokenizer, sample)
    ids = read_prompt(sample.messages, tokenizer).input_ids
    for layers in ((0, 1, 2, 3), (1, 3), (2,)):
        expected = Speculator(model, config.replace(score_layers=layers)).score(ids)
        state = reading.states[list(layers)].amax(0, keepdim=True)
        importance = finalize_importance(
            state,
            None,
            torch.tensor([reading.rows], dtype=torch.int32),
            pool_kernel_size=5 if pool_order == "after_max" else None,
        )
        assert torch.equal(importance[0], expected.importance)
    assert reading.rows == expected.num_look_ahead
    text = tokenizer.decode(ids[0][reading.evidence])
    assert text == sample.evidence_texts()[0]


@pytest.fixture(scope="module")
def model():
    return build("llama")


def run(model, **changes):
    arguments = {
        "name": "tiny",
        "tasks": ["niah_single", "niah_multikey"],
        "seeds": (0, 1),
        "tokens": TOKENS,
        **changes,
    }
    return calibrate(model, byte_tokenizer(), CONFIG, **arguments)


def test_a_calibration_survives_json(model, tmp_path):
    found = run(model)
    found.save(tmp_path / "new" / "c.json")
    assert Calibration.load(tmp_path / "new" / "c.json") == found
    setting = found.setting
    assert setting["model"]["name"] == "tiny"
    assert setting["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert setting["config"]["look_ahead"] == 3
    assert (setting["seeds"], setting["tokens"], setting["tasks"]) == ([0, 1], TOKENS, ["niah_single", "niah_multikey"])
    assert [figures.layers for figures in found.single] == [(0,), (1,), (2,), (3,)]
    assert {"all", "best 1", "best 3", "from 1"} <= set(found.choices)
    assert found.choices["from 2"].layers == (2, 3)


def test_what_was_read_is_not_read_again(model, tmp_path, monkeypatch):
    steps, whole, count = [], run(model), [0]

    def interrupted(*arguments):
        if count[0] == 3:
            raise KeyboardInterrupt
        count[0] += 1
        return read(*arguments)

    monkeypatch.setattr(room, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, parts=tmp_path)
    count[0] = 2  # one more and it would stop again
    again = run(model, parts=tmp_path, on_prompt=lambda done, total: steps.append((done, total)))
    assert again == whole
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not list(tmp_path.glob("*.unfinished"))


def test_readings_of_another_model_or_configuration_are_refused(model, tmp_path):
    run(model, parts=tmp_path)
    with pytest.raises(ValueError, match=r"parts: expected model .*got"):
        run(build("llama", seed=5), parts=tmp_path)
    with pytest.raises(ValueError, match="parts: expected tokens 700, got 600"):
        run(model, parts=tmp_path, tokens=700)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["niah"]}, "tasks: expected some of .*got 'niah'"),
        ({"seeds": (0, 0)}, "seeds: expected at least 2, and 4 prompts in all"),
        ({"tasks": ["niah_single"]}, "seeds: expected at least 2, and 4 prompts in all"),
        ({"keep_ratios": (0.1, 1.0)}, r"keep_ratios: expected fractions in \(0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_are_named(model, changes, message):
    with pytest.raises(ValueError, match=message):
        run(model, **changes)


def test_files_that_are_no_calibration_are_named(tmp_path):
    for content in ("no json", "[]", "{}"):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(ValueError, match=r"path: expected a calibration, got .*c\.json, which is none"):
            Calibration.load(tmp_path / "c.json")
    (tmp_path / "c.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="path: expected a calibration of format 1, got format 99"):
        Calibration.load(tmp_path / "c.json")


@pytest.fixture
def command(model, monkeypatch):
    import typer

    from specprefill_kernels import models
    from specprefill_kernels.commands.calibrate import calibrate as function

    monkeypatch.setattr(models, "load", lambda *arguments, **options: (model, byte_tokenizer()))
    app = typer.Typer()
    app.command()(function)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_the_command_writes_what_it_found_and_clears_up(command, tmp_path):
    output = tmp_path / "c.json"
    result = command(
        "--output", str(output), "--prompts", "4", "--tokens", str(TOKENS), "--tasks", "niah_single,niah_multikey",
        "--set", "chunk_size=8",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = Calibration.load(output)
    assert len(found.setting["seeds"]) == 2
    assert found.setting["config"]["chunk_size"] == 8
    assert f"{found.choices['all'].score:.3f}" in result.output
    assert not output.with_suffix(".parts").exists()


def test_the_command_says_in_one_line_what_is_wrong(command, tmp_path):
    result = command("--output", str(tmp_path / "c.json"), "--tasks", "niah")
    assert result.exit_code == 1
    assert "tasks: expected some of" in " ".join(result.output.split())


def test_a_folder_with_files_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="expected an empty folder or one of a calibration"):
        room._Parts(tmp_path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
