"""Score against keep ratio, one panel for all tasks and one for each, as a PNG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from specprefill_kernels.quality.methods import TITLES
from specprefill_kernels.quality.summary import Row, Summary

# Told apart by shade and marker too, not by hue alone.
STYLES = {
    "kept": ("#0b5fa5", "o", "-", 2.4),
    "random": ("#c8553d", "s", "--", 1.4),
    "last": ("#6f8f3a", "^", "--", 1.4),
    "first_last": ("#8d6cab", "D", "--", 1.4),
}


def save_plot(summary: Summary, path: Path, title: str) -> None:
    """Raises ImportError, which says what to install, where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "specprefill-kernels[eval]"') from error
    tasks = summary.tasks
    columns = min(len(tasks), 4)
    lines = math.ceil(len(tasks) / columns)
    # No pyplot: nothing global, no window, no state left behind.
    figure = Figure(figsize=(max(3.1 * columns, 6.2), 2.7 * lines + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for index, axes in enumerate(grid.flat):
        if index >= len(tasks):
            axes.set_visible(False)
            continue
        rows = [row for row in summary.rows if row.task == tasks[index]]
        _panel(axes, rows)
        axes.set_title(
            f"{tasks[index]}  (n = {rows[0].prompts})", fontsize=9.5, fontweight="bold" if not index else None
        )
        if index + columns >= len(tasks):
            axes.set_xlabel("part of the prompt's chunks that is kept", fontsize=8.5)
            axes.xaxis.set_tick_params(labelbottom=True)
        if index % columns == 0:
            axes.set_ylabel("score, 95% interval", fontsize=8.5)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10.5)
    figure.savefig(path, dpi=150)


def _panel(axes, rows: Sequence[Row]) -> None:  # type: ignore[no-untyped-def]
    ratios = sorted({row.keep_ratio for row in rows if row.method != "full"})
    step = min([b - a for a, b in itertools.pairwise(ratios)], default=0.1)
    for row in rows:
        if row.method == "full":
            axes.axhline(row.score.estimate, color="#333333", linewidth=1.2, label=TITLES["full"], zorder=1)
            axes.axhspan(row.score.low, row.score.high, color="#333333", alpha=0.09, linewidth=0, zorder=0)
    present = [method for method in STYLES if any(row.method == method for row in rows)]
    for place, method in enumerate(present):
        color, marker, line, width = STYLES[method]
        mine = sorted((row for row in rows if row.method == method), key=lambda row: row.keep_ratio)
        # Side by side, or the intervals of one ratio would hide each other.
        shift = (place - (len(present) - 1) / 2) * 0.09 * step
        axes.errorbar(
            [row.keep_ratio + shift for row in mine],
            [row.score.estimate for row in mine],
            yerr=[
                [max(row.score.estimate - row.score.low, 0) for row in mine],
                [max(row.score.high - row.score.estimate, 0) for row in mine],
            ],
            color=color, marker=marker, linestyle=line, linewidth=width, markersize=5, elinewidth=1, capsize=2,
            label=TITLES[method], zorder=3 if method == "kept" else 2,
        )  # fmt: skip
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    if ratios:  # the full prompt alone has none
        axes.set_xlim(min(ratios) - 0.5 * step, max(ratios) + 0.5 * step)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
