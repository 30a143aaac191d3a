"""The command line on tiny models, on a broken install, and (marked) on the real small model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
from loop_models import build, byte_tokenizer
from typer.testing import CliRunner

from specprefill_kernels import models
from specprefill_kernels.commands import app
from specprefill_kernels.demo import document as stories
from specprefill_kernels.demo.document import Story, default_story, insert_paragraph
from specprefill_kernels.models.progress import LogProgress

TEXT = "A short line of the document. " * 18 + "The key is under the mat. " + "Another line follows here. " * 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, a smaller speculator with another tokenizer, and a document in a file."""
    root = tmp_path_factory.mktemp("tiny")
    for name, merges, seed in (("base", (("t", "h"), ("th", "e")), 0), ("speculator", (("e", "r"),), 1)):
        build("llama", seed=seed, num_hidden_layers=4 if name == "base" else 2).save_pretrained(root / name)
        byte_tokenizer(merges).save_pretrained(root / name)
    (root / "doc.txt").write_text(TEXT, encoding="utf-8")
    return {name: str(root / name) for name in ("base", "speculator", "doc.txt")}


def invoke(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def both(tiny: dict[str, str]) -> tuple[str, ...]:
    return ("--base", tiny["base"], "--speculator", tiny["speculator"])


# --------------------------------------------------------------------------------------------------------- commands


def test_help_names_the_commands() -> None:
    for command in ("demo", "generate", "select", "show-config"):
        assert command in invoke("--help").output
        assert "Usage" in invoke(command, "--help").output


def test_demo_writes_the_page_and_the_table(tiny, tmp_path: Path) -> None:
    page = tmp_path / "new folder" / "page.html"
    output = invoke(
        "demo", *both(tiny), "--document", tiny["doc.txt"], "--question", "Where is the key?", "--expect", "mat",
        "--output", page, "--keep-ratio", 0.25, "--rounds", 2, "--max-new-tokens", 3,
    ).output  # fmt: skip
    for expected in ("full prefill", "speculative prefill", "time to first token", "speed-up", "look-ahead", "wrong"):
        assert expected in output, expected
    text = page.read_text(encoding="utf-8")
    assert "Where is the key?" in text
    assert "doc.txt" in text
    assert 'class="chunk kept"' in text
    assert 'class="chunk dropped"' in text


def test_demo_says_when_both_models_are_one(tiny, tmp_path: Path) -> None:
    output = invoke(
        "demo", "--base", tiny["base"], "--speculator", tiny["base"], "--document", tiny["doc.txt"], "--question", "?",
        "--output", tmp_path / "page.html", "--rounds", 1, "--max-new-tokens", 1,
    ).output  # fmt: skip
    assert "One model on both sides cannot gain" in output


def test_demo_on_a_short_document_says_that_nothing_was_skipped(tiny, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    output = invoke(
        "demo", *both(tiny), "--document", short, "--question", "?", "--rounds", 1, "--max-new-tokens", 1,
        "--output", tmp_path / "page.html",
    ).output  # fmt: skip
    assert "Nothing was skipped" in output


def test_generate_streams_and_reports(tiny) -> None:
    arguments = (
        "generate",
        *both(tiny),
        "--prompt-file",
        tiny["doc.txt"],
        "--question",
        "Where?",
        "--max-new-tokens",
        4,
    )
    result = invoke(*arguments)
    assert re.search(r"sparse: read \d+ of \d+ tokens", result.stderr)
    values = json.loads(invoke(*arguments, "--json").stdout)
    assert values["mode"] == "sparse"
    assert values["kept_tokens"] < values["prompt_tokens"]
    assert values["text"].strip() == result.stdout.strip()
    assert values["ttft"] == pytest.approx(sum(v for k, v in values["seconds"].items() if k != "decode"))


def test_generate_reads_standard_input(tiny) -> None:
    result = CliRunner().invoke(
        app, ["generate", *both(tiny), "--prompt-file", "-", "--raw", "--max-new-tokens", "1", "--json"], input=TEXT
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["prompt_tokens"] > 256


def test_generate_with_the_bases_own_layers(tiny) -> None:
    result = invoke(
        "generate", "--base", tiny["base"], "--self-layers", "0:1", "--prompt-file", tiny["doc.txt"],
        "--max-new-tokens", 1, "--json",
    )  # fmt: skip
    assert json.loads(result.stdout)["mode"] == "sparse"


def test_select_prints_or_saves_what_would_be_kept(tiny, tmp_path: Path) -> None:
    arguments = ("select", *both(tiny), "--prompt-file", tiny["doc.txt"], "--question", "Where?", "--keep-ratio", 0.3)
    assert re.search(r"sparse: \d+ of \d+ tokens kept in \d+ spans", invoke(*arguments).stdout)
    file = tmp_path / "kept.json"
    invoke(*arguments, "--output", file)
    values = json.loads(file.read_text(encoding="utf-8"))
    assert len(values["importance"]) == values["prompt_tokens"]
    assert sum(span["end"] - span["start"] for span in values["spans"]) == values["kept_tokens"]
    for span in values["spans"]:
        assert len(span["text"]) == span["characters"][1] - span["characters"][0] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--document", "DOC"), "--question: expected one beside --document"),
        (("demo", "--keep-ratio", "0"), "keep_ratio: expected a fraction"),
        (("generate", "--prompt-file", "/no/such/file"), "--prompt-file: expected a text file or -"),
        (("generate", "--prompt-file", "DOC", "--self-layers", "3"), "--self-layers: expected FIRST:LAST"),
        (("generate", "--prompt-file", "DOC", "--base", "no-such-model"), "name_or_path: expected one of"),
        (("select", "--prompt-file", "DOC", "--preset", "none"), "expected one of"),
    ],
)
def test_errors_are_one_message_and_no_traceback(tiny, arguments: tuple[str, ...], message: str) -> None:
    given = [tiny["doc.txt"] if argument == "DOC" else argument for argument in arguments]
    if arguments[0] != "demo" and "--base" not in arguments:
        given += both(tiny)
    if "--self-layers" in arguments:
        given = given[: given.index("--speculator")] if "--speculator" in given else given
    result = invoke(*given, code=1)
    assert "error:" in result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


# ------------------------------------------------------------------------------------------------------ show-config


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "160", **environment},
        timeout=120,
    )


