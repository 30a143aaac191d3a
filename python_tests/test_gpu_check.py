"""bench/gpu_check.sh without a GPU: what it says is missing, its parts, limits and results with stand-ins."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The test processes that gpu_tests.py starts find their tests by these markers; here any will do.
TESTS = """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("i", range(6))
def test_good(i): pass
@pytest.mark.gpu
def test_bad(): assert 1 == 2, "planted"
"""


def check(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "bench/gpu_check.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(out), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def parts_file(folder: Path, *parts: tuple[str, str, float, bool]) -> str:
    names = ("name", "command", "seconds", "beside")
    file = folder / "parts.json"
    file.write_text(json.dumps([dict(zip(names, part, strict=True)) for part in parts]))
    return str(file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is missing here")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    result = check(tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["gpu_check: missing here: a GPU that torch can use"] or (
        len(result.stderr.splitlines()) == 1 and result.stderr.startswith("gpu_check: missing here: triton")
    )
    assert list(tmp_path.iterdir()) == []


def test_a_python_that_is_not_there(tmp_path):
    result = check(tmp_path, PYTHON="/nowhere/python")
    assert (result.returncode, result.stderr) == (2, "gpu_check: missing here: /nowhere/python\n")


def test_one_failure_or_late_part_loses_none_of_the_others(tmp_path):
    parts = parts_file(
        tmp_path,
        ("first", "echo said by the first; exit 3", 20, False),
        ("late", "echo before; sleep 60 & sleep 60", 1, False),
        ("one", "sleep 0.5; touch $OUT/one", 20, False),
        ("two", "sleep 0.5; touch $OUT/two; exit 1", 20, True),
        ("timing", "echo the table >$OUT/timing.txt", 20, False),
    )
    started = time.monotonic()
    result = check(tmp_path, "--parts", parts)
    assert time.monotonic() - started < 20, "waited for what a part had left behind"
    assert result.returncode == 1, result.stderr
    report = json.loads((tmp_path / "check.json").read_text())
    verdicts = {part["name"]: part["verdict"] for part in report["parts"]}
    assert verdicts == {
        "first": "failed (3)",
        "late": "out of time",
        "one": "passed",
        "two": "failed (1)",
        "timing": "passed",
    }
    assert (tmp_path / "one").exists()
    assert (tmp_path / "two").exists()
    assert "said by the first" in result.stdout
    last = result.stdout[result.stdout.rindex("the table") :].splitlines()
    assert [line.split("  ")[0] for line in last[2:]] == [*verdicts, "all"]
    with tarfile.open(tmp_path / "logs.tar.gz") as logs:
        assert logs.extractfile("logs/first.log").read() == b"said by the first\n"
    assert not (tmp_path / "logs").exists()


def test_all_parts_pass(tmp_path):
    parts = parts_file(tmp_path, ("build", "true", 5, False), ("gpu tests", "false", 5, False))
    assert check(tmp_path, "--parts", parts, "--only", "build").returncode == 0
    assert check(tmp_path, "--parts", parts).returncode == 1
    assert check(tmp_path, "--parts", parts, "--only", "nothing").returncode == 1, "nothing was checked"


@pytest.mark.parametrize("parts", ["the_parts", "more_parts"])
def test_the_limits_add_to_less_than_nine_minutes(parts, tmp_path, monkeypatch):
    """With the sanitizer, which takes time of its own. A part that ends itself does so before it is ended."""
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    code = f"import json\nfrom pathlib import Path; from bench.gpu_check import {parts}\n"
    code += f"print(json.dumps([[part.seconds, part.beside, part.command] for part in {parts}(Path('out'))]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert sum(seconds for seconds, beside, _ in found if not beside) <= 535
    own = [(seconds, re.search(r"--(?:limit|seconds) (\d+)", command)) for seconds, _, command in found]
    ending = [(seconds, int(limit[1])) for seconds, limit in own if limit]
    assert ending
    assert all(10 <= seconds - limit <= 25 for seconds, limit in ending), ending


@pytest.mark.parametrize("parts", ["the_parts", "more_parts"])
def test_each_part_is_a_command_that_there_is(parts):
    """Its options too: every tool reads them before it looks for a GPU."""
    code = f"import json\nfrom pathlib import Path; from bench.gpu_check import {parts}\n"
    code += f"print(json.dumps([part.command for part in {parts}(Path('out'))]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    tools = [
        command for command in json.loads(result.stdout) if re.search(r"-m bench\.(timing|ttft|roofline)", command)
    ]
    assert len(tools) == (3 if parts == "the_parts" else 2)
    for command in tools:
        said = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert "unrecognized" not in said.stderr, said.stderr
        assert "invalid choice" not in said.stderr, said.stderr
        if not torch.cuda.is_available():
            assert said.returncode == 2, said.stderr
            assert "GPU" in said.stderr


def test_each_gpu_backend_is_sanitized_with_each_tool(tmp_path, monkeypatch):
    """In processes of their own, all at once."""
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    code = "import json\nfrom pathlib import Path; from bench.gpu_check import the_parts\n"
    code += "print(json.dumps([[part.name, part.command, part.beside] for part in the_parts(Path('out'))]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    parts = {name: (command, beside) for name, command, beside in json.loads(result.stdout)}
    tools = [f"{tool} {name}" for name in ("cuda", "triton") for tool in SANITIZERS]
    assert list(parts) == ["build", "gpu tests", "sanitizer none", *tools, "roofline", "timing", "ttft"]
    assert [parts[name][1] for name in tools] == [False, *[True] * 7]
    for name in tools:
        tool, backend = name.split()
        assert f"--tool {tool} " in parts[name][0]
        assert parts[name][0].endswith(f"-m bench.sanitize --backend {backend}")


@pytest.mark.parametrize(("cuda_builds", "status"), [(True, 0), (False, 1)])
def test_the_build_says_where_cuda_kernels_are_missing(cuda_builds, status):
    """And goes on without them; only this machine's own architecture is compiled."""
    code = f"""
import torch
from bench import gpu_build
torch.cuda.get_device_capability = lambda: (9, 0)
asked = []
def build(mode, architectures):
    asked.append((mode, architectures))
    return mode != "cuda" or {cuda_builds}
status = gpu_build.main(build, ("reference",))
assert asked == [("cuda", "90-real")] + ([] if {cuda_builds} else [("cpu", "90-real")]), asked
raise SystemExit(status)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == status, result.stderr
    assert ("FAILED: no CUDA kernels" in result.stdout) == (not cuda_builds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run here")
def test_the_build_fails_where_a_gpu_backend_does_not_run():
    code = """
