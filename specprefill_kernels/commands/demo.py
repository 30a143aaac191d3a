"""specprefill demo: full against speculative prefill on one document, with a page to look at."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from specprefill_kernels.commands.shared import (
    BASE,
    SPECULATOR,
    Device,
    KeepRatio,
    Model,
    Preset,
    Settings,
    Threads,
    load_pair,
    make_config,
    new_console,
    plain_errors,
    require_writable,
    set_threads,
)

DEMO_KEEP_RATIO = 0.1


def demo(
    small: Annotated[
        bool, typer.Option(help="smollm2-135m on both sides (98 MB): shows the page, cannot gain.")
    ] = False,
    base: Model = BASE,
    speculator: Model = SPECULATOR,
    keep_ratio: KeepRatio = DEMO_KEEP_RATIO,
    preset: Preset = "default",
    settings: Settings = None,
    document: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(exists=True, dir_okay=False, help="A text file, instead of the built-in document."),
    ] = None,
    question: Annotated[Optional[str], typer.Option(help="What to ask about it.")] = None,  # noqa: UP045
    expect: Annotated[Optional[str], typer.Option(help="Words that a right answer holds.")] = None,  # noqa: UP045
    output: Annotated[Path, typer.Option(help="Where the HTML page goes.")] = Path("specprefill-demo.html"),
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.png", help="Also save a picture of importance over position; needs matplotlib."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side is timed, in turns.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Answers a question about a long document with full and with speculative prefill: times, answers, and a page."""
    console, errors = new_console(), new_console(stderr=True)
    with plain_errors():
        from specprefill_kernels.demo.document import default_story
        from specprefill_kernels.demo.measure import compare
        from specprefill_kernels.models import RichProgress
        from specprefill_kernels.report import page, terminal
        from specprefill_kernels.report import picture as pictures

        if document is not None and question is None:
            raise ValueError("--question: expected one beside --document, got none")
        require_writable("--output", output, makes_folders=True)
        require_writable("--picture", picture)
        if picture is not None:
            pictures.require()
        config = make_config(preset, keep_ratio, settings=settings)
        story = default_story()
        if question is not None:
            story = replace(story, question=question, expected=expect)
        if document is not None:
            text = document.read_text(encoding="utf-8", errors="replace")
            story = replace(story, title=document.name, document=text, inserted=None)
        set_threads(threads)
        if small:
            base = speculator = SPECULATOR
            console.print("--small: one model on both sides. It shows what is kept; equal models cannot gain time.")
        progress = RichProgress(errors)
        base_side, spec_side = load_pair(base, speculator, device, progress)
        comparison = compare(
            base_side,
            spec_side,
            story,
            config,
            progress,
            rounds=rounds,
            max_new_tokens=max_new_tokens,
            command=" ".join(["specprefill", *sys.argv[1:]]) if sys.argv[1:2] == ["demo"] else "specprefill demo",
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page.render(comparison), encoding="utf-8")
        if picture is not None:
            pictures.save(comparison, picture)
        console.print(f"[dim]{comparison.title}: {comparison.prompt_tokens:,} tokens. {comparison.machine}[/dim]")
        terminal.show(comparison, console)
        console.print(f"The document, token by token: {output.resolve().as_uri()}", soft_wrap=True)
