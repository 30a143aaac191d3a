"""Every code block of the README runs."""

from __future__ import annotations

import os
import re
import shlex
from functools import partial
from pathlib import Path

import pages
import pytest
import torch
from pages import ROOT

README = pages.text_of("README.md")
blocks = partial(pages.blocks, "README.md", None)


def test_nothing_escapes_these_tests() -> None:
    assert set(pages.languages("README.md")) == {"sh", "python", "bibtex"}
    assert [len(blocks(language)) for language in ("sh", "python", "bibtex")] == [4, 3, 1]


def test_the_ops_block(capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    (block,) = (block for block in blocks("python") if "score_layers_" in block)
    assert len(block.strip().splitlines()) <= 12
    values: dict = {}
    exec(block, values)
    assert capsys.readouterr().out
    assert tuple(values["importance"].shape) == (1, 1000)
    kept = values["packed"].position_ids[: int(values["selection"].num_kept[0])]
    assert kept.tolist() == values["packed"].values[: len(kept)].tolist()
    assert 0 < len(kept) <= 7 * 32  # ceil(0.2 * 32 chunks)


def test_the_loop_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """As it stands, but for the models: the names stand for tiny ones, so that no gigabyte is loaded."""
    pytest.importorskip("transformers")
    from loop_models import stand_ins

    stand_ins(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("report.txt").write_text("The report was signed by the treasurer. " * 20)
    (block,) = (block for block in blocks("python") if "models.load(" in block)
    values: dict = {}
    exec(block, values)
    assert values["result"].mode == "sparse"
    assert "sparse" in capsys.readouterr().out
    loop_class, base, tokenizer = values["SpecPrefill"], values["base"], values["tokenizer"]
    assert "self_layers=(0, 11)" in README  # the sentence below the block, with fewer layers
    assert loop_class(base, self_layers=(0, 1), tokenizer=tokenizer)

    (block,) = (block for block in blocks("python") if "Session(" in block)
    exec(block, values)
    first, second = capsys.readouterr().out.splitlines()
    assert first
    assert int(second.split()[0]) > 0


def test_the_first_commands_are_run_pys() -> None:
    for line in blocks("sh")[0].strip().splitlines():
        python, script, job = shlex.split(line)[:3]
        assert python == "python3"
        assert f"python3 {script} {job} " in (ROOT / script).read_text(encoding="utf-8")


@pytest.mark.parametrize("line", blocks("sh")[1].strip().splitlines())
def test_commands_have_the_options_shown(line: str) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from specprefill_kernels.commands import app

    program, command, *arguments = shlex.split(line)
    assert program == "specprefill"
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert option in text, f"{command} has no {option}"


def test_the_example_in_c_is_built_as_its_own_readme_says() -> None:
    """.ci/c_engine runs that."""
    example = ROOT / "examples/c_engine"
    assert f"```sh\n{blocks('sh')[2]}```" in (example / "README.md").read_text(encoding="utf-8")
    source, build = shlex.split(blocks("sh")[2].splitlines()[0])[2:5:2]
    assert ROOT / source == example
    assert blocks("sh")[2].splitlines()[2] == f"{build}/c_engine"
    check = (ROOT / ".ci/c_engine").read_text(encoding="utf-8")
    assert f"cmake --fresh -S {source} -B" in check


def test_the_emulation_is_built_and_chosen_as_it_is_shown() -> None:
    (line,) = blocks("sh")[3].strip().splitlines()
    variable, rest = line.split("=$(", 1)
    builder, tests = rest.split(") ", 1)
    launcher = (ROOT / "specprefill_kernels/_cuda.py").read_text(encoding="utf-8")
    assert f'os.environ.get("{variable}"' in launcher
    assert builder in launcher
    assert (ROOT / builder.split()[1]).is_file()
    assert shlex.split(tests) == ["python", "-m", "pytest", "python_tests", "-k", "cuda"]


def test_files_that_it_names_are_there() -> None:
    for readme in (ROOT / "README.md", ROOT / "examples/c_engine/README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (readme.parent / target).is_file(), target
                assert os.path.getsize(readme.parent / target) < 300_000


def test_the_table_of_backends_is_true() -> None:
    import specprefill_kernels as spk

    section = README.split("## What runs where")[1].split("\n## ")[0]
    header, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    backends = [cell.strip() for cell in header.strip("|").split("|")][1:]
    assert backends == ["reference", "cpu", "triton", "cuda"]
    named = set()
    for row in rows:
        ops, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        for op in re.findall(r"`(\w+?)_?`", ops):
            named.add(op)
            for backend, cell in zip(backends, cells, strict=True):
                reason = spk.available_backends(op)[backend]
                if cell == "not yet":
                    assert reason is not None, f"{op} on {backend}"
                elif backend == "reference":
                    assert reason is None, f"{op} on {backend}: {reason}"
    from specprefill_kernels import _backends

    assert named == set(_backends.ROOMS)
