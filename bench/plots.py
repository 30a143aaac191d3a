"""The report's pictures: light, logarithmic, in colours that colour-blind readers tell apart (Okabe and Ito's)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from bench.report_data import Results
from bench.report_tables import dtype, size, time
from bench.shapes import LOOK_AHEAD, size_name

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
GREY = "#6b6b6b"
STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.edgecolor": "#9a9a9a",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
Points = Iterable[tuple[float, float]]


def draw(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Writes every picture that there is data for: (file name, caption)."""
    made = []
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for name, caption, make in PICTURES:
            figure = make(results)
            if figure is not None:
                figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight")
                plt.close(figure)
                made.append((f"{name}.png", caption))
    return made


def _tokens(axes: Axes, values: Iterable[float]) -> None:
    """T on a binary logarithmic axis, in words that fit."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        ticks if len(ticks) <= 7 else ticks[::2], [_name(t) for t in (ticks if len(ticks) <= 7 else ticks[::2])]
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("prompt tokens T")


def _name(tokens: float) -> str:
    return size_name(int(tokens))


def _seconds(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: time(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _bytes(axes: Axes) -> None:
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _line(axes: Axes, points: Points, index: int, label: str | None, dashed: bool = False, **how: Any) -> None:
    values = sorted(points)
    if values:
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]} | how
        axes.plot(*zip(*values), label=label, linestyle="--" if dashed else "-", markerfacecolor="white", **style)


def _model(row: dict[str, Any]) -> str:
    return row.get("model") or row["shape"].split()[0]


def _models(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(map(_model, rows)))


def _by_dtype(
    rows: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float | None],
    label: str,
    prepare: Callable[[Axes], None],
) -> Figure | None:
    """A panel for each dtype, a line for each model: whole for the most threads, dashed for fewer."""
    rows = [row for row in rows if row["op"] == "score_layers" and row.get("backend") != "reference"]
    if not rows:
        return None
    kinds = list(dict.fromkeys(row["dtype"] for row in rows))
    most = max(row["threads"] for row in rows)
    lines: dict[tuple[str, str], dict[tuple[str, int], list[tuple[float, float]]]] = {}
    several = len({_how(row) for row in rows}) > 1
    for row in rows:
        found = value(row)
        if found is not None:
            line = lines.setdefault((_model(row), _how(row) if several else ""), {})
            line.setdefault((row["dtype"], row["threads"]), []).append((row["tokens"], found))
    figure, panels = plt.subplots(1, len(kinds), figsize=(5.2 * len(kinds), 3.9), sharey=True, squeeze=False)
    for axes, kind in zip(panels[0], kinds):
        for i, (name, line) in enumerate(lines.items()):
            for (dtype_, threads), points in line.items():
                if dtype_ == kind:
                    dashed = threads != most
                    _line(axes, points, i, None if dashed else " ".join(name).strip(), dashed)
        axes.set_title(dtype(kind))
        prepare(axes)
        _tokens(axes, (row["tokens"] for row in rows))
    panels[0][0].set_ylabel(label)
    panels[0][0].legend()
    return figure


def _how(row: dict[str, Any]) -> str:
    return f"{row.get('backend', '')}{' graph' * bool(row.get('graph'))}"


def latency(results: Results) -> Figure | None:
    """From the microbenchmarks, or from the goals where they have more lengths."""
    goals = results.rows("goals")
    rows = goals if _lengths(goals) > _lengths(results.ops) else results.ops
    return _by_dtype(rows, lambda row: row["seconds"]["p50"] / row["layers"], "time of one layer's score", _seconds)


def _lengths(rows: Sequence[dict[str, Any]]) -> int:
    return len({row["tokens"] for row in rows if row["op"] == "score_layers"})


def fraction(results: Results) -> Figure | None:
    def prepare(axes: Axes) -> None:
        axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.axhline(1, color=GREY, linewidth=1)

    return _by_dtype(results.ops, lambda row: row["roofline_fraction"], "fraction of the roofline", prepare)


def _times(limit: float) -> Callable[[Axes], None]:
    """An axis from 0, in "x", with a line at the goal."""

    def prepare(axes: Axes) -> None:
        axes.set_ylim(0, max(1.1 * limit, axes.get_ylim()[1]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.axhline(limit, color=GREY, linewidth=1)

    return prepare


def over_eager(results: Results) -> Figure | None:
    rows = results.rows("goals") or results.ops
    return _by_dtype(
        rows,
        lambda row: row.get("over_definition") or row.get("ratios", {}).get("eager"),
        "times faster than eager",
        _times(8.0),
    )


def to_matmul(results: Results) -> Figure | None:
    rows = results.rows("goals")
    return _by_dtype(rows, lambda row: row["to_matmul"], "times the bare QK^T matmul", _times(1.5))


def tail(results: Results) -> Figure | None:
    """What follows scoring."""
    wanted = ("select_tokens", "select_chunks", "finalize_importance", "gather_tokens")
    rows = [
        row
        for row in results.ops
        if row["op"] in wanted and row["backend"] != "reference" and " x " not in row["shape"] and not row.get("graph")
    ]
    if len({row["tokens"] for row in rows}) < 2:
        return None
    most = max(row["threads"] for row in rows)
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.9))
    for i, op in enumerate(wanted):
        for j, backend in enumerate(backends):
            mine = [row for row in rows if row["op"] == op and row["backend"] == backend and row["threads"] == most]
            label = op if len(backends) == 1 else f"{op} {backend}"
            _line(left, [(row["tokens"], row["seconds"]["p50"]) for row in mine], i, label, dashed=j > 0)
            _line(right, [(row["tokens"], row["roofline_fraction"]) for row in mine], i, None, dashed=j > 0)
    _seconds(left)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_ylim(bottom=0)
    left.set_title("time")
    right.set_title("fraction of the roofline")
    for axes in (left, right):
        _tokens(axes, (row["tokens"] for row in rows))
    left.legend()
    return figure


def memory(results: Results) -> Figure | None:
    """Of scoring, beside the state and what others hold."""
    rows = [row for row in results.ops if row["op"] == "score_layers" and row["peak_bytes"]]
    others = [row for row in results.rows("peers") if row["op"] == "score" and row["peak_bytes"]]
    if not rows:
        return None
    model = next((row["model"] for row in others[::-1]), "")
    figure, panels = plt.subplots(
        1, 2 if others else 1, figsize=(10.4 if others else 5.4, 3.9), sharey=True, squeeze=False
    )
    left, right = panels[0][0], panels[0][-1]
    tokens = sorted({row["tokens"] for row in rows})
    for i, name in enumerate(_models(rows)):
        _line(left, _largest(row for row in rows if row["shape"].split()[0] == name), i, name)
    left.plot(
        tokens, [4 * LOOK_AHEAD * t for t in tokens], color=GREY, linestyle=":", label=f"state, {LOOK_AHEAD} rows"
    )
    for i, peer in enumerate(dict.fromkeys(row["peer"] for row in others)):
        _line(right, _largest(row for row in others if (row["peer"], row["model"]) == (peer, model)), i, peer)
    for axes in panels[0]:
        _bytes(axes)
        _tokens(axes, tokens)
        axes.legend()
    left.set_title("score_layers_, all layers")
    if others:
        right.set_title(f"{model}: others, on the layers that they ran")
    left.set_ylabel("peak extra memory")
    return figure


def _largest(rows: Iterable[dict[str, Any]]) -> Points:
    found: dict[float, float] = {}
    for row in rows:
        found[row["tokens"]] = max(found.get(row["tokens"], 0), row["peak_bytes"])
    return found.items()


def ratios(results: Results) -> Figure | None:
    """Each peer's time over ours, one dot a shape."""
    rows = [row for row in results.rows("peers") if row["peer"] != "specprefill_kernels"]
    if not rows:
        return None
    names = list(dict.fromkeys(row["peer"] for row in rows))[::-1]
    kinds = list(dict.fromkeys(row.get("dtype", "float32") for row in rows))
    figure, axes = plt.subplots(figsize=(8.4, 0.62 * len(names) + 1.5))
    for i, kind in enumerate(kinds):
        at = [(row["ratio"], names.index(row["peer"])) for row in rows if row.get("dtype", "float32") == kind]
        shift = 0.3 * (i - (len(kinds) - 1) / 2)
        x, y = [ratio for ratio, _ in at], [place + shift for _, place in at]
        axes.scatter(x, y, color=COLOURS[i], marker=MARKERS[i], s=34, alpha=0.75, label=dtype(kind), zorder=3)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    low, high = axes.get_xlim()
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= t <= high]
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time divided by this library's, each dot a shape (right of 1x: slower)")
    axes.legend(loc="best")
    return figure


