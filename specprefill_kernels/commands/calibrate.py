"""specprefill calibrate: which layers of a speculator to score."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.table import Table

from specprefill_kernels.commands.shared import (
    SPECULATOR,
    Device,
    Model,
    Preset,
    Settings,
    Threads,
    new_console,
    plain_errors,
    require_writable,
    set_threads,
    settings_for_several_budgets,
)

if TYPE_CHECKING:
    from rich.console import Console

    from specprefill_kernels.quality.calibrate import Calibration


def calibrate(
    speculator: Model = SPECULATOR,
    output: Annotated[Path, typer.Option(help="The result, as JSON.")] = Path("specprefill-calibration.json"),
    prompts: Annotated[int, typer.Option(min=4, help="Prompts in all, spread over the tasks.")] = 24,
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of a prompt.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="The first seed of each task.")] = 0,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,NAME", help="Default: retrieval, variable tracking and question answering."),
    ] = None,
    keep_ratio: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(help="May be repeated; default: 0.1, 0.2 and 0.3."),
    ] = None,
    preset: Preset = "default",
    settings: Settings = None,
    source: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(exists=True, dir_okay=False, help="Fill prompts from this text file; may be repeated."),
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Finds the layers of a speculator that keep what a question needs. Interrupted, it goes on next time."""
    console, errors = new_console(), new_console(stderr=True)
    with plain_errors():
        from specprefill_kernels import SpecPrefillConfig, models
        from specprefill_kernels.models import RichProgress
        from specprefill_kernels.quality import calibrate as room

        models.check_name(speculator)
        names = room.CALIBRATION_TASKS if tasks is None else tuple(name.strip() for name in tasks.split(","))
        require_writable("--output", output, makes_folders=True)
        config = SpecPrefillConfig.preset(preset).replace(**settings_for_several_budgets(settings))
        set_threads(threads)
        progress = RichProgress(errors)
        with progress.task(f"Loading {speculator}"):
            model, tokenizer = models.load(speculator, device=device, progress=progress)
        parts = output.with_suffix(".parts")
        with _bar(errors) as on_prompt:
            result = room.calibrate(
                model,
                tokenizer,
                config,
                name=Path(speculator).name,
                tasks=names,
                seeds=tuple(range(seed, seed + -(-prompts // len(names)))),
                tokens=tokens,
                keep_ratios=tuple(keep_ratio or room.KEEP_RATIOS),
                sources=source,
                parts=parts,
                on_prompt=on_prompt,
            )
        result.save(output)
        shutil.rmtree(parts)
        _show(result, console)
        console.print(f"Saved to {output}.", markup=False, soft_wrap=True)


def _show(result: Calibration, console: Console) -> None:
    single = sorted(result.single, key=lambda figures: (-figures.score, figures.layers))
    ratios = list(result.single[0].evidence)
    table = Table(
        box=None, pad_edge=False, header_style="dim", title="Evidence kept, at keep ratios", title_style="dim"
    )
    table.add_column("layers")
    for ratio in ratios:
        table.add_column(ratio, justify="right")
    table.add_column("score", justify="right")
    rows = [("all", result.choices["all"]), (f"chosen ({result.chosen})", result.choices[result.chosen])]
    rows += [(f"layer {figures.layers[0]}", figures) for figures in [*single[:5], single[-1]]]
    for name, figures in rows:
        table.add_row(name, *(f"{figures.evidence[ratio]:.2f}" for ratio in ratios), f"{figures.score:.3f}")
    console.print(table)
    unseen = result.unseen
    gain = unseen["difference"]
    console.print(
        f"On prompts that had no part in the choice: {unseen['chosen']:.3f} against {unseen['all']:.3f} of all layers "
        f"({gain['estimate']:+.3f}, 95% {gain['low']:+.3f} to {gain['high']:+.3f}, {unseen['prompts']} prompts).",
        soft_wrap=True,
    )
    if result.score_layers is None:
        console.print("No set of layers is clearly better than all: leave score_layers as it is.", style="bold")
        return
    if gain["low"] <= 0:
        console.print("So few prompts do not prove the gain: more of them, with --prompts, would tell.", style="dim")
    layers = ",".join(map(str, result.score_layers)) + ("," if len(result.score_layers) == 1 else "")
    console.print(f'Use it: --set "score_layers=({layers})"', style="bold", markup=False, soft_wrap=True)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left. Without a terminal a line every few prompts."""
    from rich import progress

    if not console.is_terminal:

        def say(done: int, total: int) -> None:
            if done % 4 == 0 or done == total:
                console.print(f"{done} of {total} prompts read")

        yield say
        return
    columns: tuple[Any, ...] = (
        progress.SpinnerColumn(finished_text="[green]✓"),
        progress.TextColumn("Reading prompts"),
        progress.BarColumn(bar_width=28),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("so far,"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
    )
    with progress.Progress(*columns, console=console) as bar:
        handle = bar.add_task("", total=None)
        yield lambda done, total: bar.update(handle, completed=done, total=total)
