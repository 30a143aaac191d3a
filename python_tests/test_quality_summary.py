"""Figures of records made by hand, the claims drawn from them, the report and the plot."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from quality_samples import record

from specprefill_kernels.quality import intervals
from specprefill_kernels.quality.claims import broken_claims
from specprefill_kernels.quality.intervals import Interval
from specprefill_kernels.quality.plot import save_plot
from specprefill_kernels.quality.summary import ALL, markdown, summarize, text_of

FULL, KEPT, RANDOM, LAST = [1, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 0], [0.5, 0, 0, 0]
SETTING = {
    "base": {"name": "tiny", "parameters": 134_000_000, "dtype": "float32"}, "speculator": {"name": "small"},
    "config": {"chunk_size": 32}, "versions": {"torch": "2"}, "machine": "a machine", "tokens": 1024,
}  # fmt: skip


def records(task: str = "door", ratio: float = 0.3, scores=(FULL, KEPT, RANDOM, LAST)) -> list:
    out = []
    for method, column in zip(("full", "kept", "random", "last"), scores, strict=True):
        for seed, score in enumerate(column):
            evidence = 1.0 if method == "full" else (1.0, 0.5, 0.0, 1.0)[seed]
            changes = {"score": score, "task": task, "ttft": 8.0 if method == "full" else float(seed + 1)}
            out.append(record(seed, method, ratio, evidence=evidence, **changes))
    return out


def test_rows_hold_the_figures_of_their_prompts() -> None:
    summary = summarize(records())
    assert summary.tasks == ("door",)
    assert [(row.method, row.keep_ratio) for row in summary.rows] == [
        ("full", 1.0), ("kept", 0.3), ("random", 0.3), ("last", 0.3),
    ]  # fmt: skip
    kept = summary.row("door", "kept", 0.3)
    assert kept.prompts == 4
    assert kept.score == intervals.mean(KEPT)
    assert kept.to_full == intervals.paired_difference(KEPT, FULL)
    assert kept.to_full.estimate == -0.25
    assert kept.to_random.estimate == 0.25
    assert kept.ttft == 2.5  # of 1, 2, 3, 4
    assert kept.speed_up == pytest.approx((8 / 2 + 8 / 3) / 2)
    assert kept.kept == pytest.approx(0.3)
    # Whole evidence in two of four; half of it is not enough to answer.
    assert kept.evidence.estimate == 0.5
    full = summary.row("door", "full", 1.0)
    assert full.to_full is None
    assert full.speed_up == 1
    assert full.dense == 0
    assert summary.row("door", "last", 0.3).score.method == "adjusted"
    with pytest.raises(ValueError, match="row: expected one of the rows"):
        summary.row("door", "kept", 0.4)


def test_differences_are_paired_by_prompt_whatever_the_order_of_records() -> None:
    assert summarize(records()[::-1]).row("door", "kept", 0.3).to_full == summarize(records()).rows[1].to_full


def test_all_tasks_come_first_and_pool_the_prompts() -> None:
    other = records("gate", scores=([1] * 4, [1] * 4, [0] * 4, [1] * 4))
    summary = summarize(records() + other)
    assert summary.tasks == (ALL, "door", "gate")
    assert summary.row(ALL, "kept", 0.3).score == intervals.mean([*KEPT, 1, 1, 1, 1])
    assert summary.row("gate", "kept", 0.3).score.estimate == 1


def test_ratios_are_compared_with_random_at_the_same_ratio() -> None:
    both = records() + [one for one in records(ratio=0.5, scores=(FULL, FULL, KEPT, LAST)) if one.method != "full"]
    summary = summarize(both)
    assert summary.row("door", "kept", 0.3).to_random.estimate == 0.25
    assert summary.row("door", "kept", 0.5).to_random.estimate == 0.25
    assert summary.row("door", "random", 0.5).to_full.estimate == -0.25
    assert [row.keep_ratio for row in summary.rows] == [1.0, 0.3, 0.3, 0.3, 0.5, 0.5, 0.5]


def test_prompts_without_every_answer_are_left_out_and_counted() -> None:
    summary = summarize([*records()[:-1]])
    assert summary.incomplete == 1
    assert summary.row("door", "full", 1.0).prompts == 3
    with pytest.raises(ValueError, match="records: expected at least one prompt answered by every method"):
        summarize([])


def test_prompts_without_known_evidence_have_none() -> None:
    summary = summarize([record(evidence=None), record(method="full", evidence=None)])
    assert summary.row("door", "kept", 0.3).evidence is None
    assert "| - | 30% |" in markdown(summary, SETTING)


def test_dense_and_cut_prompts_are_counted_and_said() -> None:
    summary = summarize([record(mode="dense", note="cut"), record(method="full", note="cut")])
    assert summary.row("door", "kept", 0.3).dense == 1
    text = markdown(summary, SETTING)
    assert "1 of 1 prompts ran dense at 0.3." in text
    assert "1 of 1 prompts were too long" in text


def test_the_stages_of_the_first_token_are_medians_without_decoding() -> None:
    rows = [
        record(seed, method, seconds={"score": seconds, "base_prefill": 1.0, "decode": 9.0})
        if method == "kept"
        else record(seed, method, seconds={"base_prefill": 2.0})
        for method in ("full", "kept")
        for seed, seconds in enumerate((0.1, 0.5, 0.2))
    ]
    summary = summarize(rows)
    assert summary.row("door", "kept", 0.3).stages == {"score": 0.2, "base_prefill": 1.0}
    text = markdown(summary, SETTING)
    assert "| keep | method | TTFT | full / this | score | base_prefill |" in text
    assert "| all | full prompt | 1.00 | 1.00 | - | 2.000 |" in text
    assert "| 0.3 | kept (speculative) | 1.00 | 1.00 | 0.200 | 1.000 |" in text


def test_the_report_says_where_the_last_tokens_are_enough() -> None:
    recent = records("recent", scores=([1] * 4, [1, 1, 1, 0], [0] * 4, [1] * 4))
    hopeless = records("hopeless", scores=([0] * 4, [0] * 4, [0] * 4, [0] * 4))  # a tie at nothing is none
    text = markdown(summarize(records() + recent + hopeless), SETTING, "score.png")
    part = text[text.index("## Where the last tokens") : text.index("## How to read")]
    assert part.count("\n- ") == 1
    assert "- recent at 0.3: last tokens 1.00, kept 0.75" in part
    assert "## Where" not in markdown(summarize(records()), SETTING)
    assert "![score against keep ratio](score.png)" in text
    assert "| 0.3 | kept (speculative) | 0.50 [0.15, 0.85] | -0.25 [" in text
    assert text.count("| all | full prompt |") == 5  # a table for each task, one for all, and the times


def test_only_what_rounds_to_zero_is_written_as_zero() -> None:
    assert text_of(Interval(-0.004, -0.04, 0.004, "wilson"), signed=True) == "+0.00 [-0.04, +0.00]"


def test_a_tie_with_the_last_tokens_is_said_but_not_for_all_tasks_together() -> None:
    tie = records("tie", scores=([1] * 4, [1, 1, 0, 0], [0] * 4, [0, 0, 1, 1]))
    other = records("other", scores=([1] * 4, [1] * 4, [0] * 4, [1] * 4))
    text = markdown(summarize(tie + other), SETTING)
    part = text[text.index("## Where the last tokens") : text.index("## How to read")]
    assert "- tie at 0.3: last tokens 0.50, kept 0.50" in part
    assert ALL not in part


def test_the_part_read_is_a_mean_over_prompts() -> None:
    summary = summarize([record(seed, kept_tokens=kept) for seed, kept in enumerate((30, 30, 90))])
    assert summary.row("door", "kept", 0.3).kept == pytest.approx(0.5)


def test_one_slow_prompt_does_not_move_the_time() -> None:
    summary = summarize([record(seed, ttft=ttft) for seed, ttft in enumerate((1.0, 2.0, 30.0))])
    assert summary.row("door", "kept", 0.3).ttft == 2.0


def test_a_stage_that_a_prompt_did_not_have_took_no_time() -> None:
    rows = [record(0, seconds={"base_prefill": 1.0}), record(1, seconds={"base_prefill": 1.0, "score": 0.4})]
    assert summarize(rows).row("door", "kept", 0.3).stages == {"base_prefill": 1.0, "score": 0.2}


def test_dense_baselines_are_not_said_twice() -> None:
    text = markdown(summarize([record(method=method, mode="dense") for method in ("kept", "random", "last")]), SETTING)
    assert text.count("ran dense") == 1


def test_the_json_is_json() -> None:
    values = json.loads(json.dumps(summarize(records()).json()))
    assert values["rows"][1]["score"] == {
        "method": "wilson", "estimate": 0.5,
        "low": pytest.approx(0.15, abs=1e-3), "high": pytest.approx(0.85, abs=1e-3),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- claims


def wide(task: str = "door", ratio: float = 0.3, scores=()) -> list:
    return [
        record(seed, method, ratio, score=score, task=task)
        for method, column in zip(("full", "kept", "random", "last"), scores, strict=True)
        for seed, score in enumerate(column)
    ]


def test_claims_hold_where_little_is_lost_and_random_is_far_behind() -> None:
    scores = [[1] * right + [0] * (30 - right) for right in (29, 28, 6)]
    assert broken_claims(summarize(wide(scores=(*scores, scores[0]))), "door", 0.3) == []


@pytest.mark.parametrize(
    ("full", "kept", "random", "expected"),
    [
        (30, 20, 3, "worse than the full prompt: -0.33"),
        (28, 26, 22, "not far ahead of random"),
        (28, 26, 17, "not far ahead of random chunks: +0.30 [+0.1"),  # the estimate alone would do
    ],
)
def test_claims_fail_where_quality_is_lost_or_random_is_close(full, kept, random, expected) -> None:
    scores = [[1] * right + [0] * (30 - right) for right in (full, kept, random)]
    broken = broken_claims(summarize(wide(scores=(*scores, scores[0]))), "door", 0.3)
    assert len(broken) == 1
    assert expected in broken[0]


def test_few_prompts_prove_nothing() -> None:
    """The interval of three equal answers reaches 0, but rules no loss out."""
    broken = broken_claims(summarize(wide(scores=([1] * 3, [1] * 3, [0] * 3, [0] * 3))), "door", 0.3)
    assert "cannot be told from a loss of 0.25" in broken[0]


def test_a_sure_but_small_loss_is_within_the_noise() -> None:
    full, kept = [0.9 + 0.001 * (i % 7) for i in range(40)], [0.85 + 0.001 * (i % 5) for i in range(40)]
    assert broken_claims(summarize(wide(scores=(full, kept, [0.1] * 40, kept))), "door", 0.3) == []


def test_a_sure_loss_between_the_two_limits_is_a_loss() -> None:
    full, kept = [0.9 + 0.001 * (i % 7) for i in range(40)], [0.75 + 0.001 * (i % 5) for i in range(40)]
    broken = broken_claims(summarize(wide(scores=(full, kept, [0.1] * 40, kept))), "door", 0.3)
    assert len(broken) == 1
    assert "worse than the full prompt: -0.15" in broken[0]


def test_a_lead_of_just_the_threshold_is_not_above_it() -> None:
    summary = summarize(wide(scores=([1] * 30, [1] * 30, [0] * 30, [0] * 30)))

    def broken(lead: float) -> list[str]:
        lead_of = intervals.Interval(0.5, lead, 0.7, "newcombe")
        rows = [replace(row, to_random=lead_of) if row.method == "kept" else row for row in summary.rows]
        return broken_claims(replace(summary, rows=tuple(rows)), "door", 0.3)

    assert broken(0.2001) == []
    assert broken(0.2)[0].startswith("kept 30% is not far ahead of random chunks: +0.50 [+0.20, +0.70]")


def test_claims_need_the_methods_they_compare() -> None:
    with pytest.raises(ValueError, match="methods: expected"):
        broken_claims(summarize([record()]), "door", 0.3)


# ------------------------------------------------------------------------------------------------------------- plot


@pytest.mark.parametrize("tasks", [("door",), ("a", "b", "c", "d", "e", "f")])
def test_the_plot_is_a_png_with_a_panel_for_each_task(tasks, tmp_path) -> None:
    image = pytest.importorskip("matplotlib.image")
    every = [one for task in tasks for ratio in (0.1, 0.3) for one in records(task, ratio)]
    save_plot(summarize(every), tmp_path / "score.png", "title")
    pixels = image.imread(tmp_path / "score.png")
    assert pixels.shape[1] > 600
    blue = (abs(pixels[..., :3] - [0x0B / 255, 0x5F / 255, 0xA5 / 255]) < 0.02).all(-1)
    columns = blue.any(0).nonzero()[0]
    assert columns.max() - columns.min() > 0.5 * pixels.shape[1] * (len(tasks) > 1)
    assert blue.sum() > 200 * len(tasks)


def test_without_matplotlib_the_plot_says_what_to_install(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"specprefill-kernels\[eval\]"):
        save_plot(summarize(records()), tmp_path / "score.png", "title")
