"""The shareable page: one HTML file, no request to anywhere, every piece of foreign text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from specprefill_kernels.report import prompt
from specprefill_kernels.report.data import STAGES, TIMES, Comparison, Measured, Reading, seconds_text

_COLOURED = ("speculator_prefill", "look_ahead", "score", "select", "base_prefill")


def render(reading: Reading) -> str:
    """The whole page as text: a `Comparison` has times and answers on it, any other `Reading` the prompt alone."""
    files = resources.files(__package__)
    return Template((files / "page.html").read_text(encoding="utf-8")).substitute(
        css=(files / "page.css").read_text(encoding="utf-8"),
        js=(files / "page.js").read_text(encoding="utf-8"),
        verdict=escape(reading.verdict),
        title=escape(reading.title),
        lead=_lead(reading),
        race=_race(reading) if isinstance(reading, Comparison) else "",
        question=_question(reading),
        map=prompt.map_of_chunks(reading),
        layers=prompt.map_of_layers(reading),
        layercontrol=prompt.layer_control(reading),
        legend=prompt.legend(reading),
        spans=_count(len(reading.kept_spans), "kept span"),
        document=prompt.document(reading),
        facts=prompt.facts(reading),
        table=_table(reading) if isinstance(reading, Comparison) else _stages(reading),
        footer=_footer(reading),
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _lead(r: Reading) -> str:
    base, speculator = f"<b>{escape(r.base)}</b>", f"<b>{escape(r.speculator)}</b>"
    timed = isinstance(r, Comparison)
    if r.mode != "sparse":
        return f"{base} {'read' if timed else 'reads'} all {r.prompt_tokens:,} tokens."
    return (
        f"{speculator} read the whole prompt and marked what matters. {base} {'then read' if timed else 'would read'} "
        f"{r.kept_tokens:,} of {r.prompt_tokens:,} tokens ({r.kept_share:.0%}), at their original positions."
    )


def _race(c: Comparison) -> str:
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
        '<section class="card race" aria-label="Time to first token">\n<h2>Time to first token</h2>\n'
        + row("Full prefill", c.full, "full")
        + row("Speculative prefill", c.sparse, "sparse")
        + f'<p class="keys">{keys}</p>\n</section>\n'
    )


def _question(r: Reading) -> str:
    if not isinstance(r, Comparison) and not r.question:
        return ""
    answers = fact = ""
    if isinstance(r, Comparison):
        answers = (
            f'<div class="answers">{_answer("Full prefill", r.full)}{_answer("Speculative prefill", r.sparse)}</div>'
        )
        fact = _fact(r)
    return (
        '<section class="card" aria-label="Question and answers">\n<h2>The question</h2>\n'
        f'<p class="question">{escape(r.question)}</p>\n{answers}\n{fact}\n</section>\n'
    )


def _fact(c: Comparison) -> str:
    if c.inserted is None:
        return ""
    kept = {True: "It was kept whole.", False: "It was not kept whole.", None: ""}[c.evidence_kept]
    return (
        '<p class="fact">This sentence was put into the document for the demo, deep inside, where it is outlined '
        "below: "
        f"<q>{escape(c.inserted)}</q> Nothing else was changed. {kept}</p>"
    )


def _answer(label: str, measured: Measured) -> str:
    badge = {True: '<b class="badge yes">✓ right</b>', False: '<b class="badge no">✗ wrong</b>', None: ""}[
        measured.right
    ]
    return (
        f'<figure class="answer"><figcaption>{label} · read {measured.tokens_read:,} tokens {badge}</figcaption>'
        f"<blockquote>{escape(measured.answer.strip()) or '<em>(empty)</em>'}</blockquote></figure>"
    )


def _table(c: Comparison) -> str:
    rows: list[tuple[str, ...]] = []
    for stage, label in STAGES.items():
        full, sparse = c.full.seconds.get(stage), c.sparse.seconds.get(stage)
        if full is None and sparse is None:
            continue
        rows.append((label, seconds_text(full), seconds_text(sparse)))
    rows.append(("time to first token", seconds_text(c.full.ttft), seconds_text(c.sparse.ttft)))
    sums = {len(rows) - 1}
    if len(c.full.rounds) > 1:
        each = [", ".join(f"{value:.2f}" for value in measured.rounds) for measured in (c.full, c.sparse)]
        rows.append((f"mean of {len(c.full.rounds)} rounds, in turns", *each))
    rows.append(
        (
            "prompt tokens the base model read",
            f"{c.full.tokens_read:,}",
            f"{c.sparse.tokens_read:,} ({c.kept_share:.0%})",
        )
    )
    rows.append(("speed-up", f"1{TIMES}", f"{c.speedup:.2f}{TIMES}"))
    return _rows(("seconds", "full prefill", "speculative prefill"), rows, {*sums, len(rows) - 1})


def _stages(r: Reading) -> str:
    rows = [(label, seconds_text(r.seconds[stage])) for stage, label in STAGES.items() if stage in r.seconds]
    rows.append(("together", seconds_text(sum(r.seconds.values()))))
    rows.append(("prompt tokens", f"{r.prompt_tokens:,}"))
    rows.append(("tokens the base model reads", f"{r.kept_tokens:,} ({r.kept_share:.0%})"))
    return _rows(("to select", "seconds"), rows, {len(rows) - 3, len(rows) - 1})


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]], sums: set[int]) -> str:
    body = ""
    for number, row in enumerate(rows):
        css = ' class="sum"' if number in sums else ""
        body += f"<tr{css}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
    return f"<table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead><tbody>{body}</tbody></table>"


def _footer(r: Reading) -> str:
    kept = "; ".join(part for part in (r.budget, f"chunks of {r.chunk_size} tokens", r.reason) if part)
    facts = [
        ("Models", f"{r.base} (base), {r.speculator} (speculator)" if r.speculator else r.base),
        ("Kept", kept),
        ("Ops", f"{r.backend} backend, specprefill_kernels {r.version}"),
        ("Machine", r.machine),
        ("Command", r.command),
    ]
    return "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts if value)
