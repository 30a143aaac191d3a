"""Files of the commands: costs that are measured once, outputs that cannot be written, budgets in the wrong place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
from loop_models import build, byte_tokenizer
from typer.testing import CliRunner

from specprefill_kernels import models
from specprefill_kernels.commands import app
from specprefill_kernels.loop import measuring
from specprefill_kernels.loop.costs import CostModel, PrefillCost

TEXT = "A short line of the document. " * 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a base, a speculator with other tokens, and a document."""
    root = tmp_path_factory.mktemp("tiny")
    for name, merges, layers in (("base", (("t", "h"), ("th", "e")), 3), ("speculator", (("e", "r"),), 2)):
        build("llama", num_hidden_layers=layers).save_pretrained(root / name)
        byte_tokenizer(merges).save_pretrained(root / name)
    (root / "doc.txt").write_text(TEXT, encoding="utf-8")
    return root


@pytest.fixture
def quick_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring takes 10 seconds; a tenth is enough to see that it happens."""
    sample = measuring.sample
    monkeypatch.setattr(measuring, "sample", lambda parts, **options: sample(parts, **{**options, "seconds": 0.1}))


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_, **__):
        raise AssertionError("models were loaded before the output was looked at")

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "ensure", load)


def invoke(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def generate(tiny: Path, file: Path, *more: object, code: int = 0):
    result = invoke(
        "generate", "--base", tiny / "base", "--speculator", tiny / "speculator", "--prompt-file", tiny / "doc.txt",
        "--max-new-tokens", 1, "--costs", file, *more, code=code,
    )  # fmt: skip
    return result, " ".join(result.stderr.split())


def test_costs_are_measured_once_and_again_for_other_settings(tiny, quick_costs, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    _, said = generate(tiny, file)
    assert f"saved to {file} (there was no such file)" in said
    measured = file.read_text()
    assert CostModel.load(file).speculator_ratio > 0.5
    _, said = generate(tiny, file)
    assert f"Costs from {file}: measured up to" in said
    assert file.read_text() == measured
    _, said = generate(tiny, file, "--set", "look_ahead=3")
    assert "it was of something else" in said
    assert "expected costs measured with queries = look_ahead 3" in said
    assert CostModel.load(file).look_ahead_steps == 2
    _, said = generate(tiny, file, "--self-layers", "0:1")
    assert CostModel.load(file).lower is not None
    _, said = generate(tiny, file, "--self-layers", "0:1")
    assert f"Costs from {file}" in said


@pytest.mark.parametrize(("slower", "mode"), [(0.01, "dense"), (1000.0, "sparse")])
def test_costs_decide_what_generate_reads(tiny, quick_costs, tmp_path: Path, slower: float, mode: str) -> None:
    file = tmp_path / "costs.json"
    generate(tiny, file)
    found = CostModel.load(file)
    CostModel(PrefillCost(per_token=slower), PrefillCost(per_token=1.0), identity=found.identity).save(file)
    result, _ = generate(tiny, file, "--json")
    values = json.loads(result.stdout)
    assert values["mode"] == mode
    assert ("would not pay" in values["reason"]) == (mode == "dense")


def test_a_file_that_holds_no_costs_is_refused_and_left_alone(tiny, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not to be lost")
    _, said = generate(tiny, file, code=1)
    assert f"error: {file}: expected costs as CostModel.to_json writes them" in said
    assert file.read_text() == "not to be lost"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("generate", "--prompt-file", "doc.txt"), "--costs"),
        (("select", "--prompt-file", "doc.txt"), "--output"),
        (("select", "--prompt-file", "doc.txt"), "--page"),
        (("select", "--prompt-file", "doc.txt"), "--picture"),
        (("demo",), "--picture"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_an_output_in_no_folder_is_refused_before_models_are_loaded(no_models, tmp_path, command, option) -> None:
    for place, why in ((tmp_path / "none" / "out.png", "no such folder"), (tmp_path, "a folder")):
        said = " ".join(invoke(*command, option, place, code=1).stderr.split())
        assert f"error: {option}: expected a file that can be written" in said
        assert why in said


@pytest.mark.parametrize("command", ["demo", "calibrate", "eval"])
def test_a_file_in_the_place_of_the_outputs_folder_is_refused_before_models_are_loaded(
    no_models, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("")
    said = " ".join(invoke(command, "--output", tmp_path / "file" / "new" / "out", code=1).stderr.split())
    assert "error: --output: expected a file that can be written" in said
    assert f"a file: {tmp_path / 'file'}" in said


@pytest.mark.parametrize("setting", ["keep_ratio=0.3", "keep_tokens=100", " keep_mass=0.5"])
@pytest.mark.parametrize("command", ["calibrate", "eval"])
def test_a_budget_among_the_settings_is_refused_where_several_are_tried(no_models, tmp_path, command, setting) -> None:
    said = " ".join(invoke(command, "--output", tmp_path / "out", "--set", setting, code=1).stderr.split())
    assert "error: --set: expected --keep-ratio for the budgets to compare" in said
