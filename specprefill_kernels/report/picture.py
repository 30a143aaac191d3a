"""Importance over position as a PNG: chunks from left to right, what was kept and protected, and each layer below.

Needs matplotlib: pip install "specprefill-kernels[plot]".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from specprefill_kernels.report.data import Reading
from specprefill_kernels.report.shades import LEVELS, chunks, layers_of_pieces, mean, scale_of, shade

INSTALL = 'pip install "specprefill-kernels[plot]"'

# The page's colours.
LIGHT = {
    "background": "#fffefb", "ink": "#1d1c1a", "soft": "#66635c", "line": "#e6e2d8", "skipped": "#c9c4b9",
    "kept": "#0c7c71", "protected": "#2563c9", "evidence": "#7a3ff2", "heat": "#f27818",
}  # fmt: skip
DARK = {
    "background": "#1b1d20", "ink": "#eceae5", "soft": "#a8a49c", "line": "#2f3237", "skipped": "#55544f",
    "kept": "#35c2b2", "protected": "#7fb0ff", "evidence": "#b394ff", "heat": "#ff8c2e",
}  # fmt: skip
DPI = 160


def save(
    reading: Reading,
    path: str | Path,
    *,
    layers: bool = True,
    dark: bool = False,
    width: int = 1600,
    height: int | None = None,
) -> Path:
    """Draws `reading` into a PNG of `width` x `height` pixels.

    The upper panel has a bar per chunk: its mean importance, in another colour where the base reads it. A strip below
    has the protected tokens, and a band shows where the answer lies, where that is known. The lower panel has a row per
    layer and a column per token, each row shaded on its own scale as on the page; it is left out where the reading has
    no layers.

    Args:
        layers: draw the lower panel where there is something to draw.
        height: default 1000 with the lower panel, 560 without.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
        ValueError: width or height is too small to draw in.
        OSError: the file cannot be written.
    """
    rows = reading.layers if layers else None
    height = (1000 if rows else 560) if height is None else height
    for name, value, least in (("width", width, 640), ("height", height, 320)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least} pixels, got {value}")
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    with warnings.catch_warnings():
        # A title in a script that matplotlib's font lacks is drawn as boxes, which says enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas = FigureCanvasAgg(figure)  # text is measured with it
        _draw(figure, reading, rows is not None, DARK if dark else LIGHT, width, height)
        canvas.print_png(path)
    return Path(path)


def require() -> None:
    """Raises ImportError, which says what to install, where `save` could not draw: before the work for a picture."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f"a picture needs matplotlib: {INSTALL}") from error


def _draw(figure: Any, r: Reading, layers: bool, colours: dict[str, str], width: int, height: int) -> None:
    figure.set_facecolor(colours["background"])
    top = 1 - 150 / height
    ratios = {"height_ratios": [1, 1.35]} if layers else {}
    axes = figure.subplots(
        2 if layers else 1, 1, sharex=True, squeeze=False,
        gridspec_kw={"left": 130 / width, "right": 1 - 40 / width, "top": top, "bottom": 76 / height, "hspace": 0.16,
                     **ratios},
    )[:, 0]  # fmt: skip
    _title(figure, r, colours, height, width)
    _chunks(axes[0], r, colours)
    if layers:
        _layers(axes[1], r, colours)
    axes[-1].set_xlabel("position in the prompt, tokens", color=colours["soft"])
    figure.align_ylabels(axes)
    for axis in axes:
        axis.set_xlim(0, r.prompt_tokens)
        axis.set_facecolor(colours["background"])
        axis.tick_params(colors=colours["soft"], length=3, labelsize=8)
        for side in axis.spines.values():
            side.set_color(colours["line"])


