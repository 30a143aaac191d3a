"""specprefill generate: one answer, streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

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
    new_console,
    plain_errors,
    read_prompt_file,
    require_writable,
)


def generate(
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
    costs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="Read the whole prompt where marking it would cost more time than it saves, by measured costs: those "
            "in the file, if they are of these models and settings; else they are measured first (10 s) and saved.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    raw: Raw = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON, not the text as it comes.")] = False,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Answers a long prompt with any two models; the text streams to standard output, figures to standard error."""
    errors = new_console(stderr=True)
    with plain_errors():
        config = make_config(preset, keep_ratio, keep_tokens, keep_mass, settings)
        require_writable("--costs", costs)
        loop, tokenizer = make_loop(base, speculator, config, self_layers, device, threads, errors, costs)
        stream = loop.stream(
            read_prompt_file(prompt_file, question, raw, tokenizer), protect=protect, max_new_tokens=max_new_tokens
        )
        for piece in stream:
            if not as_json:
                print(piece, end="", flush=True)
        result = stream.result
        if as_json:
            values = {
                "text": result.text,
                "mode": result.mode,
                "reason": result.reason,
                "prompt_tokens": result.prompt_tokens,
                "kept_tokens": result.kept_tokens,
                "ttft": result.ttft,
                "seconds": dict(result.seconds),
                "backend": result.backend,
                "spans": [list(span) for span in result.spans],
            }
            print(json.dumps(values, ensure_ascii=False, indent=2))
            return
        print(flush=True)
        stages = ", ".join(f"{name} {value:.2f}" for name, value in result.seconds.items())
        errors.print(
            f"{result.mode}: read {result.kept_tokens:,} of {result.prompt_tokens:,} tokens ({result.reason}). "
            f"First token after {result.ttft:.2f} s ({stages}).",
            style="dim",
            markup=False,
        )
