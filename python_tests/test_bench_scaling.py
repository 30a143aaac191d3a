"""The bench's exponents: planted growth is found, known allocations are seen, the command says what it found."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the bench is not part of the package

from bench import scaling, scaling_fit, scaling_memory  # noqa: E402
from bench.scaling_fit import longer_half, power, upper_half, with_overhead  # noqa: E402

LENGTHS = [2**i for i in range(10, 21)]
OPS = list(scaling.makers(scaling.parse(["--quick"])))
NO_MARK = not scaling_memory.MARK.exists()


def planted(exponent, overhead, slope=1e-8, noise=0.0, seed=0):
    """Seconds of a call with that growth, times log-normal noise."""
    chance = random.Random(seed)
    return [(n, (overhead + slope * n**exponent) * chance.lognormvariate(0, noise)) for n in LENGTHS]


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.1, 1.5, 2.0])
@pytest.mark.parametrize("overhead", [0.0, 1e-5, 1e-3])
def test_a_known_exponent_is_found_whatever_a_call_costs(exponent, overhead):
    found = with_overhead(planted(exponent, overhead))
    assert found.exponent == pytest.approx(exponent, abs=0.002)
    assert found.overhead == pytest.approx(overhead, rel=0.01, abs=1e-7)
    assert found.slope == pytest.approx(1e-8, rel=0.05)
    assert found.interval[0] <= found.exponent <= found.interval[1]


def test_overhead_flattens_a_line_and_not_this_fit():
    """Why there is a fit with overhead at all: a quadratic op between 1K and 32K tokens looks linear."""
    points = [(n, 1e-3 + 1e-11 * n**2) for n in LENGTHS[:6]]
    assert power(points).exponent < 1.05
    assert with_overhead(points).exponent == pytest.approx(2.0, abs=0.002)


@pytest.mark.parametrize("fit", [with_overhead, longer_half, power])
@pytest.mark.parametrize("exponent", [1.0, 1.2])
def test_intervals_hold_the_exponent_as_often_as_they_say(exponent, fit):
    """Noise of 5%: 95% of 100 intervals, give or take four standard deviations; and they are narrow enough to use."""
    found = [fit(planted(exponent, 0 if fit is power else 5e-5, noise=0.05, seed=seed)) for seed in range(100)]
    hits = sum(one.interval[0] <= exponent <= one.interval[1] for one in found)
    assert 0.86 <= hits / len(found) <= 1.0
    assert sorted(one.interval[1] - one.interval[0] for one in found)[50] < 0.15
    assert sum(one.exponent for one in found) / len(found) == pytest.approx(exponent, abs=0.015)


@pytest.mark.parametrize("exponent", [1.0, 1.3])
def test_overhead_does_not_flatten_the_longer_half_of_a_cheap_op(exponent):
    points = planted(exponent, 5e-3 if exponent == 1 else 0.05)
    assert power(upper_half(points)).exponent < exponent - 0.3
    assert longer_half(points).exponent == pytest.approx(exponent, abs=0.004)


def test_times_that_do_not_grow_have_a_wide_interval():
    found = with_overhead([(n, 1e-3 * (1.01 if i % 2 else 0.99)) for i, n in enumerate(LENGTHS)])
    assert found.interval[1] - found.interval[0] > 1


def test_a_bend_at_the_end_shows_in_the_upper_half():
    points = [(n, 1e-8 * n * max(1.0, (n / 2**17) ** 0.5)) for n in LENGTHS]
    assert longer_half(points).exponent > 1.15
    assert with_overhead([(n, t) for n, t in points if n <= 2**17]).exponent == pytest.approx(1.0, abs=0.002)
    assert [n for n, _ in upper_half(points)] == LENGTHS[5:]
    assert [n for n, _ in upper_half(points[:4])] == LENGTHS[2:4]


def test_too_few_lengths_have_no_exponent():
    points = planted(1.0, 0.0)
    assert with_overhead(points[:2]) is longer_half(points[:2]) is None
    assert longer_half([]) is None
    few = with_overhead(points[:3])  # three terms fit three points: nothing says how well
    assert few.interval == (scaling_fit.EXPONENTS[0], scaling_fit.EXPONENTS[-1])
    assert power(points[:1]) is None
    assert power(points[:2]).interval is None


@pytest.mark.skipif(NO_MARK, reason="this system has no high-water mark to set back")
def test_an_allocation_is_seen_and_what_is_freed_before_is_not():
    size = 48 * 2**20
    torch.ones(2 * size, dtype=torch.uint8)

    def call():
        torch.ones(size, dtype=torch.uint8)  # freed at once: a peak, and nothing afterwards
        return torch.ones(size // 2, dtype=torch.uint8)

    assert scaling_memory.of_call(call, "cpu") == pytest.approx(size, rel=0.05)
    assert scaling_memory.of_call(lambda: None, "cpu") < scaling_memory.RESOLUTION


@pytest.mark.skipif(NO_MARK, reason="this system has no high-water mark to set back")
def test_the_memory_of_an_op_is_seen_from_a_process_of_its_own():
    """finalize_importance allocates its result, 4 bytes a token, and next to nothing else."""
    options = ["--quick", "--threads", "1"]
    points = [("finalize_importance", 2**18), ("finalize_importance", 2**20), ("no such op", 64)]
    found = {(op, tokens): value for op, tokens, value in scaling_memory.in_processes(options, points)}
    for _, tokens in points[:2]:
        assert found["finalize_importance", tokens] == pytest.approx(4 * tokens, rel=0.3, abs=2**18)
    assert "KeyError" in found["no such op", 64]


def a_fit(**changes):
    return {
        "time_exponent": 1.0, "time_interval95": (0.98, 1.02), "upper_exponent": 1.01, "upper_interval95": (1.0, 1.03),
        "memory_exponent": None, "memory_interval95": None, "copy_exponent": 1.06, "copy_upper_exponent": 1.1,
        "peak_bytes_per_token": 4.0, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "time T^1.000 [0.980, 1.020], upper half T^1.010 [1.000, 1.030], memory too small for one, goal 1.05"),
        ({"upper_interval95": (1.0, 1.07)}, "goal 1.05, reached within the noise"),
        (
            {"time_exponent": 1.2, "time_interval95": (1.1, 1.3)},
            "goal 1.05, NOT REACHED (time 1.200); a copy: T^1.060, upper half T^1.100",
        ),
        (
            {"upper_exponent": 1.06, "upper_interval95": (1.0, 1.12)},
            "goal 1.05, NOT REACHED (upper half 1.060, within the noise); a copy: T^1.060, upper half T^1.100",
        ),
        ({"memory_exponent": 1.5, "memory_interval95": (1.4, 1.6)}, "NOT REACHED (memory 1.500)"),
        ({"time_exponent": None, "time_interval95": None}, "NOT REACHED (time unknown)"),
        ({"upper_exponent": None, "upper_interval95": None}, "NOT REACHED (upper half unknown)"),
    ],
)
def test_goals_are_said(changes, said):
    fit = a_fit(**changes)
    (line,) = scaling.goal_lines({"select_chunks": fit}, "cpu")
    assert line.startswith("select_chunks on cpu: time ")
    assert line.split(";")[0].endswith(said.split(";")[0])
    assert said in line
    assert bool(scaling.unreached(fit)) == ("NOT REACHED" in line)


def test_the_command(tmp_path, capsys):
    """The whole of it on tiny shapes: every op, JSON and tables, goals said and no reason to fail."""
    assert scaling.main(["--quick", "--seconds", "0.01", "--threads", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "scaling.json").read_text())
    assert {"commit", "torch", "processor"} <= set(report["environment"])
    assert report["command"] == "python -m bench.scaling --quick --seconds 0.01 --threads 1"
    assert list(report["fits"]) == OPS
    assert [(row["op"], row["tokens"]) for row in report["rows"]] == [(op, 2**i) for op in OPS for i in range(9, 13)]
    for row in report["rows"]:
        assert row["verified"]
        assert (row["backend"], row["device"], row["threads"]) == ("cpu", "cpu", 1)
        assert row["seconds"]["runs"] >= 2 * scaling.LEAST_CALLS
        assert row["copy_seconds"]["runs"] == row["seconds"]["runs"]
        assert row["rate"] == pytest.approx(row["bytes"] / row["seconds"]["p50"])
        assert ("peak_bytes" in row) != ("peak_bytes_unknown" in row)
        assert ("layer_seconds" in row) == (row["op"] == "score_layers")
    said = capsys.readouterr().out
    assert (tmp_path / "scaling.txt").read_text() == said
    for op in OPS:
        assert f"\n{op} on cpu: time T^" in said


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch, capsys):
    def verify(problem, backend, expected):
        raise scaling.problems.WrongResult("planted")

    monkeypatch.setattr(scaling.problems, "verify", verify)
    options = ["--quick", "--only", "finalize", "--seconds", "0", "--out", str(tmp_path)]
    assert scaling.main(options) == 1
    assert "FAILED finalize_importance: WrongResult: planted" in capsys.readouterr().out
    assert not any("seconds" in row for row in json.loads((tmp_path / "scaling.json").read_text())["rows"])


def test_what_was_measured_is_there_when_time_runs_out(tmp_path, monkeypatch):
    made = scaling.makers

    def cut(tokens):
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "makers", lambda options: {**made(options), "select_chunks": cut})
    with pytest.raises(KeyboardInterrupt):
        scaling.main(["--quick", "--seconds", "0", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "scaling.json").read_text())
    assert list(report["fits"]) == OPS[: OPS.index("select_chunks")]
    assert all("seconds" in row for row in report["rows"])


def test_goals_fail_the_command_only_when_asked(tmp_path, monkeypatch):
    options = ["--quick", "--only", "finalize", "--seconds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(scaling, "GOAL", -9.0)
    monkeypatch.setattr(scaling, "memory", lambda *_: None)
    assert scaling.main(options) == 0
    assert scaling.main([*options, "--check"]) == 1


def test_wrong_options_are_named(capsys):
    for options, said in (
        (["--shortest", "4096", "--longest", "1024"], "--shortest"),
        (["--threads", "-1"], "--threads"),
    ):
        with pytest.raises(SystemExit):
            scaling.parse(options)
        assert said in capsys.readouterr().err


def test_the_table_of_students_t():
    """The one that is used most, by hand: 8 degrees of freedom of 11 lengths less three terms."""
    assert scaling_fit._t975(8) == 2.306
    assert scaling_fit._t975(1) == 12.706
    assert scaling_fit._t975(500) == 2.042
    assert list(scaling_fit.T975) == sorted(scaling_fit.T975, reverse=True)
