"""specprefill demo | generate | select | show-config."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from specprefill_kernels.config import SpecPrefillConfig
    from specprefill_kernels.demo.measure import Side
    from specprefill_kernels.loop import PromptSelection

BASE, SPECULATOR = "qwen2.5-coder-1.5b", "smollm2-135m"
DEMO_KEEP_RATIO = 0.1

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Speculative prefill: a small model marks what matters in a long prompt, the large one reads only that.",
)

# typer reads these annotations at run time, on Python 3.10 too: Optional, not a bar.
Model = Annotated[str, typer.Option(help="Registry name, local folder, .gguf file or hub id.")]
KeepRatio = Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction of the prompt's chunks to keep, in (0, 1].")]
Threads = Annotated[Optional[int], typer.Option(min=1, help="CPU threads; default: torch's.")]  # noqa: UP045
Device = Annotated[str, typer.Option(help="Where the models run: cpu, cuda, cuda:1, ...")]
OptionalText = Annotated[Optional[str], typer.Option()]  # noqa: UP045


def _console(**options: Any) -> Console:
    return Console(highlight=False, **options)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What the reader can put right is one line and exit status 1; anything else keeps its traceback."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        _console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        raise typer.Exit(1) from error


@app.command()
def demo(
    small: Annotated[
        bool, typer.Option(help="smollm2-135m on both sides (92 MB): shows the page, cannot gain.")
    ] = False,
    base: Model = BASE,
    speculator: Model = SPECULATOR,
    keep_ratio: KeepRatio = DEMO_KEEP_RATIO,
    document: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(exists=True, dir_okay=False, help="A text file, instead of the built-in document."),
    ] = None,
    question: Annotated[Optional[str], typer.Option(help="What to ask about it.")] = None,  # noqa: UP045
    expect: Annotated[Optional[str], typer.Option(help="Words that a right answer holds.")] = None,  # noqa: UP045
    output: Annotated[Path, typer.Option(help="Where the HTML page goes.")] = Path("specprefill-demo.html"),
    rounds: Annotated[int, typer.Option(min=1, help="How often each side is timed, in turns.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Answers a question about a long document with full and with speculative prefill: times, answers, and a page."""
    console, errors = _console(), _console(stderr=True)
    with _plain_errors():
        from specprefill_kernels.demo.document import default_story
        from specprefill_kernels.demo.measure import compare
        from specprefill_kernels.models import RichProgress
        from specprefill_kernels.report import page, terminal

        if document is not None and question is None:
            raise ValueError("--question: expected one beside --document, got none")
        config = _config(keep_ratio=keep_ratio)
        story = default_story()
        if question is not None:
            story = replace(story, question=question, expected=expect)
        if document is not None:
            text = document.read_text(encoding="utf-8", errors="replace")
            story = replace(story, title=document.name, document=text, inserted=None)
        _set_threads(threads)
        if small:
            base = speculator = SPECULATOR
            console.print("--small: one model on both sides. It shows what is kept; equal models cannot gain time.")
        progress = RichProgress(errors)
        base_side, spec_side = _load_pair(base, speculator, device, progress)
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
        console.print(f"[dim]{comparison.title}: {comparison.prompt_tokens:,} tokens. {comparison.machine}[/dim]")
        terminal.show(comparison, console)
        console.print(f"The document, token by token: {output.resolve().as_uri()}", soft_wrap=True)