import torch
from bench import gpu_build
torch.cuda.get_device_capability = lambda: (9, 0)
raise SystemExit(gpu_build.main(lambda mode, architectures: True))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1, result.stderr
    assert "FAILED: score_layer does not run on cuda: " in result.stdout


def test_the_calls_for_the_sanitizer_are_good_ones():
    for backend in ("cpu", "reference"):
        command = [sys.executable, "-m", "bench.sanitize", "--backend", backend, "--device", "cpu"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
        assert (result.returncode, result.stdout) == (0, "all calls made\n"), result.stderr


def test_parts_of_the_tests_are_all_of_them(tmp_path):
    """Three processes' parts: each test in exactly one; a failure is told, with its reason."""
    (tmp_path / "test_planted.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: here it means nothing\n")
    seen: list[str] = []
    for i in range(1, 4):
        lines = tmp_path / f"{i}.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.pytest_parts", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, "--part", f"{i}/3", "--lines", str(lines), "test_planted.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
        )
        told = [json.loads(line) for line in lines.read_text().splitlines()]
        tests = [line for line in told if "test" in line]
        assert told[0] == {"selected": len(tests)}
        assert [line["begun"] for line in told if "begun" in line] == [line["test"] for line in tests]
        seen += [line["test"] for line in tests]
        bad = [line for line in tests if line["outcome"] == "failed"]
        assert all(line["test"] == "test_planted.py::test_bad" and "planted" in line["why"] for line in bad)
    assert sorted(seen) == sorted(
        ["test_planted.py::test_bad", *(f"test_planted.py::test_good[{i}]" for i in range(6))]
    )


def test_a_run_goes_on_behind_the_test_that_lost_the_gpu(tmp_path):
    (tmp_path / "test_planted.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(4))\n"
        "def test_one(i):\n    assert i != 1, 'CUDA error: an illegal memory access was encountered'\n"
    )
    lines = tmp_path / "lines"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.pytest_parts", "-p", "no:cacheprovider"]
    for after in ((), ("--after", "test_planted.py::test_one[1]")):
        subprocess.run(
            [*command, "--lines", str(lines), *after, "test_planted.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
        )
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["outcome"] for line in told if "test" in line] == ["passed", "failed", "passed", "passed"]
    assert [line.get("lost", False) for line in told if "test" in line] == [False, True, False, False]


def test_a_process_that_dies_is_started_again_behind_its_last_test(tmp_path):
    (tmp_path / "test_planted.py").write_text(
        "import os, pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('i', range(4))\n"
        "def test_one(i):\n    if i == 1: os.abort()\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: here it means nothing\n")
    code = f"""
from pathlib import Path
from bench import gpu_tests
gpu_tests.TESTS = Path({str(tmp_path)!r})
part = gpu_tests.Part("one", ["test_planted.py"])
assert gpu_tests.run([part], gpu_tests.TESTS, 60)
part.read(gpu_tests.TESTS)
assert [line["outcome"] for line in part.tests()] == ["passed", "failed", "passed", "passed"], part.lines
report, text = gpu_tests.summary([part], True)
assert report["not_run"] == 0 and "by signal 6" in text, text
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_summary_of_the_gpu_tests():
    code = """
from bench.gpu_tests import Part, summary
lines = [{"selected": 3}, {"test": "a", "outcome": "passed", "seconds": 1.0},
         {"test": "b", "outcome": "failed", "seconds": 2.0, "why": "x\\nE   AssertionError: planted"}]
report, text = summary([Part("one", [], lines=lines), Part("two", [])], False)
assert report["not_run"] == 1 and report["processes_without_a_word"] == ["two"], report
assert "FAILED b" in text and "planted" in text and "1 passed, 1 failed, 0 skipped of 3; not run: 1" in text, text
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
