"""What the commands share: options, consoles, one-line errors, and how models, prompts and configurations come in."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from specprefill_kernels.config import SpecPrefillConfig
    from specprefill_kernels.demo.measure import Side

BASE, SPECULATOR = "qwen2.5-coder-1.5b", "smollm2-135m"

# typer reads these annotations at run time, on Python 3.10 too: Optional, not a bar.
Model = Annotated[str, typer.Option(help="Registry name, local folder, .gguf file or hub id.")]
KeepRatio = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(min=0.0, max=1.0, help="Fraction of the prompt's chunks to keep, in (0, 1]; default: the preset's."),
]
KeepTokens = Annotated[Optional[int], typer.Option(min=1, help="Tokens to keep, instead of a ratio.")]  # noqa: UP045
KeepMass = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(min=0.0, max=1.0, help="Keep the fewest chunks that hold this share of the importance."),
]
Preset = Annotated[str, typer.Option(help="default, paper, pflash or llama_cpp.")]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="FIELD=VALUE", help="Any field of SpecPrefillConfig; may be repeated."),
]
Protect = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(metavar="TEXT", help="A passage of the prompt that must survive; may be repeated."),
]
SelfLayers = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="FIRST:LAST", help="Score with these layers of the base instead of a speculator."),
]
PromptFile = Annotated[Path, typer.Option(help="A text file; - reads standard input.")]
Question = Annotated[Optional[str], typer.Option(help="Asked after the text.")]  # noqa: UP045
Raw = Annotated[bool, typer.Option(help="No chat template: the model continues the text.")]
Threads = Annotated[Optional[int], typer.Option(min=1, help="CPU threads; default: torch's.")]  # noqa: UP045
Device = Annotated[str, typer.Option(help="Where the models run: cpu, cuda, cuda:1, ...")]


def new_console(**options: Any) -> Console:
    return Console(highlight=False, **options)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What the reader can put right is one line and exit status 1; anything else keeps its traceback."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        new_console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        raise typer.Exit(1) from error


def make_config(
    preset: str = "default",
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    keep_mass: float | None = None,
    settings: Sequence[str] | None = None,
) -> SpecPrefillConfig:
    """A preset, with at most one budget instead of its own and any field on top."""
    from specprefill_kernels.config import SpecPrefillConfig

    budgets = {"keep_ratio": keep_ratio, "keep_tokens": keep_tokens, "keep_mass": keep_mass}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) > 1:
        options = " and ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{options}: expected one budget, got {len(given)}")
    changes: dict[str, Any] = {}
    if given:
        changes = {"keep_ratio": None, **given}
    return SpecPrefillConfig.preset(preset, **changes).replace(**parse_settings(settings))


def parse_settings(settings: Sequence[str] | None) -> dict[str, Any]:
    """{"chunk_size": 16} from ["chunk_size=16"]. What is no Python literal is a word: "queries=both"."""
    values: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set: expected FIELD=VALUE, for example chunk_size=16, got {setting!r}")
        try:
            values[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            values[name.strip()] = text.strip()
    return values


def settings_for_several_budgets(settings: Sequence[str] | None) -> dict[str, Any]:
    """`parse_settings` for a command that tries the budgets of its own --keep-ratio."""
    for setting in settings or ():
        if setting.strip().startswith("keep_"):
            raise ValueError(f"--set: expected --keep-ratio for the budgets to compare, got {setting!r}")
    return parse_settings(settings)


def require_writable(option: str, file: Path | None, *, makes_folders: bool = False) -> None:
    """Refuse, before the long work, a file that could not be written after it.

    Args:
        makes_folders: the command makes the folders that are missing.
    """
    if file is None:
        return
    folder, got = file.absolute().parent, None
    while makes_folders and not folder.exists():
        folder = folder.parent
    if file.is_dir():
        got = "a folder"
    elif file.exists():
        got = None if os.access(file, os.W_OK) else "one that must not be written"
    elif not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        got = f"{got}: {folder}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        got = f"a folder that must not be written: {folder}"
    if got is not None:
        raise ValueError(f"{option}: expected a file that can be written, got {str(file)!r}, {got}")


def set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def model_title(name: str) -> str:
    """What a reader calls a model that goes by a registry name, folder, file or hub id."""
    from specprefill_kernels import models

    entry = models.REGISTRY.get(name)
    return entry.title if entry else Path(name).name


def load_pair(base: str, speculator: str, device: str, progress: Any) -> tuple[Side, Side]:
    from specprefill_kernels import models
    from specprefill_kernels.demo.measure import Side

    for name in (base, speculator):  # a misspelt name is found before anything is fetched
        models.check_name(name)

    def side(name: str) -> Side:
        models.ensure(name, progress)
        title = model_title(name)
        with progress.task(f"Loading {title}"):
            model, tokenizer = models.load(name, device=device, progress=progress)
        return Side(title, model, tokenizer)

    speculator_side = side(speculator)
    return (speculator_side if base == speculator else side(base)), speculator_side


def make_loop(
    base: str,
    speculator: str,
    config: SpecPrefillConfig,
    self_layers: str | None,
    device: str,
    threads: int | None,
    errors: Console,
    costs: Path | None = None,
) -> tuple[Any, Any]:
    """(the loop, the base's tokenizer). Costs come from the file `costs`, or are measured and saved there."""
    from specprefill_kernels.commands.costs import load_or_measure
    from specprefill_kernels.loop import SpecPrefill
    from specprefill_kernels.models import RichProgress

    layers = parse_layers(self_layers)
    set_threads(threads)
    progress = RichProgress(errors)
    one, other = load_pair(base, base if layers is not None else speculator, device, progress)
    options: dict[str, Any] = {"tokenizer": one.tokenizer}
    if layers is None:
        options["speculator_tokenizer"] = other.tokenizer
    else:
        options["self_layers"] = layers
    scorer = other.model if layers is None else None
    measured = None if costs is None else load_or_measure(costs, one.model, scorer, config, progress, **options)
    return SpecPrefill(one.model, scorer, config, costs=measured, **options), one.tokenizer


def parse_layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"--self-layers: expected FIRST:LAST, for example 0:7, got {text!r}")
    return int(first), int(last)


def read_prompt_file(file: Path, question: str | None, raw: bool, tokenizer: Any) -> Any:
    from specprefill_kernels.demo.document import Story
    from specprefill_kernels.demo.reading import as_prompt

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
