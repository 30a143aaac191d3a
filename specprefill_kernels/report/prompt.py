"""The prompt on the page: the map of its chunks, that of its layers, the legend, and every token with its scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape

from specprefill_kernels.report.data import Piece, Protected, Reading, Span
from specprefill_kernels.report.shades import LEVELS, chunks, heights, layers_as_json, mean, ranks, scale_of, shade


def map_of_chunks(r: Reading) -> str:
    """The prompt from left to right, one bar per chunk: mean importance, kept ones coloured; protected spans below."""
    cut = list(chunks(r.pieces, r.chunk_size))
    bars = []
    for (number, pieces), height in zip(cut, heights([mean(pieces) for _, pieces in cut])):
        kept = sum(piece.end - piece.position for piece in pieces if piece.kept)
        tokens = max(1, sum(piece.end - piece.position for piece in pieces))
        kind = "kept" if kept == tokens else "part" if kept else "dropped"
        share = f"--share:{100 * kept / tokens:.0f}%;--stops:{_stops(pieces)};" if kind == "part" else ""
        bars.append(
            f'<a href="#c{number}" class="{kind}" tabindex="-1" data-c="{number}" '
            f'style="{share}flex-grow:{tokens};height:{height:.1f}%"></a>'
        )

    def strip(css: str, start: int, end: int) -> str:
        left, width = 100 * start / r.prompt_tokens, 100 * (end - start) / r.prompt_tokens
        return f'<b class="{css}" style="left:{left:.2f}%;width:{width:.2f}%"></b>'

    strips = "".join(strip("guard", part.start, part.end) for part in r.protected)
    strips += "".join(strip("truth", start, end) for start, end in r.evidence)
    needle = ""
    if r.evidence:
        middles = [100 * (start + end) / 2 / r.prompt_tokens for start, end in r.evidence]
        needle = "".join(f'<span class="needle" style="left:{middle:.2f}%"></span>' for middle in middles)
        words = "the answer lies here" if len(middles) == 1 else "parts of the answer lie here"
        needle += f'<span class="needletext" style="--at:{sum(middles) / len(middles):.2f}%">{words}</span>'
    kept_spans = len(r.kept_spans)
    return (
        f'<div class="map{" noted" if needle else ""}" role="img" aria-label="Importance of the prompt\'s {len(cut):,} '
        f'chunks from left to right; {r.kept_tokens:,} tokens in {kept_spans:,} spans are kept">'
        f'<div class="mapbars" id="bars" aria-hidden="true">{"".join(bars)}</div>'
        f'<div class="strips">{strips}</div>{needle}</div>'
    )


def map_of_layers(r: Reading) -> str:
    """A row per layer, drawn by the script; nothing without layers."""
    if r.layers is None:
        return ""
    first, last = r.layers.numbers[0], r.layers.numbers[-1]
    return (
        f'<div class="layermap" id="layermap" hidden><canvas id="heat" role="img" aria-label="Importance by layer, '
        f'layer {first} at the top, layer {last} at the bottom, along the prompt"></canvas><b id="row" hidden></b>'
        f'<span class="edge top">{first}</span><span class="edge bottom">{last}</span></div>'
        '<p class="note" id="layernote" hidden>One row a layer, each on its own scale. Choose a row to shade the text '
        "by that layer alone.</p>"
    )


def layer_control(r: Reading) -> str:
    if r.layers is None:
        return ""
    return (
        '<div class="group layer" role="group" aria-label="Layer">'
        '<button type="button" id="all" aria-pressed="true">all</button>'
        f'<input type="range" id="layer" min="0" max="{len(r.layers.numbers)}" value="0" step="1" '
        'aria-label="Layer that shades the text" aria-valuetext="all layers">'
        '<output id="layername" for="layer">all layers</output></div>'
    )


def legend(r: Reading) -> str:
    steps = "".join(f'<i class="h{level}"></i>' for level in range(2, LEVELS + 1, 2))
    skipped = r.prompt_tokens - r.kept_tokens
    spans = len(r.kept_spans)
    rows = [
        f'<span class="scale">less <span class="steps">{steps}</span> more important</span>',
        f'<i class="swatch kept">kept</i> {r.kept_tokens:,} tokens in {spans:,} span{"" if spans == 1 else "s"}, '
        "which the base model read",
        f'<i class="swatch dropped">skipped</i> {skipped:,} tokens, which only the speculator read',
    ]
    if r.protected:
        parts = "".join(
            f' <button type="button" class="part" data-label="{number}" disabled>{escape(label)} <b>{count:,}</b>'
            "</button>"
            for number, (label, count) in enumerate(r.protected_counts.items())
        )
        rows.append(f'<i class="swatch guard">protected</i> {r.protected_tokens:,} tokens, kept whatever:{parts}')
    if r.evidence:
        rows.append('<i class="swatch truth">answer</i> where the answer lies')
    return f'<ul class="legend">{"".join(f"<li>{row}</li>" for row in rows)}</ul>'


def document(r: Reading) -> str:
    """Every token as an <i> with position, importance and rank, in runs of kept and skipped tokens of one chunk."""
    scale = scale_of([piece.importance for piece in r.pieces])
    order = dict(zip((piece.position for piece in r.pieces), ranks([piece.importance for piece in r.pieces])))
    labels = list(r.protected_counts)
    out, before, skipped = [], False, 0
    for number, pieces in chunks(r.pieces, r.chunk_size):
        for kept, run in _runs(pieces):
            anchor = f' id="c{number}"' if run[0] is pieces[0] else ""
            begins = kept and not before
            gap = f' data-gap="{skipped:,}"' if begins and skipped else ""
            css = f"chunk {'kept' if kept else 'dropped'}{' begins' if begins else ''}{' gap' if gap else ''}"
            body = "".join(_token(piece, scale, order[piece.position], r, labels) for piece in run)
            out.append(f'<span{anchor} class="{css}"{gap}>{body}</span>')
            before = kept
            skipped = 0 if kept else skipped + sum(piece.end - piece.position for piece in run)
    if skipped and not before and skipped < r.prompt_tokens:
        out.append(f'<span class="after" data-gap="{skipped:,}"></span>')
    return "".join(out)


def facts(r: Reading) -> str:
    """What the script needs beside the text, as JSON that can stand in a script element."""
    values = {
        "tokens": r.prompt_tokens,
        "chunk": r.chunk_size,
        "labels": list(r.protected_counts),
        "spans": r.kept_spans,
        "layers": None if r.layers is None else layers_as_json(r.layers, r.pieces),
    }
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


def _stops(pieces: Sequence[Piece]) -> str:
    """Stops of a gradient: a chunk that is kept in part has its colour where its kept tokens are."""
    start, tokens = pieces[0].position, pieces[-1].end - pieces[0].position
    return ",".join(
        f"var(--{'kept' if kept else 'rest'}) {100 * (run[0].position - start) / tokens:.0f}% "
        f"{100 * (run[-1].end - start) / tokens:.0f}%"
        for kept, run in _runs(pieces)
    )


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[bool, list[Piece]]]:
    run: list[Piece] = []
    for piece in pieces:
        if run and run[-1].kept != piece.kept:
            yield run[-1].kept, run
            run = []
        run.append(piece)
    if run:
        yield run[-1].kept, run


def _touches(piece: Piece, span: Span) -> bool:
    return span[0] < piece.end and piece.position < span[1]


def _token(piece: Piece, scale: float, rank: int, r: Reading, labels: Sequence[str]) -> str:
    css, extra = f"h{shade(piece.importance, scale)}", ""
    part: Protected | None = next((part for part in r.protected if _touches(piece, (part.start, part.end))), None)
    if part is not None:
        css += " g"
        extra = f' data-l="{labels.index(part.label)}"'
    if any(_touches(piece, span) for span in r.evidence):
        css += " f"
    return (
        f'<i class="{css}" data-p="{piece.position}" data-s="{piece.importance:.3g}" data-r="{rank}"{extra}>'
        f"{escape(piece.text)}</i>"
    )