def _title(figure: Any, r: Reading, colours: dict[str, str], height: int, width: int) -> None:
    def text(x: float, y: float, words: str, **style: Any) -> float:
        """Draws `words`, cut to what fits; returns where they end."""
        words = " ".join(words.split())
        # A dollar sign in foreign text is no formula.
        artist = figure.text(x / width, 1 - y / height, words, va="top", parse_math=False, **style)
        while (end := artist.get_window_extent().x1) > width - 30 and len(words) > 1:
            words = words[: -1 - len(words) // 20]
            artist.set_text(words + "…")
        return float(end)

    text(40, 20, r.title, color=colours["ink"], fontsize=13, fontweight="bold")
    models = f"{r.base}, importance by {r.speculator}" if r.speculator else r.base
    text(40, 60, f"{r.verdict.rstrip('.')} ({models})", color=colours["soft"], fontsize=9.5)
    entries = [("kept", "kept"), ("skipped", "skipped")]
    entries += [("protected", "protected")] if r.protected else []
    entries += [("evidence", "where the answer lies")] if r.evidence else []
    x = 40.0
    for key, words in entries:
        x = text(x, 97, "■", color=colours[key], fontsize=11)
        x = text(x + 8, 98, words, color=colours["ink"], fontsize=9.5) + 34


def _chunks(axis: Any, r: Reading, colours: dict[str, str]) -> None:
    means, starts = [], []
    for number, pieces in chunks(r.pieces, r.chunk_size):
        height = mean(pieces)
        means.append(height)
        # In a chunk that is kept in part, each token has its own colour.
        for start, end, kept in _stretches([(piece.position, piece.end, piece.kept) for piece in pieces]):
            axis.bar(start, height, width=end - start, align="edge", color=colours["kept" if kept else "skipped"],
                     linewidth=0, zorder=2, antialiased=False)  # fmt: skip
        starts.append(number * r.chunk_size)
    if r.prompt_tokens <= 200 * r.chunk_size:  # a hairline between chunks that are wide enough for one
        for start in starts[1:]:
            axis.axvline(start, color=colours["background"], linewidth=0.6, zorder=3)
    top = max(means, default=0.0) or 1.0
    # Square root, as on the page: one chunk of an attention sink would flatten all others.
    axis.set_yscale("function", functions=(_root, _square))
    axis.set_ylim(0, top * 1.08)
    ticks = _ticks(top)
    axis.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylabel("mean importance of a chunk", color=colours["soft"], fontsize=9)
    below = axis.get_xaxis_transform()
    for part in r.protected:
        axis.fill_between([part.start, part.end], -0.05, -0.015, color=colours["protected"], linewidth=0,
                          transform=below, clip_on=False, antialiased=False)  # fmt: skip
    for start, end in r.evidence:
        axis.axvspan(start, end, color=colours["evidence"], alpha=0.16, linewidth=0, zorder=1)
        axis.fill_between([start, end], -0.05, -0.015, color=colours["evidence"], linewidth=0, transform=below,
                          clip_on=False, antialiased=False)  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", pad=8)


def _layers(axis: Any, r: Reading, colours: dict[str, str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    assert r.layers is not None
    rows = []
    for values in layers_of_pieces(r.layers, r.pieces):
        scale = scale_of(values)
        row = [0] * r.prompt_tokens
        for piece, value in zip(r.pieces, values):
            for token in range(piece.position, piece.end):
                row[token] = shade(value, scale)
        rows.append(row)
    colormap = LinearSegmentedColormap.from_list("heat", [colours["background"], colours["heat"]], N=LEVELS + 1)
    numbers = r.layers.numbers
    # Many tokens to a pixel: matplotlib would average them away, so each column keeps its darkest token.
    columns = _darkest(rows, 1400)
    axis.imshow(columns, aspect="auto", cmap=colormap, vmin=0, vmax=LEVELS, interpolation="nearest",
                extent=(0, r.prompt_tokens, len(rows), 0))  # fmt: skip
    shown = range(0, len(numbers), max(1, -(-len(numbers) // 8)))
    axis.set_yticks([row + 0.5 for row in shown], [str(numbers[row]) for row in shown])
    axis.set_ylabel("layer", color=colours["soft"], fontsize=9)


def _darkest(rows: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    length = len(rows[0]) if rows else 0
    columns = min(length, limit)
    edges = [length * column // columns for column in range(columns + 1)] if columns else [0]
    return [[max(row[a:b]) for a, b in pairwise(edges)] for row in rows]


def _stretches(parts: Sequence[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    merged: list[tuple[int, int, bool]] = []
    for start, end, kept in parts:
        if merged and merged[-1][2] == kept:
            merged[-1] = (merged[-1][0], end, kept)
        else:
            merged.append((start, end, kept))
    return merged


def _ticks(top: float) -> list[float]:
    """Round numbers up to `top` that stand far enough from each other on a square-root scale."""
    decade = math.floor(math.log10(top))
    found = [0.0]
    for value in (step * 10.0**power for power in range(decade - 4, decade + 1) for step in (1, 2, 5)):
        if value <= top * 1.0001 and math.sqrt(value / top) - math.sqrt(found[-1] / top) >= 0.17:
            found.append(value)
    return found


def _root(values: Any) -> Any:
    import numpy as np

    return np.sqrt(np.maximum(values, 0))


def _square(values: Any) -> Any:
    return values**2
