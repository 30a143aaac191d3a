"""specprefill eval on tiny random models, and (marked) its short version on the real small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
from loop_models import build, byte_tokenizer
from typer.testing import CliRunner

from specprefill_kernels.commands import app

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A base and a smaller speculator with another tokenizer."""
    root = tmp_path_factory.mktemp("tiny")
    for name, merges, seed in (("base", (("t", "h"), ("th", "e")), 0), ("speculator", (("e", "r"),), 1)):
        build("llama", seed=seed, num_hidden_layers=3 if name == "base" else 2).save_pretrained(root / name)
        byte_tokenizer(merges).save_pretrained(root / name)
    return "--base", str(root / "base"), "--speculator", str(root / "speculator")


def invoke(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "160"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def small(tiny, output: Path) -> tuple[object, ...]:
    return (
        *tiny, "--tasks", "niah_single,niah_multikey", "--prompts", 2, "--tokens", 600, "--keep-ratio", 0.3,
        "--keep-ratio", 0.5, "--output", output, "--set", "chunk_size=16",
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory: pytest.TempPathFactory):
    output = tmp_path_factory.mktemp("eval") / "new"
    return invoke(*small(tiny, output)), output


def test_records_tables_and_plot_are_written(done) -> None:
    result, output = done
    assert "36 of 36 answers" in result.stderr
    assert "all tasks, 4 prompts" in result.stdout
    for title in ("full prompt", "kept (speculative)", "random chunks", "first + last tokens"):
        assert title in result.stdout
    values = json.loads((output / "summary.json").read_text())
    assert len(values["rows"]) == 3 * 9
    assert values["incomplete_prompts"] == 0
    assert values["setting"]["base"]["name"] == "base"
    assert values["setting"]["seeds"] == [0, 2]
    assert values["setting"]["config"]["chunk_size"] == 16
    assert str(output.parent) not in (output / "records.jsonl").read_text()
    report = (output / "summary.md").read_text()
    assert "## niah_multikey (2 prompts)" in report
    if (output / "score.png").exists():
        assert "](score.png)" in report
    lines = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 36
    assert max(line["new_tokens"] for line in lines[1:]) == 24  # the task's own limit is 16
    assert {(line["prompt_tokens"] > line["kept_tokens"]) for line in lines[1:] if line["method"] != "full"} == {True}


def test_a_second_call_answers_nothing_again(tiny, done) -> None:
    _, output = done
    before = (output / "records.jsonl").read_bytes(), (output / "summary.json").read_bytes()
    result = invoke(*small(tiny, output))
    assert "36 of 36 answers are there already" in result.stderr
    assert ((output / "records.jsonl").read_bytes(), (output / "summary.json").read_bytes()) == before


def test_the_full_prompt_alone_is_an_evaluation_too(tiny, tmp_path: Path) -> None:
    arguments = ("--tasks", "niah_single", "--prompts", 1, "--tokens", 400, "--methods", "full")
    assert "full prompt" in invoke(*tiny, *arguments, "--output", tmp_path).stdout
    assert (tmp_path / "summary.md").exists()


def test_another_setting_in_the_same_folder_is_one_plain_line(tiny, done) -> None:
    _, output = done
    before = (output / "records.jsonl").read_bytes()
    result = invoke(*small(tiny, output), "--set", "chunk_size=8", code=1)
    assert "config.chunk_size was 16, is 8" in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert (output / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--tasks", "niah_single,riddles"), "--tasks: expected some of niah_single"),
        (("--methods", "best"), "--methods: expected some of full"),
        (("--set", "keep_mass=0.5"), "--set: expected --keep-ratio"),
        (("--set", "chunk=5"), "chunk: expected a field"),
        (("--keep-ratio", "1.5"), "keep_ratios: expected fractions"),
        (("--short", "--methods", "full,kept"), "--short: expected the methods full, kept, random"),
        (("--preset", "best"), "name: expected one of"),
        (("--tokens", "20"), "tokens: expected at least"),
    ],
)
def test_wrong_options_are_one_plain_line(tiny, tmp_path, arguments, expected: str) -> None:
    result = invoke(*tiny, "--output", tmp_path, *arguments, code=1)
    assert expected in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_no_time_leaves_no_figures_and_says_so(tiny, tmp_path) -> None:
    result = invoke(*small(tiny, tmp_path), "--minutes", 0, code=1)
    assert "The time is up" in result.stderr
    assert "expected at least one prompt answered by every method" in " ".join(result.stderr.split())


