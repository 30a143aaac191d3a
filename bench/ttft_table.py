"""The table of times to first token, as text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

from bench import ttft_plans
from bench.environment import describe
from bench.report_tables import layers_timed, notes

SHORT = {
    "tokenize": "tokens",
    "speculator_prefill": "speculator",
    "look_ahead": "look-ahead",
    "score": "score",
    "select": "select",
    "gather": "gather",
    "base_prefill": "base",
}
COLUMNS = ("pair", "prompt", "keep", "full", "speculative", "stages", "ratio", "limit", "any budget", "layers timed")
WIDTH = 170


def seconds(value: float) -> str:
    if value >= 100:
        return f"{value:.0f} s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.3g} ms"


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    asked, ran = row["speculator_attention"], row["speculator_attention_ran"]
    sparse = "" if asked == "dense" else f" ({asked})" if asked == ran else f" ({asked} asked, {ran} ran)"
    preset = "" if row["preset"] == "default" else f", preset {row['preset']}"
    stages = ", ".join(f"{SHORT.get(name, name)} {seconds(value)}" for name, value in row["stages"].items())
    return (
        f"{row['speculator']}{sparse} -> {row['base']}, {row['dtype']}{preset}",
        f"{row['tokens']}{'' if row['weights'] == 'random' else ' real'}",
        f"{row['keep_ratio']:g} ({row['kept_tokens']})",
        seconds(row["full_seconds"]),
        seconds(row["speculative_seconds"]),
        stages,
        f"{row['ratio']:.2f}x",
        f"{row['limit']:.2f}x",
        f"{row['limit_any_budget']:.2f}x",
        layers_timed(row),
    )


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line for each row, as they come."""
    found = []
    for row in rows:
        _, prompt, keep, full, speculative, stages, ratio, limit, *_ = cells(row)
        found.append(f"  {prompt} keep {keep}: {full} -> {speculative} ({stages}), {ratio}, limit {limit}")
    return "\n".join(found)


def table(report: Mapping[str, Any]) -> str:
    """Everything, with what the columns mean and what was left out."""
    rows = report["rows"]
    text = [describe(report["environment"]), *_grid(rows)]
    if rows:
        text += [
            "ratio = full / speculative; limit = full / (speculator + look-ahead + base): what the models' costs allow",
            "at this budget; any budget = full / (speculator + look-ahead): what no budget passes. Medians, in turn.",
        ]
    if any(row["weights"] == "random" for row in rows):
        text += [
            "Random weights in the published shapes: what is selected means nothing, what it costs is real.",
            "Layers: those timed, scaled to all.",
        ]
    text += [f"note: {note}" for note in notes(rows)]
    text += ttft_plans.reached(rows)
    for name in ("warnings", "failed", "cut", "left_out"):
        text += [f"{name.replace('_', ' ')}: {one}" for one in report.get(name, ())]
    return "\n".join(text)


def _grid(rows: list[Mapping[str, Any]]) -> list[str]:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # plain, then
        return ["  ".join(COLUMNS), *("  ".join(cells(row)) for row in rows)]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        numbers = name in ("full", "speculative", "ratio", "limit", "any budget")
        grid.add_column(name, justify="right" if numbers else "left", no_wrap=numbers)
    for row in rows:
        grid.add_row(*cells(row))
    file = io.StringIO()
    Console(file=file, width=WIDTH, color_system=None, highlight=False).print(grid)
    return [line.rstrip() for line in file.getvalue().rstrip().splitlines()]