def test_show_config_prints() -> None:
    output = invoke("show-config").output
    for expected in ("torch", "model smollm2-135m", "op score_layer", "reference", "model cache", "compiled kernels"):
        assert expected in output, expected


@pytest.mark.parametrize("broken", ["transformers", "numpy", "gguf", "specprefill_kernels.models"])
def test_show_config_reports_a_broken_package_inside_the_table(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    for name in [broken, *(name for name in sys.modules if name.startswith(broken + "."))]:
        monkeypatch.setitem(sys.modules, name, None)
    output = invoke("show-config").output
    assert "failed:" in output
    assert "op select_chunks" in output


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_command_lines_parts(missing: str) -> None:
    start = f"import sys; sys.modules['{missing}'] = None; sys.argv = ['specprefill', '{{}}']; "
    call = "from specprefill_kernels.cli import main; main()"
    done = python(start.format("show-config") + call)
    assert done.returncode == 0, done.stderr
    assert "op score_layer" in done.stdout
    assert "command line" in done.stdout
    done = python(start.format("demo") + call)
    assert done.returncode == 1
    assert 'pip install "specprefill-kernels[demo]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_show_config_prints_where_torch_is_broken() -> None:
    start = "import sys; sys.modules['torch'] = None; sys.argv = ['specprefill', 'show-config']; "
    done = python(start + "from specprefill_kernels.cli import main; main()")
    assert done.returncode == 0, done.stderr
    assert "failed: " in next(line for line in done.stdout.splitlines() if line.startswith("torch "))
    done = python(start + "import specprefill_kernels; specprefill_kernels.score_layer_")
    assert "ImportError: specprefill_kernels cannot be used" in done.stderr
    assert "torch" in done.stderr


@pytest.mark.parametrize("module", ["specprefill_kernels", "specprefill_kernels.cli"])
def test_both_modules_run(module: str) -> None:
    done = python(
        f"import runpy, sys; sys.argv = ['x', 'show-config']; runpy.run_module('{module}', run_name='__main__')"
    )
    assert done.returncode == 0, done.stderr
    assert "op gather_kv" in done.stdout


# --------------------------------------------------------------------------------------------------------- the story


def test_the_story_holds_one_inserted_sentence_deep_inside() -> None:
    story = default_story()
    assert story.inserted is not None
    assert story.document.count(story.inserted) == 1
    assert 0.4 < story.document.index(story.inserted) / len(story.document) < 0.8
    assert story.expected is not None
    assert story.expected in story.inserted
    assert story.expected not in story.document.replace(story.inserted, "")
    assert len(story.document) > 7_000
    assert story.document.replace(story.inserted + "\n\n", "") == stories.documentation(
        stories.TOPIC, stories.LIMIT_CHARS
    )


def test_every_depth_finds_a_paragraph() -> None:
    text = "one\n\ntwo\n\nthree"
    assert insert_paragraph(text, "X", 0.0) == "X\n\none\n\ntwo\n\nthree"
    assert insert_paragraph(text, "X", 1.0) == "one\n\ntwo\n\nthree\n\nX"
    assert insert_paragraph(text, "X", 0.35) == "one\n\nX\n\ntwo\n\nthree"
    assert insert_paragraph("", "X", 0.5) == "X"


def test_a_python_without_the_text_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match="--document FILE --question TEXT"):
        default_story()


def test_answers_are_judged_by_the_expected_words() -> None:
    story = Story(title="", document="", question="", expected="Green Tin")
    assert story.is_right("in a green tin box") is True
    assert story.is_right("in a red box") is False
    assert Story(title="", document="", question="").is_right("anything") is None


# ---------------------------------------------------------------------------------------------------- a real model


@pytest.mark.model
@pytest.mark.slow
def test_small_demo_on_the_real_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    try:
        models.ensure("smollm2-135m", LogProgress())
    except (models.FetchError, RuntimeError) as error:
        pytest.skip(f"the model could not be had: {error}")
    page = tmp_path / "page.html"
    output = invoke("demo", "--small", "--rounds", 1, "--output", page).output
    assert output.count("right") >= 2, output
    assert "wrong" not in output
    assert "kept whole" in output
    assert "cannot gain" in output
    assert "green tin" in page.read_text(encoding="utf-8")
