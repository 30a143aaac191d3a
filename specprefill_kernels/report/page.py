"""The shareable page: one HTML file, no request to anywhere, every piece of foreign text escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from string import Template

from specprefill_kernels.report.data import STAGES, TIMES, Comparison, Measured, Piece, seconds_text, shade, shade_scale

_COLOURED = ("speculator_prefill", "look_ahead", "score", "select", "base_prefill")


def render(comparison: Comparison) -> str:
    """The whole page as text."""
    files = resources.files(__package__)
    scale = shade_scale(comparison.pieces)
    return Template((files / "page.html").read_text(encoding="utf-8")).substitute(
        css=(files / "page.css").read_text(encoding="utf-8"),
        js=(files / "page.js").read_text(encoding="utf-8"),
        verdict=escape(comparison.verdict),
        title=escape(comparison.title),
        lead=_lead(comparison),
        bars=_bars(comparison),
        question=escape(comparison.question),
        fact=_fact(comparison),
        answers=_answer("Full prefill", comparison.full, comparison)
        + _answer("Speculative prefill", comparison.sparse, comparison),
        map=_map(comparison),
        document=_document(comparison, scale),
        legend="".join(f'<i class="h{level}"></i>' for level in range(0, 13, 2)),
        table=_table(comparison),
        footer=_footer(comparison),
    )


def _lead(c: Comparison) -> str:
    if c.mode != "sparse":
        return f"{escape(c.base)} read all {c.prompt_tokens:,} tokens."
    return (
        f"<b>{escape(c.speculator)}</b> read the whole prompt and marked what matters. <b>{escape(c.base)}</b> then "
        f"read {c.kept_tokens:,} of {c.prompt_tokens:,} tokens ({c.kept_share:.0%}), at their original positions."
    )


def _bars(c: Comparison) -> str:
    longest = max(c.full.ttft, c.sparse.ttft)

    def row(label: str, measured: Measured, css: str) -> str:
        segments = "".join(
            f'<span class="seg {stage}" style="flex-grow:{measured.seconds[stage]:.5f}" '
            f'title="{escape(STAGES[stage])}: {measured.seconds[stage]:.2f} s"></span>'
            for stage in _COLOURED
            if measured.seconds.get(stage, 0) > 0
        )
        return (
            f'<div class="row {css}"><span class="name">{label}</span><span class="track">'
            f'<span class="bar" style="width:{100 * measured.ttft / longest:.2f}%">{segments}</span></span>'
            f'<span class="value">{measured.ttft:.1f}<small> s</small></span></div>'
        )

    keys = "".join(
        f'<span class="key"><i class="seg {stage}"></i>{escape(STAGES[stage])}</span>'
        for stage in _COLOURED
        if max(c.full.seconds.get(stage, 0), c.sparse.seconds.get(stage, 0)) >= 0.002 * longest
    )
    return (
        row("Full prefill", c.full, "full")
        + row("Speculative prefill", c.sparse, "sparse")
        + f'<p class="keys">{keys}</p>'
    )


def _fact(c: Comparison) -> str:
    if c.inserted is None:
        return ""
    kept = {True: "It was kept whole.", False: "It was not kept whole.", None: ""}[c.fact_kept]
    return (
        '<p class="fact">This sentence was put into the document for the demo, deep inside, where it is outlined '
        "below: "
        f"<q>{escape(c.inserted)}</q> Nothing else was changed. {kept}</p>"
    )


def _answer(label: str, measured: Measured, c: Comparison) -> str:
    badge = {True: '<b class="badge yes">✓ right</b>', False: '<b class="badge no">✗ wrong</b>', None: ""}[
        measured.right
    ]
    return (
        f'<figure class="answer"><figcaption>{label} · read {measured.tokens_read:,} tokens {badge}</figcaption>'
        f"<blockquote>{escape(measured.answer.strip()) or '<em>(empty)</em>'}</blockquote></figure>"
    )


def _chunks(c: Comparison) -> list[tuple[int, list[Piece]]]:
    chunks: dict[int, list[Piece]] = {}
    for piece in c.pieces:
        chunks.setdefault(piece.position // c.chunk_size, []).append(piece)
    return sorted(chunks.items())


def _map(c: Comparison) -> str:
    """The prompt from left to right, one bar per chunk: mean importance, kept ones coloured."""
    chunks = _chunks(c)
    means = [sum(piece.importance for piece in pieces) / len(pieces) for _, pieces in chunks]
    ranked = sorted(means)
    top = ranked[int(0.97 * (len(ranked) - 1))] or 1.0
    bars = []
    for place, ((number, pieces), mean) in enumerate(zip(chunks, means)):
        height = max(3.0, 100 * min(1.0, (mean / top) ** 0.5))
        kind = "kept" if any(piece.kept for piece in pieces) else "dropped"
        bars.append(
            f'<a href="#c{number}" class="{kind}" style="height:{height:.1f}%" '
            f'title="chunk {place + 1} of {len(chunks)}, {kind}, mean importance {mean:.3g}"></a>'
        )
    needle = ""
    if c.inserted_span is not None:
        middle = 100 * sum(c.inserted_span) / 2 / c.prompt_tokens
        needle = f'<span class="needle" style="left:{middle:.2f}%">the answer lies here</span>'
    return f'<div class="map"><div class="mapbars">{"".join(bars)}</div>{needle}</div>'


def _document(c: Comparison, scale: float) -> str:
    out = []
    for number, pieces in _chunks(c):
        for kept, run in _runs(pieces):
            # The first run of a chunk carries the anchor; a chunk is one run unless a character straddles its edge.
            anchor = f' id="c{number}"' if run[0] is pieces[0] else ""
            body = "".join(_token(piece, scale, c.inserted_span) for piece in run)
            out.append(f'<span{anchor} class="chunk {"kept" if kept else "dropped"}">{body}</span>')
    return "".join(out)


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[bool, list[Piece]]]:
    run: list[Piece] = []
    for piece in pieces:
        if run and run[-1].kept != piece.kept:
            yield run[-1].kept, run
            run = []
        run.append(piece)
    if run:
        yield run[-1].kept, run


def _token(piece: Piece, scale: float, inserted: tuple[int, int] | None) -> str:
    level = shade(piece.importance, scale)
    fact = " f" if inserted is not None and inserted[0] <= piece.position < inserted[1] else ""
    return (
        f'<i class="h{level}{fact}" data-p="{piece.position}" data-s="{piece.importance:.3g}">{escape(piece.text)}</i>'
    )


def _table(c: Comparison) -> str:
    rows = []
    for stage, label in STAGES.items():
        full, sparse = c.full.seconds.get(stage), c.sparse.seconds.get(stage)
        if full is None and sparse is None:
            continue
        rows.append(f"<tr><td>{escape(label)}</td><td>{seconds_text(full)}</td><td>{seconds_text(sparse)}</td></tr>")
    rows.append(
        f'<tr class="sum"><td>time to first token</td><td>{seconds_text(c.full.ttft)}</td>'
        f"<td>{seconds_text(c.sparse.ttft)}</td></tr>"
    )
    if len(c.full.rounds) > 1:
        each = [", ".join(f"{value:.2f}" for value in measured.rounds) for measured in (c.full, c.sparse)]
        rows.append(
            f"<tr><td>median of {len(c.full.rounds)} rounds, in turns</td><td>{each[0]}</td><td>{each[1]}</td></tr>"
        )
    rows.append(
        f"<tr><td>prompt tokens the base model read</td><td>{c.full.tokens_read:,}</td>"
        f"<td>{c.sparse.tokens_read:,} ({c.kept_share:.0%})</td></tr>"
    )
    rows.append(f'<tr class="sum"><td>speed-up</td><td>1{TIMES}</td><td>{c.speedup:.2f}{TIMES}</td></tr>')
    return (
        "<table><thead><tr><th>seconds</th><th>full prefill</th><th>speculative prefill</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _footer(c: Comparison) -> str:
    facts = [
        ("Models", f"{c.base} (base), {c.speculator} (speculator)"),
        ("Kept", f"keep ratio {c.keep_ratio:g}, chunks of {c.chunk_size} tokens; {c.reason}"),
        ("Ops", f"{c.backend} backend, specprefill_kernels {c.version}"),
        ("Machine", c.machine),
        ("Command", c.command),
    ]
    return "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts if value)
