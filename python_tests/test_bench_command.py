"""`python3 run.py bench`: which command each job is, and that a peer which cannot be installed stops nothing."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run.py as a module, with an environment that is not there; what it would call is in `run.called`."""
    monkeypatch.setenv("SPECPREFILL_VENV", str(tmp_path / "venv"))
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delitem(sys.modules, "environments", raising=False)
    spec = importlib.util.spec_from_file_location("run_under_test", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.environments = sys.modules["environments"]
    module.called = []
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(module, "call", lambda *command, **_: module.called.append(command[1:]) or 0)
    monkeypatch.setattr(module, "set_up", lambda extras: module.called.append(("set up", extras)))
    return module


def test_without_a_job_the_report_follows_the_microbenchmarks(run):
    assert run.main(["bench"]) == 0
    ops = ("-m", "pytest", "bench", "--benchmark-json=bench/results/ops.json")
    assert run.called == [("set up", "bench"), ops, ("-m", "bench.report")]
    assert (run.ROOT / "bench" / "results").is_dir()


@pytest.mark.parametrize("job", ["ops", "goals", "roofline", "scaling", "ttft", "timing", "report"])
def test_arguments_are_passed_on(run, job):
    assert run.main(["bench", job, "--benchmark-json=here.json", "-x"]) == 0
    assert run.called[1] == (*run.BENCHES[job], "--benchmark-json=here.json", "-x")


def test_every_job_is_a_file_and_in_the_readmes(run):
    documented = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    for job, command in run.BENCHES.items():
        module = command[1].removeprefix("bench.")
        assert module == "pytest" or (ROOT / "bench" / f"{module}.py").is_file()
        assert job in run.__doc__
    named = set(re.findall(r"run\.py bench (\w+)", documented))
    assert named == set(run.BENCHES) - {"ops", "timing"}


def test_a_job_that_is_none(run, capsys):
    assert run.main(["bench", "everything"]) == 2
    assert "expected one of ops, goals" in capsys.readouterr().err
    assert len(run.called) == 1


def test_peers_are_measured_with_kvpress_where_it_installs(run, monkeypatch, capsys):
    for python in ("/somewhere/python", None):
        monkeypatch.setattr(run, "install_kvpress", lambda python=python: python)
        run.called.clear()
        assert run.main(["bench", "peers", "--quick"]) == 0
        extra = ("--kvpress-python", python) if python else ()
        assert run.called[1] == ("-m", "bench.peers", "--quick", *extra)
        assert ("peers are measured without kvpress" in capsys.readouterr().err) == (python is None)
    monkeypatch.setattr(run, "install_kvpress", lambda: pytest.fail("one was named"))
    assert run.main(["bench", "peers", "--kvpress-python", "/other"]) == 0


def test_an_environment_that_fails_is_said_and_tried_again(run, monkeypatch, capsys):
    steps: list[str] = []

    def step(title, command):
        steps.append(title)
        Path(run.VENV, "kvpress").mkdir(parents=True, exist_ok=True)
        return "exit status 1" if title == failing else None

    monkeypatch.setattr(run.environments, "run_step", step)
    failing = run.environments.KVPRESS
    assert run.install_kvpress() is None
    assert f"{run.environments.KVPRESS}: exit status 1" in capsys.readouterr().err
    failing = ""
    made = run.install_kvpress()
    assert made == str(run.VENV / "kvpress" / "bin" / "python")
    steps.clear()
    assert run.install_kvpress() == made
    assert steps == [], "it is there"


def test_the_press_is_tested_where_kvpress_installs(run, monkeypatch):
    (run.ROOT / "python_tests").mkdir()
    for name in ("test_kvpress.py", "test_kvpress_page.py", "test_other.py"):
        (run.ROOT / "python_tests" / name).touch()
    monkeypatch.setattr(run, "install_kvpress", lambda: "/somewhere/python")
    assert run.main(["kvpress"]) == 0
    tests = [str(run.ROOT / "python_tests" / name) for name in ("test_kvpress.py", "test_kvpress_page.py")]
    assert run.called == [("set up", "test"), ("-m", "pytest", "-q", *tests)]
    assert run.main(["kvpress", "-x", tests[0]]) == 0
    assert run.called[-1] == ("-m", "pytest", "-x", tests[0])
    monkeypatch.setattr(run, "install_kvpress", lambda: None)
    assert run.main(["kvpress"]) == 1
