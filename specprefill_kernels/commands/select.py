"""specprefill select: what the base would read, without running it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.table import Table
from rich.text import Text

from specprefill_kernels.commands.shared import (
    BASE,
    SPECULATOR,
    Device,
    KeepMass,
    KeepRatio,
    KeepTokens,
    Model,
    Preset,
    PromptFile,
    Protect,
    Question,
    Raw,
    SelfLayers,
    Settings,
    Threads,
    make_config,
    make_loop,
    model_title,
    new_console,
    plain_errors,
    read_prompt_file,
    require_writable,
)

if TYPE_CHECKING:
    from specprefill_kernels.loop import PromptSelection


def select(
    prompt_file: PromptFile,
    base: Model = BASE,
    speculator: Model = SPECULATOR,
    question: Question = None,
    keep_ratio: KeepRatio = None,
    keep_tokens: KeepTokens = None,
    keep_mass: KeepMass = None,
    preset: Preset = "default",
    settings: Settings = None,
    protect: Protect = None,
    self_layers: SelfLayers = None,
    output: Annotated[Optional[Path], typer.Option(help="Save as JSON, importance included.")] = None,  # noqa: UP045
    page: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.html", help="Save an HTML page of the prompt, token by token and layer by layer."),
    ] = None,
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.png", help="Save a picture of importance over position; needs matplotlib."),
    ] = None,
    raw: Raw = False,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Says what the base model would read, without running it."""
    console, errors = new_console(), new_console(stderr=True)
    with plain_errors():
        from specprefill_kernels.demo.measure import machine
        from specprefill_kernels.demo.reading import prompt_offsets, read
        from specprefill_kernels.report import page as pages
        from specprefill_kernels.report import picture as pictures

        for option, file in (("--output", output), ("--page", page), ("--picture", picture)):
            require_writable(option, file)
        if picture is not None:
            pictures.require()
        config = make_config(preset, keep_ratio, keep_tokens, keep_mass, settings)
        loop, tokenizer = make_loop(base, speculator, config, self_layers, device, threads, errors)
        prompt = read_prompt_file(prompt_file, question, raw, tokenizer)
        selection = loop.select(prompt, protect, per_layer=page is not None or picture is not None)
        text, offsets = prompt_offsets(prompt, tokenizer)
        spans = [
            {"start": a, "end": b, "characters": [offsets[a][0], offsets[b - 1][1]],
             "text": text[offsets[a][0] : offsets[b - 1][1]]}
            for a, b in selection.spans
        ]  # fmt: skip
        if output is not None:
            importance = None if selection.importance is None else selection.importance.tolist()
            values = {
                "mode": selection.mode,
                "reason": selection.reason,
                "prompt_tokens": selection.prompt_tokens,
                "kept_tokens": selection.kept_tokens,
                "backend": selection.backend,
                "seconds": dict(selection.seconds),
                "spans": spans,
                "importance": importance,
            }
            output.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if page is not None or picture is not None:
            reading = read(
                selection,
                prompt,
                tokenizer,
                config,
                title="Standard input" if str(prompt_file) == "-" else prompt_file.name,
                base=model_title(base),
                speculator=model_title(speculator) if self_layers is None else f"its own layers {self_layers}",
                question=question or "",
                machine=machine(),
                command=" ".join(["specprefill", *sys.argv[1:]])
                if sys.argv[1:2] == ["select"]
                else "specprefill select",
            )
        if page is not None:
            page.write_text(pages.render(reading), encoding="utf-8")
        if picture is not None:
            pictures.save(reading, picture)
        saved = [file for file in (output, page, picture) if file is not None]
        if saved:
            names = " and ".join(str(file) for file in saved)
            console.print(f"{_summary(selection)} Saved to {names}.", markup=False, soft_wrap=True)
            return
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("tokens", justify="right", no_wrap=True)
        table.add_column("kept text")
        for span in spans:
            table.add_row(f"{span['start']}-{span['end']}", Text(str(span["text"]).strip("\n")))
        console.print(table)
        console.print(_summary(selection), style="bold", markup=False)


def _summary(selection: PromptSelection) -> str:
    return (
        f"{selection.mode}: {selection.kept_tokens:,} of {selection.prompt_tokens:,} tokens kept in "
        f"{len(selection.spans)} spans ({selection.reason})."
    )