def scaling(results: Results) -> Figure | None:
    rows = [row for row in results.rows("scaling") if "seconds" in row]
    if not rows:
        return None
    fits = results.files["scaling"].get("fits", {})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.4, 4.3))
    for i, op in enumerate(dict.fromkeys(row["op"] for row in rows)):
        mine = [row for row in rows if row["op"] == op]
        exponent = fits.get(op, {}).get("time_exponent")
        name = op if exponent is None else f"{op}  T^{exponent:.2f}"
        _line(left, [(row["tokens"], row["seconds"]["p50"]) for row in mine], i, name)
        exponent = fits.get(op, {}).get("memory_exponent")
        name = op if exponent is None else f"{op}  T^{exponent:.2f}"
        _line(right, [(row["tokens"], row["peak_bytes"]) for row in mine if row.get("peak_bytes")], i, name)
    _seconds(left)
    _bytes(right)
    left.set_title("time")
    right.set_title("peak extra memory")
    for axes in (left, right):
        _tokens(axes, (row["tokens"] for row in rows))
        axes.legend(fontsize=8)
    return figure


def ttft(results: Results) -> Figure | None:
    """Full over speculative time to first token; a mark shows what the two models' costs allow."""
    rows = [row for row in results.rows("ttft") if row.get("ratio") and row.get("weights") == "random"]
    if not rows:
        return None
    pairs = list(dict.fromkeys((row["speculator"], row["base"]) for row in rows))
    figure, panels = plt.subplots(1, len(pairs), figsize=(3.8 * len(pairs) + 0.8, 3.9), sharey=True, squeeze=False)
    keeps = sorted({row["keep_ratio"] for row in rows})
    for axes, pair in zip(panels[0], pairs):
        mine = [row for row in rows if (row["speculator"], row["base"]) == pair]
        for i, keep in enumerate(keeps):
            kept = [row for row in mine if row["keep_ratio"] == keep]
            _line(axes, [(row["tokens"], row["ratio"]) for row in kept], i, f"keep {keep:g}")
            _line(
                axes, [(r["tokens"], r["limit"]) for r in kept if r.get("limit")], i, None, True, linewidth=1, marker=""
            )
        axes.axhline(1, color=GREY, linewidth=1)
        axes.set_title(f"{pair[0]} -> {pair[1]}", fontsize=9)
        _tokens(axes, (row["tokens"] for row in mine))
    panels[0][0].set_ylabel("full / speculative TTFT (dashed: the limit)")
    panels[0][0].legend()
    return figure


PICTURES: tuple[tuple[str, str, Callable[[Results], Figure | None]], ...] = (
    ("latency", "Time of one layer's score against T; dashed: one thread.", latency),
    ("roofline", "The same as a fraction of the roofline; dashed: one thread.", fraction),
    ("matmul", "Scoring beside the bare QK^T matmul by torch; the line is the goal; dashed: one thread.", to_matmul),
    ("eager", "Scoring beside the eager definition; the line is the goal; dashed: one thread.", over_eager),
    ("memory", "Peak extra memory of scoring all layers, outputs included.", memory),
    ("tail", "What follows scoring.", tail),
    ("peers", "Other ways to get the same, or nearly the same, beside this library.", ratios),
    ("scaling", "Growth with T, and the fitted exponents.", scaling),
    ("ttft", "Time to first token, full over speculative.", ttft),
)