@app.command()
def generate(
    prompt_file: Annotated[Path, typer.Option(help="A text file; - reads standard input.")],
    base: Model = BASE,
    speculator: Model = SPECULATOR,
    question: Annotated[Optional[str], typer.Option(help="Asked after the text.")] = None,  # noqa: UP045
    keep_ratio: KeepRatio = 0.2,
    preset: Annotated[str, typer.Option(help="paper, pflash or llama_cpp.")] = "paper",
    self_layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FIRST:LAST", help="Score with these layers of the base instead of a speculator."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    raw: Annotated[bool, typer.Option(help="No chat template: the model continues the text.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON, not the text as it comes.")] = False,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Answers a long prompt with any two models; the text streams to standard output, figures to standard error."""
    errors = _console(stderr=True)
    with _plain_errors():
        config = _config(preset, keep_ratio=keep_ratio)
        loop, tokenizer = _loop(base, speculator, config, self_layers, device, threads, errors)
        stream = loop.stream(_prompt(prompt_file, question, raw, tokenizer), max_new_tokens=max_new_tokens)
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


@app.command()
def select(
    prompt_file: Annotated[Path, typer.Option(help="A text file; - reads standard input.")],
    base: Model = BASE,
    speculator: Model = SPECULATOR,
    question: Annotated[Optional[str], typer.Option(help="Asked after the text.")] = None,  # noqa: UP045
    keep_ratio: KeepRatio = 0.2,
    preset: Annotated[str, typer.Option(help="paper, pflash or llama_cpp.")] = "paper",
    self_layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FIRST:LAST", help="Score with these layers of the base instead of a speculator."),
    ] = None,
    output: Annotated[Optional[Path], typer.Option(help="Save as JSON, importance included.")] = None,  # noqa: UP045
    raw: Annotated[bool, typer.Option(help="No chat template.")] = False,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Says what the base model would read, without running it."""
    console, errors = _console(), _console(stderr=True)
    with _plain_errors():
        from specprefill_kernels.demo.measure import prompt_offsets

        config = _config(preset, keep_ratio=keep_ratio)
        loop, tokenizer = _loop(base, speculator, config, self_layers, device, threads, errors)
        prompt = _prompt(prompt_file, question, raw, tokenizer)
        selection = loop.select(prompt)
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
            console.print(f"{_summary(selection)} Saved to {output}.", markup=False, soft_wrap=True)
            return
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("tokens", justify="right", no_wrap=True)
        table.add_column("kept text")
        for span in spans:
            table.add_row(f"{span['start']}-{span['end']}", Text(str(span["text"]).strip("\n")))
        console.print(table)
        console.print(_summary(selection), style="bold", markup=False)


@app.command()
def show_config() -> None:
    """Versions, machine, models and op x backend, with the reason where something is missing."""
    from specprefill_kernels._diagnosis import config_rows

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in config_rows():
        table.add_row(name, Text(value, "red" if value.startswith("failed") else ""))
    _console().print(table)


def _summary(selection: PromptSelection) -> str:
    return (
        f"{selection.mode}: {selection.kept_tokens:,} of {selection.prompt_tokens:,} tokens kept in "
        f"{len(selection.spans)} spans ({selection.reason})."
    )


def _config(preset: str = "paper", **changes: Any) -> SpecPrefillConfig:
    from specprefill_kernels.config import SpecPrefillConfig

    return SpecPrefillConfig.preset(preset, **changes)


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _load_pair(base: str, speculator: str, device: str, progress: Any) -> tuple[Side, Side]:
    from specprefill_kernels import models
    from specprefill_kernels.demo.measure import Side

    for name in (base, speculator):  # a misspelt name is found before anything is fetched
        models.check_name(name)

    def side(name: str) -> Side:
        models.ensure(name, progress)
        entry = models.REGISTRY.get(name)
        title = entry.title if entry else Path(name).name
        with progress.task(f"Loading {title}"):
            model, tokenizer = models.load(name, device=device, progress=progress)
        return Side(title, model, tokenizer)

    speculator_side = side(speculator)
    return (speculator_side if base == speculator else side(base)), speculator_side


def _loop(
    base: str,
    speculator: str,
    config: SpecPrefillConfig,
    self_layers: str | None,
    device: str,
    threads: int | None,
    errors: Console,
) -> tuple[Any, Any]:
    from specprefill_kernels.loop import SpecPrefill
    from specprefill_kernels.models import RichProgress

    layers = _layers(self_layers)
    _set_threads(threads)
    progress = RichProgress(errors)
    if layers is not None:
        side, _ = _load_pair(base, base, device, progress)
        return SpecPrefill(side.model, None, config, tokenizer=side.tokenizer, self_layers=layers), side.tokenizer
    one, other = _load_pair(base, speculator, device, progress)
    loop = SpecPrefill(one.model, other.model, config, tokenizer=one.tokenizer, speculator_tokenizer=other.tokenizer)
    return loop, one.tokenizer


def _layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"--self-layers: expected FIRST:LAST, for example 0:7, got {text!r}")
    return int(first), int(last)


def _prompt(file: Path, question: str | None, raw: bool, tokenizer: Any) -> Any:
    from specprefill_kernels.demo.document import Story
    from specprefill_kernels.demo.measure import as_prompt

    if str(file) == "-":
        text = sys.stdin.read()
    elif file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
    else:
        raise ValueError(f"--prompt-file: expected a text file or -, got {str(file)!r}")
    if question is not None:
        text = Story(title="", document=text, question=question).prompt
    if not text.strip():
        raise ValueError("--prompt-file: expected text, got an empty file")
    return text if raw else as_prompt(text, tokenizer)