def test_an_interrupted_call_says_how_to_go_on_and_the_next_one_does(tiny, tmp_path, monkeypatch) -> None:
    from specprefill_kernels.quality.records import RecordFile

    append = RecordFile.append

    def interrupted(self, record) -> None:
        if len(self.records) == 5:
            raise KeyboardInterrupt
        append(self, record)

    monkeypatch.setattr(RecordFile, "append", interrupted)
    result = invoke(*small(tiny, tmp_path), code=130)
    assert "Interrupted. The same command goes on" in result.stderr
    assert "error" not in result.stderr
    monkeypatch.undo()
    assert "5 of 36 answers are there already" in invoke(*small(tiny, tmp_path)).stderr
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 37


def test_the_short_version_fails_where_models_guess(tiny, tmp_path) -> None:
    """Random weights answer nothing right: kept is not ahead of random, and that is an error."""
    result = invoke(*tiny, "--short", "--prompts", 3, "--tokens", 600, "--output", tmp_path, code=1)
    assert "not far ahead of random chunks: +0.00" in " ".join(result.stderr.split())
    assert "## niah_single (3 prompts)" in (tmp_path / "summary.md").read_text()
    assert "first + last" not in result.stdout


def test_longbench_files_are_read_beside_generated_tasks(tiny, tmp_path) -> None:
    line = {"context": "A short story. " * 60, "answers": ["Ann"], "all_classes": None, "length": 9, "language": "en"}
    file = tmp_path / "some.jsonl"
    rows = [{**line, "dataset": "hotpotqa", "input": f"Who is {i}?"} for i in range(3)]
    rows.append({**line, "dataset": "lcc", "input": ""})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    code = tmp_path / "code.jsonl"
    code.write_text(json.dumps({**rows[3], "context": "x = 1\n" * 500}) + "\n")
    output = tmp_path / "out"
    invoke(
        *tiny, "--longbench", file, "--longbench", code, "--prompts", 2, "--keep-ratio", 0.3, "--methods", "full,kept",
        "--output", output,
    )  # fmt: skip
    lines = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
    assert lines[0]["setting"]["tasks"] == ["longbench/hotpotqa", "longbench/lcc"]
    assert set(lines[0]["setting"]["files"]) == {"some.jsonl", "code.jsonl"}
    assert [(r["task"], r["seed"]) for r in lines[1::2]] == [
        ("longbench/hotpotqa", 0), ("longbench/lcc", 0), ("longbench/hotpotqa", 1),
    ]  # fmt: skip
    notes = {r["task"]: r["note"] for r in lines[1:]}
    assert notes["longbench/hotpotqa"] == ""
    assert notes["longbench/lcc"].startswith("cut in the middle")
    twice = invoke(*tiny, "--longbench", file, "--longbench", file, "--output", tmp_path / "twice", code=1)
    assert "each data set in one file" in twice.stderr


def test_a_models_own_layers_can_score(tiny, tmp_path) -> None:
    arguments = ("--tasks", "niah_single", "--prompts", 1, "--tokens", 500, "--keep-ratio", 0.3, "--output", tmp_path)
    invoke(*tiny[:2], "--self-layers", "0:1", *arguments)
    setting = json.loads((tmp_path / "summary.json").read_text())["setting"]
    assert (setting["speculator"], setting["self_layers"]) == (None, "0:1")


def test_the_bench_entry_is_the_same_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.quality", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "--longbench" in result.stdout


@pytest.mark.model
@pytest.mark.slow
def test_two_real_prompts_are_answered_from_kept_tokens(tmp_path) -> None:
    """One prompt by each method: the figures of a real run are for `specprefill eval --short` itself to judge."""
    result = invoke(
        "--tasks", "niah_single", "--prompts", 2, "--tokens", 500, "--keep-ratio", 0.4, "--output", tmp_path,
        "--methods", "full,kept",
    )  # fmt: skip
    assert "kept (speculative)" in result.stdout
    rows = {row["method"]: row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    assert rows["full"]["score"]["estimate"] == 1
    assert rows["kept"]["score"]["estimate"] == 1
    assert rows["kept"]["evidence"]["estimate"] == 1
