"""The comparison as a table in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from specprefill_kernels.report.data import STAGES, TIMES, Comparison, Measured, seconds_text

_TEAL = "#2bb3a4"


def show(comparison: Comparison, console: Console) -> None:
    console.print()
    console.print(_figures(comparison))
    console.print(_answers(comparison))
    console.print(Text(comparison.verdict, style=f"bold {_TEAL}" if comparison.speedup >= 1.05 else "bold"))


def _figures(c: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=None, pad_edge=False, header_style="dim")
    table.add_column("seconds")
    table.add_column("full prefill", justify="right")
    table.add_column("speculative prefill", justify="right")
    for stage, label in STAGES.items():
        full, sparse = c.full.seconds.get(stage), c.sparse.seconds.get(stage)
        if full is not None or sparse is not None:
            table.add_row(label, seconds_text(full), seconds_text(sparse))
    table.add_section()
    table.add_row(
        Text("time to first token", "bold"),
        Text(f"{c.full.ttft:.2f}", "bold"),
        Text(f"{c.sparse.ttft:.2f}", f"bold {_TEAL}"),
    )
    table.add_row("speed-up", f"1{TIMES}", Text(f"{c.speedup:.2f}{TIMES}", f"bold {_TEAL}"))
    table.add_row("prompt tokens read", f"{c.full.tokens_read:,}", f"{c.sparse.tokens_read:,} ({c.kept_share:.0%})")
    if len(c.full.rounds) > 1:
        each = [" ".join(f"{value:.2f}" for value in side.rounds) for side in (c.full, c.sparse)]
        table.add_row(Text(f"mean of {len(c.full.rounds)} rounds", "dim"), *(Text(value, "dim") for value in each))
    return table


def _answers(c: Comparison) -> RenderableType:
    lines: list[Text] = [Text.assemble(("Q  ", "dim"), (c.question, "bold"))]
    for label, side in (("full prefill       ", c.full), ("speculative prefill", c.sparse)):
        lines.append(Text.assemble((f"{label}  ", "dim"), side.answer.strip() or "(empty)", "  ", _mark(side)))
    if c.inserted is not None:
        kept = {True: "kept whole", False: "not kept whole", None: ""}[c.evidence_kept]
        lines.append(Text.assemble(("put into the document for this demo: ", "dim"), (c.inserted, "italic dim"),
                                   (f" ({kept})", "dim")))  # fmt: skip
    return Panel(Group(*lines), box=box.ROUNDED, border_style="dim", padding=(0, 1))


def _mark(side: Measured) -> Text:
    if side.right is None:
        return Text("")
    return Text("✓ right", "bold green") if side.right else Text("✗ wrong", "bold red")
