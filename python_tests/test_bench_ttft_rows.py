"""Times to first token: rows, their arithmetic, what is refused and what is written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from loop_models import build, byte_tokenizer

sys.path.append(str(Path(__file__).parents[1]))  # the bench is not part of the package

from bench import transcripts, ttft, ttft_layers, ttft_plans, ttft_real, ttft_rows, ttft_table
from bench.ttft_rows import Prepared, Rate, Work, medians, ratios

RATE = Rate(1e12)
STAGES = {
    "speculator_prefill": 2.0,
    "look_ahead": 0.5,
    "score": 0.25,
    "select": 0.2,
    "gather": 0.05,
    "base_prefill": 1.0,
}


def run(capsys, tmp_path, *arguments: str) -> tuple[int, str, str]:
    status = ttft.main(["--device", "cpu", "--dtype", "float32", "--out", str(tmp_path), *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def rows_of(tmp_path) -> list[dict]:
    return json.loads((tmp_path / "ttft.json").read_text())["rows"]


def test_ratio_and_limits():
    found = ratios(20.0, STAGES)
    assert found["speculative_seconds"] == pytest.approx(4.0)
    assert found["ratio"] == pytest.approx(5.0)
    assert found["limit"] == pytest.approx(20 / 3.5)
    assert found["limit_any_budget"] == pytest.approx(20 / 2.5)
    assert found["ratio"] < found["limit"] < found["limit_any_budget"]


def test_stages_are_medians_in_their_own_order():
    runs = [{"base_prefill": 1.0, "speculator_prefill": float(i)} for i in (9, 1, 2)]
    assert medians(runs) == {"speculator_prefill": 2.0, "base_prefill": 1.0}
    assert list(medians(runs)) == ["speculator_prefill", "base_prefill"]


def test_the_estimate_is_of_what_will_be_timed():
    work = Work("qwen3-0.6b", "qwen3-32b", 4096, (0.1,), base_layers=2)
    how = {"dtype": torch.bfloat16, "device": "cpu", "memory": 2**36}
    once, thrice = (Prepared(work, rounds=rounds, **how).estimate(RATE) for rounds in (1, 3))
    assert thrice.measuring == pytest.approx(3 * once.measuring)
    assert once.measuring < once.full / 10 + 2 * once.speculator
    products = 2 * 32.0e9 * 4096 / 1e12
    assert products < once.full < 1.2 * products


class Scripted:
    """Stands for both models; remembers who ran."""

    def __init__(self, ran: list[str], importance: torch.Tensor) -> None:
        self.ran, self.measured, self.whole, self.model = ran, 2, 6, build("llama")
        self.importance = importance

    def seconds(self, ids, positions=None, prompt_len=0, *, sparse=False):
        if positions is None:
            self.ran.append("speculator")
            return {"speculator_prefill": 2.0, "look_ahead": 0.5, "score": 0.25}, self
        self.ran.append(f"base {ids.shape[1]}" if sparse else "full")
        assert ids.shape[1] == positions.shape[0]
        return float(ids.shape[1])

    attention = ("dense", "")


def test_both_ways_take_turns_and_the_next_round_begins_with_the_other(monkeypatch):
    work = Work("tiny", "tiny-base", 600, (0.1, 0.3))
    prepared = Prepared(work, dtype=torch.float32, device="cpu", memory=2**33, rounds=2)
    ran: list[str] = []
    both = Scripted(ran, torch.rand(600))
    monkeypatch.setattr(Prepared, "models", lambda self, progress: (both, both))
    monkeypatch.setattr(ttft_rows, "_warm_up", lambda *_: None)
    told = []
    rows = ttft_rows.measure(prepared, prepared.estimate(RATE), lambda done, total: told.append((done, total)))
    kept = [row["kept_tokens"] for row in rows]
    speculation = ["speculator", *(f"base {count}" for count in kept)]
    assert ran == ["full", *speculation, *speculation, "full"]
    assert told[-1] == (8, 8)
    assert kept == [64, 184]  # chunks of 8, the last one in any case
    assert [row["full_seconds"] for row in rows] == [600.0, 600.0]
    assert rows[0]["stages"]["base_prefill"] == 64.0
    assert rows[0]["ratio"] == pytest.approx(600 / sum(rows[0]["stages"].values()))
    assert rows[0]["layers_measured"] == {"speculator": "2 of 6", "base": "2 of 6"}


def test_quick_measures_and_writes_rows_that_add_up(capsys, tmp_path):
    status, out, err = run(capsys, tmp_path, "--quick", "--rounds", "1")
    assert (status, err) == (0, "")
    rows = rows_of(tmp_path)
    assert [row["keep_ratio"] for row in rows] == [0.1, 0.3]
    for row in rows:
        assert row["speculative_seconds"] == pytest.approx(sum(row["stages"].values()))
        assert list(row["stages"]) == [name for name in ttft_rows.STAGES if name != "tokenize"]
        assert all(value > 0 for value in row["stages"].values())
        assert row["ratio"] == pytest.approx(row["full_seconds"] / row["speculative_seconds"])
        assert row["ratio"] <= row["limit"] <= row["limit_any_budget"]
        assert (row["weights"], row["prompt"], row["device"], row["dtype"]) == ("random", "random", "cpu", "float32")
        assert row["layers_measured"] == {"speculator": "3 of 3", "base": "2 of 6"}
        assert "the budget decides" in row["note"]
        assert "timed by 2 of 6 layers" in row["note"]
    table = (tmp_path / "ttft.txt").read_text()
    assert "what is selected means nothing" in table
    assert "2 of 6" in table
    assert table.strip() in out
    report = json.loads((tmp_path / "ttft.json").read_text())
    assert report["environment"]["device"] == "cpu"
    assert report["cut"] == report["failed"] == []


def test_resume_measures_only_what_is_not_there(capsys, tmp_path):
    pair = ("--pair", "tiny:tiny-base", "--rounds", "1", "--layers", "1", "--resume", "--tokens")
    run(capsys, tmp_path, *pair, "300", "--keep", "0.2")
    before = rows_of(tmp_path)
    status, out, _ = run(capsys, tmp_path, *pair, "300,400", "--keep", "0.2")
    assert status == 0
    assert "300 tokens: is there already" in out
    after = rows_of(tmp_path)
    assert after[: len(before)] == before
    assert [row["tokens"] for row in after] == [300, 400]
    commands = [row["command"] for row in after]
    assert [re.search("--tokens [0-9,]+", one).group() for one in commands] == ["--tokens 300", "--tokens 300,400"]
    assert not any(str(tmp_path) in one for one in commands)
    assert "command" not in json.loads((tmp_path / "ttft.json").read_text())


@pytest.mark.parametrize(
    "other", [("--preset", "paper"), ("--layers", "2"), ("--speculator-layers", "2"), ("--rounds", "2")]
)
def test_another_measurement_is_another_row(capsys, tmp_path, other):
    pair = (
        "--pair",
        "tiny:tiny-base",
        "--rounds",
        "1",
        "--layers",
        "1",
        "--tokens",
        "300",
        "--keep",
        "0.2",
        "--resume",
    )
    run(capsys, tmp_path, *pair)
    status, out, _ = run(capsys, tmp_path, *pair, *other)
    assert (status, "is there already" in out) == (0, False)
    first, second = rows_of(tmp_path)
    assert ttft.key_of(first) != ttft.key_of(second)
    assert first["layers_asked"] == {"speculator": None, "base": 1}


def test_rows_of_uncommitted_files_are_kept_and_that_is_said(capsys, tmp_path, monkeypatch):
    for commit, said in (("abc1234", False), ("abc1234-dirty", True), ("unknown", True)):
        monkeypatch.setenv("SPECPREFILL_COMMIT", commit)
        run(capsys, tmp_path / commit, "--quick", "--rounds", "1")
        status, out, err = run(capsys, tmp_path / commit, "--quick", "--rounds", "1", "--resume")
        assert (status, "is there already" in out) == (0, True)
        assert ("may not be of the same files" in err) == ("may not be of the same files" in out) == said


def test_rows_of_another_machine_or_commit_are_not_resumed(capsys, tmp_path):
    run(capsys, tmp_path, "--quick", "--rounds", "1")
    report = json.loads((tmp_path / "ttft.json").read_text())
    report["environment"]["processor"] = "another one"
    (tmp_path / "ttft.json").write_text(json.dumps(report))
    status, _, err = run(capsys, tmp_path, "--quick", "--resume")
    assert status == 2
    assert "expected rows of processor" in err
    assert "got another one" in err
    (tmp_path / "ttft.json").write_text('{"rows": [{}]}')
    status, _, err = run(capsys, tmp_path, "--quick", "--resume")
    assert (status, "as this tool writes it" in err) == (2, True)


def test_what_would_end_after_the_limit_is_not_started_and_said(capsys, tmp_path):
    status, out, _ = run(capsys, tmp_path, "--quick", "--limit", "0")
    assert status == 1, "nothing was measured"
    assert "cut: tiny -> tiny-base, 600 tokens" in out
    assert rows_of(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected --pair, --plan or --quick, got none of them"),
        (("--quick", "--plan", "cpu"), "got plan and quick"),
        (("--pair", "llama-1b"), "pair: expected speculator:base, got 'llama-1b'"),
        (("--pair", "llama-1b:llama-9b"), "expected one of smollm2-135m, llama-1b, .* got 'llama-9b'"),
        (("--pair", "llama-1b:llama-8b", "--tokens", "131073"), "at most 131072, the context of Llama-3"),
        (("--pair", "qwen3-0.6b:qwen3-32b", "--tokens", "200000"), "at most 131072, the context of Qwen3"),
        (("--pair", "smollm2-135m:llama-1b", "--tokens", "8193"), "at most 8192, the context of SmolLM2"),
        (("--pair", "tiny:tiny-base", "--tokens", "0"), "tokens: expected comma-separated numbers above 0"),
        (("--pair", "tiny:tiny-base", "--tokens", "many"), "tokens: expected .* got 'many'"),
        (("--pair", "tiny:tiny-base", "--keep", "1.5"), "keep: expected .* at most 1, got '1.5'"),
        (("--pair", "tiny:tiny-base", "--layers", "7"), "layers: expected 1 to 6, got 7"),
        (("--pair", "tiny:tiny-base", "--layers", "0"), "layers: expected 1 to 6, got 0"),
        (("--pair", "tiny:tiny-base", "--rounds", "0"), "rounds: expected at least 1, got 0"),
        (("--pair", "tiny:tiny-base", "--speculator-layers", "1"), "speculator layers: expected 2 to 3, got 1"),
        (("--pair", "tiny:tiny-base", "--speculator-attention", "thin"), "speculator_attention: expected one of"),
        (("--pair", "tiny:tiny-base", "--preset", "best"), "expected one of .*'default'"),
        (("--pair", "tiny:tiny-base", "--weights", "real"), "for real ones, got 'tiny'"),
        (("--plan", "cpu", "--weights", "real"), "expected --pair with --weights real"),
        (("--quick", "--device", "cuda"), "expected a GPU that torch can use"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ttft_rows, "build", lambda *_, **__: pytest.fail("weights were allocated"))
    monkeypatch.setattr(Rate, "of", lambda *_: pytest.fail("something was timed"))
    status, out, err = run(capsys, tmp_path, *arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("bench.ttft: ")
    assert re.search(said, err), err
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_before_anything_is_allocated(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ttft, "free_memory", lambda device: 2**30)
    monkeypatch.setattr(ttft_rows, "build", lambda *_, **__: pytest.fail("weights were allocated"))
    status, _, err = run(capsys, tmp_path, "--pair", "llama-8b:llama-405b")
    assert status == 2
    assert re.search(r"memory: expected \d+\.\d GiB for 1 of 126 layers of the base and 2 of 32 .* got 0\.9 GiB", err)


def test_a_plan_leaves_out_what_does_not_fit_and_says_so(capsys, tmp_path, monkeypatch):
    big = Work("llama-8b", "llama-405b", 4096, (0.1,))
    monkeypatch.setattr(ttft_plans, "PLANS", {"quick": (big, *ttft_plans.QUICK)})
    monkeypatch.setattr(ttft, "free_memory", lambda device: 2**30)
    status, out, _ = run(capsys, tmp_path, "--quick", "--rounds", "1")
    assert status == 2, "--quick asks for what it names"
    monkeypatch.setattr(ttft_plans, "PLANS", {"cpu": (big, *ttft_plans.QUICK)})
    status, out, _ = run(capsys, tmp_path, "--plan", "cpu", "--rounds", "1")
    assert status == 0
    assert "left out: Llama-3.1-8B -> Llama-3.1-405B, 4096 tokens: memory: expected" in out
    assert len(rows_of(tmp_path)) == 2


def test_goals_are_said_of_gpu_rows_alone():
    row = {
        "speculator": "Llama-3.1-8B",
        "base": "Llama-3.1-405B",
        "tokens": 32768,
        "keep_ratio": 0.1,
        "device": "cuda",
        "speculator_attention_ran": "dense",
        "ratio": 8.0,
        "limit": 8.5,
    }
    (line,) = ttft_plans.reached([row])
    assert "8.00x, goal 7.66x" in line
    assert "NOT REACHED" not in line
    (line,) = ttft_plans.reached([{**row, "ratio": 7.66}])
    assert line.endswith("NOT REACHED")
    for other in ({"device": "cpu"}, {"keep_ratio": 0.2}, {"tokens": 4096}, {"base": "Llama-3.1-70B"}):
        assert ttft_plans.reached([{**row, **other}]) == []


def test_sparse_attention_that_did_not_run_is_not_called_sparse(capsys, tmp_path):
    """A prompt of fewer tokens than its blocks hold is read densely."""
    pair = ("--pair", "tiny:tiny-base", "--rounds", "1", "--layers", "1", "--tokens", "300", "--keep", "0.2")
    status, _, _ = run(capsys, tmp_path, *pair, "--speculator-attention", "sparse")
    (row,) = rows_of(tmp_path)
    assert (status, row["speculator_attention"], row["speculator_attention_ran"]) == (0, "sparse", "dense")
    assert "(sparse asked, dense ran)" in ttft_table.cells(row)[0]


SESSION = transcripts.Session("a-session", "an-agent", ({"role": "user", "content": "What follows? " * 60},))


def real_pair() -> ttft_real.Pair:
    tokenizer = byte_tokenizer()
    return ttft_real.Pair("small", "large", build("llama", seed=3), build("qwen2", seed=4), tokenizer, tokenizer)


def test_a_real_pair_runs_through_the_loop_itself():
    pair = real_pair()
    transcript = transcripts.Transcript(SESSION, SESSION.messages, pair.count(list(SESSION.messages)))
    told = []
    rows = ttft_real.measure(pair, transcript, (0.3, 0.5), lambda *steps: told.append(steps), rounds=2)
    assert told[-1] == (6, 6)
    for row in rows:
        assert row["tokens"] == transcript.tokens
        assert row["note"].startswith("sparse: kept ")
        assert (row["weights"], row["prompt"]) == ("real", "a-session, 1 messages")
        assert row["speculative_seconds"] == pytest.approx(sum(row["stages"].values()))
        assert {"tokenize", "speculator_prefill", "look_ahead", "score", "select", "base_prefill"} == set(row["stages"])
        assert row["kept_tokens"] < transcript.tokens
        ttft.key_of(row)
        ttft_table.cells(row)
    assert rows[0]["kept_tokens"] < rows[1]["kept_tokens"]


def test_a_prompt_that_ran_dense_is_no_row():
    pair = real_pair()
    short = transcripts.Session("short", "an-agent", ({"role": "user", "content": "What follows?"},))
    transcript = transcripts.Transcript(short, short.messages, 30)
    with pytest.raises(ttft_real.NotSparse, match="short, 1 messages: ran dense: prompt too short"):
        ttft_real.measure(pair, transcript, (0.3,), lambda *_: None, rounds=1)


def test_real_weights_from_folders_with_given_transcripts(capsys, tmp_path):
    pair = real_pair()
    for name, model in (("small", pair.speculator), ("large", pair.base)):
        model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({"cases": [{"id": "one", "messages": list(SESSION.messages)}]}))
    names = f"{tmp_path / 'small'}:{tmp_path / 'large'}"
    arguments = ("--pair", names, "--weights", "real", "--transcripts", str(file), "--keep", "0.3", "--rounds", "1")
    status, out, err = run(capsys, tmp_path / "out", *arguments, "--tokens", "1000")
    assert status == 0, err
    (row,) = rows_of(tmp_path / "out")
    assert (row["speculator"], row["base"], row["weights"]) == ("small", "large", "real")
    assert f"{row['tokens']} real" in out
    status, out, err = run(capsys, tmp_path / "out", *arguments, "--tokens", "100000")
    assert (status, "at most 2048, the context of" in err) == (2, True), err


def test_the_warm_up_reaches_sparse_attention(monkeypatch):
    seen = []

    class Model:
        def seconds(self, ids, *_, **__):
            seen.append(ids.shape[1])
            return {}, type("Found", (), {"importance": torch.rand(ids.shape[1])})

    config = ttft_rows.config_for(0.1, "default", "sparse")
    monkeypatch.setattr(ttft_layers.StageClock, "_now", lambda clock: 0.0)
    ttft_rows._warm_up(Model(), Model(), config, torch.zeros(1, 100_000, dtype=torch.int64))
    assert seen[0] > config.attention_keep_blocks * config.attention_block_size
    assert max(seen[1:]) == ttft_rows.WARM_UP
