"""From records to figures: per task and over all, per method and ratio, with intervals, paired per prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specprefill_kernels.quality import intervals
from specprefill_kernels.quality.intervals import Interval
from specprefill_kernels.quality.methods import METHODS, TITLES
from specprefill_kernels.quality.records import Record

ALL = "all tasks"


@dataclass(frozen=True)
class Row:
    """One method at one keep ratio on the prompts of one task, or of all.

    Attributes:
        prompts: how many; only prompts that every method has answered count.
        score: mean score.
        to_full, to_random: mean difference, prompt by prompt, to the full prompt and to random chunks at the same
            ratio.
        ttft: median seconds until the first token.
        stages: stage -> median seconds of what ttft is made of.
        speed_up: median over prompts of the full prompt's ttft over this one's.
        kept: mean part of the prompt's tokens that were read.
        evidence: part of the prompts whose whole evidence was read; None where no evidence is known.
        dense: prompts that ran dense although a ratio was asked for.
        cut: prompts that were too long and lost their middle.
    """

    task: str
    method: str
    keep_ratio: float
    prompts: int
    score: Interval
    to_full: Interval | None
    to_random: Interval | None
    ttft: float
    stages: Mapping[str, float]
    speed_up: float | None
    kept: float
    evidence: Interval | None
    dense: int
    cut: int

    def json(self) -> dict[str, Any]:
        return {name: value.json() if isinstance(value, Interval) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Summary:
    """Rows for all tasks first, then task by task; `incomplete` prompts are left out of them."""

    rows: tuple[Row, ...]
    incomplete: int

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.task for row in self.rows))

    def row(self, task: str, method: str, keep_ratio: float) -> Row:
        for row in self.rows:
            if (row.task, row.method, row.keep_ratio) == (task, method, keep_ratio):
                return row
        raise ValueError(f"row: expected one of the rows, got {(task, method, keep_ratio)}")

    def json(self) -> dict[str, Any]:
        return {"incomplete_prompts": self.incomplete, "rows": [row.json() for row in self.rows]}


def summarize(records: Iterable[Record]) -> Summary:
    """Figures of all prompts that have an answer by every method.

    Raises:
        ValueError: no prompt has.
    """
    by_prompt: dict[tuple[str, int], dict[tuple[str, float], Record]] = {}
    for record in records:
        by_prompt.setdefault((record.task, record.seed), {})[record.method, record.keep_ratio] = record
    wanted = {column for answers in by_prompt.values() for column in answers}
    complete = [answers for answers in by_prompt.values() if answers.keys() == wanted]
    if not complete:
        raise ValueError("records: expected at least one prompt answered by every method, got none")
    columns = sorted(wanted, key=lambda column: (column[0] != "full", column[1], METHODS.index(column[0])))
    tasks: dict[str, list[dict[tuple[str, float], Record]]] = {ALL: complete}
    for answers in complete:
        tasks.setdefault(next(iter(answers.values())).task, []).append(answers)
    if len(tasks) == 2:  # one task alone is all there is
        del tasks[ALL]
    rows = [_row(task, column, prompts) for task, prompts in tasks.items() for column in columns]
    return Summary(tuple(rows), len(by_prompt) - len(complete))


def _row(task: str, column: tuple[str, float], prompts: Sequence[Mapping[tuple[str, float], Record]]) -> Row:
    method, ratio = column
    records = [answers[column] for answers in prompts]
    full, random = (_column(prompts, other) for other in (("full", 1.0), ("random", ratio)))
    scores = [record.score for record in records]
    evidence = [float(record.evidence == 1.0) for record in records if record.evidence is not None]
    return Row(
        task=task,
        method=method,
        keep_ratio=ratio,
        prompts=len(records),
        score=intervals.mean(scores),
        to_full=None if not full or method == "full" else intervals.paired_difference(scores, _scores(full)),
        to_random=None if not random or method == "random" else intervals.paired_difference(scores, _scores(random)),
        ttft=statistics.median(record.ttft for record in records),
        stages=_stages(records),
        speed_up=statistics.median(one.ttft / other.ttft for one, other in zip(full, records)) if full else None,
        kept=statistics.fmean(record.kept_tokens / record.prompt_tokens for record in records),
        evidence=intervals.mean(evidence) if evidence else None,
        dense=sum(record.mode == "dense" for record in records) if method != "full" else 0,
        cut=sum(bool(record.note) for record in records),
    )


def _column(prompts: Sequence[Mapping[tuple[str, float], Record]], column: tuple[str, float]) -> list[Record]:
    return [answers[column] for answers in prompts] if column in prompts[0] else []


def _stages(records: Sequence[Record]) -> dict[str, float]:
    names = dict.fromkeys(stage for record in records for stage in record.seconds if stage != "decode")
    return {name: statistics.median(record.seconds.get(name, 0.0) for record in records) for name in names}


def _scores(records: Sequence[Record]) -> list[float]:
    return [record.score for record in records]


def markdown(summary: Summary, setting: Mapping[str, Any], plot: str | None = None) -> str:
    """The whole report: setting, a table for all tasks and one for each, and where recency is all that matters."""
    lines = ["# Quality at equal kept tokens", "", *_setting(setting), ""]
    if summary.incomplete:
        lines += [f"{summary.incomplete} prompts without an answer by every method are left out.", ""]
    if plot is not None:
        lines += [f"![score against keep ratio]({plot})", ""]
    for task in summary.tasks:
        rows = [row for row in summary.rows if row.task == task]
        lines += [f"## {task} ({rows[0].prompts} prompts)", "", *_table(rows), ""]
        lines += [note + "\n" for note in _notes(rows)]
    lines += [*_times(summary), *_recency(summary), *_reading_guide()]
    return "\n".join(lines).rstrip() + "\n"


def _setting(setting: Mapping[str, Any]) -> list[str]:
    base, speculator, config = setting["base"], setting["speculator"], setting["config"]
    scorer = "its own layers" if speculator is None else speculator["name"]
    changed = ", ".join(f"{name}={value}" for name, value in config.items())
    versions = ", ".join(f"{name} {value}" for name, value in setting["versions"].items())
    return [
        f"- Base {base['name']} ({base['parameters'] / 1e6:.0f} M parameters, {base['dtype']}), speculator {scorer}.",
        f"- Prompts of {setting['tokens']:,} tokens, greedy answers. {setting['machine']}; {versions}.",
        f"- Configuration: {changed}.",
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    names: tuple[str, ...] = (
        "keep",
        "method",
        "score [95%]",
        "to full, paired [95%]",
        "to random, paired [95%]",
        "evidence kept",
    )
    names = (*names, "tokens read", "TTFT s")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        evidence = "-" if row.evidence is None else f"{row.evidence.estimate:.2f}"
        cells = [
            "all" if row.method == "full" else f"{row.keep_ratio:g}",
            TITLES[row.method],
            text_of(row.score),
            text_of(row.to_full, signed=True),
            "-" if row.method == "full" else text_of(row.to_random, signed=True),
            evidence,
            f"{row.kept:.0%}",
            f"{row.ttft:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def text_of(value: Interval | None, signed: bool = False) -> str:
    """ "0.80 [0.58, 0.92]", or "-" where there is nothing."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    numbers = [
        f"{0.0 if abs(number) < 0.005 else number:{sign}.2f}" for number in (value.estimate, value.low, value.high)
    ]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = [
        f"{row.dense} of {row.prompts} prompts ran dense at {row.keep_ratio:g}."
        for row in rows
        if row.method == "kept" and row.dense
    ]
    if rows[0].cut:
        notes.append(f"{rows[0].cut} of {rows[0].prompts} prompts were too long and lost their middle.")
    return notes


def _times(summary: Summary) -> list[str]:
    """What the first token waits for, median seconds."""
    rows = [row for row in summary.rows if row.task == summary.tasks[0] and row.method in ("full", "kept")]
    names = list(dict.fromkeys(name for row in reversed(rows) for name in row.stages))
    lines = ["## Until the first token, median seconds", ""]
    lines += [f"| keep | method | TTFT | full / this | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for row in rows:
        stages = (f"{row.stages[name]:.3f}" if name in row.stages else "-" for name in names)
        keep = "all" if row.method == "full" else f"{row.keep_ratio:g}"
        ahead = "-" if row.speed_up is None else f"{row.speed_up:.2f}"
        lines.append(f"| {keep} | {TITLES[row.method]} | {row.ttft:.2f} | {ahead} | {' | '.join(stages)} |")
    return [*lines, ""]


def _recency(summary: Summary) -> list[str]:
    """Where the last tokens do as well as a selection: said, because no selection can be better there."""
    lines = []
    for task in summary.tasks:
        for row in summary.rows:
            if row.task == task and row.method == "kept" and task != ALL:
                last = [r for r in summary.rows if (r.task, r.method, r.keep_ratio) == (task, "last", row.keep_ratio)]
                # A tie at nothing right says nothing.
                if last and last[0].score.estimate >= max(row.score.estimate, 1e-9):
                    lines.append(
                        f"- {task} at {row.keep_ratio:g}: last tokens {last[0].score.estimate:.2f}, "
                        f"kept {row.score.estimate:.2f}"
                    )
    if not lines:
        return []
    return ["## Where the last tokens do as well as or better than what was kept", "", *lines, ""]


def _reading_guide() -> list[str]:
    return [
        "## How to read this",
        "",
        "Every baseline reads exactly as many tokens as the selection did for the same prompt, and what the selection "
        "is forced to keep (protected parts of the template, the end of the question, the last chunk) is among them. "
        "TTFT of the selection holds the speculator's time; baselines need none. Rates have Wilson's interval and "
        "paired differences of rates Newcombe's; other scores Agresti's adjusted normal intervals. Evidence kept: "
        "prompts of which every token that touches the evidence was read.",
    ]
