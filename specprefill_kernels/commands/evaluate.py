"""specprefill eval: how good answers stay, against the full prompt and against baselines at equal kept tokens."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from specprefill_kernels.commands.shared import (
    SPECULATOR,
    Device,
    Model,
    Preset,
    SelfLayers,
    Settings,
    Threads,
    load_pair,
    new_console,
    parse_layers,
    plain_errors,
    require_writable,
    set_threads,
    settings_for_several_budgets,
)

if TYPE_CHECKING:
    from specprefill_kernels.quality.records import Record
    from specprefill_kernels.quality.runner import Planned
    from specprefill_kernels.quality.summary import Row, Summary

# What a model of 135M parameters answers surely from the full prompt. Where it guesses, as with four needles that
# differ in their keys (0.73 from the full prompt), the noise of so few prompts is as large as the loss to be ruled out.
SHORT_TASKS = ("niah_single",)
SHORT_METHODS = ("full", "kept", "random")
SHORT_RATIO = 0.3
# Three lost answers of 36 can be told from a large loss: room for machines that round otherwise.
SHORT_PROMPTS = 36
# From kept tokens some answers begin with a few words more, and would be cut in the middle of a right one.
ANSWER_TOKENS = 24
PROMPTS, TOKENS = 20, 1024


def evaluate(
    base: Model = SPECULATOR,
    speculator: Model = SPECULATOR,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,NAME", help="Default: all generated tasks, or none beside --longbench."),
    ] = None,
    prompts: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help=f"Prompts for each task; default: {PROMPTS}."),
    ] = None,
    tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help=f"Tokens of a generated prompt; default: {TOKENS}."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first prompt's; the next ones count on.")] = 0,
    keep_ratio: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(help="May be repeated; default: 0.1, 0.2, 0.3 and 0.5."),
    ] = None,
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,NAME", help="Default: full,kept,random,last,first_last."),
    ] = None,
    answer_tokens: Annotated[
        int,
        typer.Option(min=1, help="Room for an answer to a generated prompt, where its task asks for less."),
    ] = ANSWER_TOKENS,
    preset: Preset = "default",
    settings: Settings = None,
    self_layers: SelfLayers = None,
    source: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(exists=True, dir_okay=False, help="Fill generated prompts from this text file; may be repeated."),
    ] = None,
    longbench: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(exists=True, dir_okay=False, help="A LongBench JSONL file; may be repeated."),
    ] = None,
    longbench_prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(exists=True, dir_okay=False, help="LongBench's own dataset2prompt.json, instead of our wording."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of records, tables and plot.")] = Path("specprefill-eval"),
    resume: Annotated[bool, typer.Option(help="Go on with the records in the folder, or discard them.")] = True,
    minutes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, help="Begin no prompt after so long; a later call goes on."),
    ] = None,
    short: Annotated[
        bool,
        typer.Option(help="Retrieval at keep ratio 0.3, some minutes on two cores; fails where quality is lost."),
    ] = False,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Scores answers from kept tokens against the full prompt and against as many random, last or outer tokens."""
    console, errors = new_console(), new_console(stderr=True)
    with plain_errors():
        from specprefill_kernels.config import SpecPrefillConfig
        from specprefill_kernels.demo.measure import machine
        from specprefill_kernels.quality import claims, runner
        from specprefill_kernels.quality.methods import METHODS
        from specprefill_kernels.quality.records import RecordFile
        from specprefill_kernels.quality.summary import summarize

        require_writable("--output", output / "records.jsonl", makes_folders=True)
        config = SpecPrefillConfig.preset(preset).replace(**settings_for_several_budgets(settings))
        count = prompts or (SHORT_PROMPTS if short else PROMPTS)
        length = tokens or TOKENS
        names = _names(
            "--tasks", tasks, _known_tasks(), SHORT_TASKS if short else None if longbench else _known_tasks()
        )
        ratios = tuple(keep_ratio or ((SHORT_RATIO,) if short else runner.KEEP_RATIOS))
        wanted = _names("--methods", methods, METHODS, SHORT_METHODS if short else METHODS)
        if short and set(METHODS[:3]) - set(wanted):
            raise ValueError(f"--short: expected the methods {', '.join(METHODS[:3])} among --methods, got {methods}")
        set_threads(threads)
        loop, room = _load(base, speculator, config, self_layers, device, errors)
        if names and room is not None and length > room:
            raise ValueError(f"--tokens: expected at most {room}, what both models have room for, got {length}")
        running = runner.Runner(loop, ratios, wanted)
        plan = _plan(names, range(seed, seed + count), length, answer_tokens, source, loop.tokenizer)
        plan += _longbench_plan(longbench or (), longbench_prompts, count, loop, room)
        setting = runner.describe(
            running,
            base=_shown(base),
            speculator=None if self_layers is not None else _shown(speculator),
            self_layers=self_layers,
            tasks=list(dict.fromkeys(planned.task for planned in plan)),
            seeds=(seed, seed + count),
            tokens=length,
            answer_tokens=answer_tokens,
            files=[*(source or ()), *(longbench or ()), *([longbench_prompts] if longbench_prompts else ())],
            versions=_versions(),
            machine=machine(),
        )
        with RecordFile(output / "records.jsonl", setting, resume=resume) as file:
            if file.dropped_line:
                errors.print("The last record was cut off; its prompt is answered again.", style="dim")
            keys = [key for planned in plan for key in running.keys(planned.task, planned.seed)]
            done = sum(key in file.done for key in keys)
            if done:
                errors.print(f"{done:,} of {len(keys):,} answers are there already.", style="dim")
            try:
                with _progress(errors, len(keys), done) as on_record:
                    finished = runner.evaluate(
                        running,
                        plan,
                        file,
                        on_record=on_record,
                        seconds=None if minutes is None else 60 * minutes,
                    )
            except KeyboardInterrupt:
                errors.print(f"Interrupted. The same command goes on from {file.path}.")
                raise SystemExit(130) from None  # as after any Ctrl-C; typer's own exit would count as an error here
        if not finished:
            errors.print("The time is up. The same command goes on; the figures are of the prompts so far.")
        summary = summarize(file.records)
        _write(output, summary, file.setting, errors)
        _show(summary, console)
        console.print(f"Tables, plot and records: {output.resolve()}", soft_wrap=True)
        if short:
            broken = [line for ratio in ratios for line in claims.broken_claims(summary, summary.tasks[0], ratio)]
            if broken:
                raise RuntimeError(" ".join(broken))
            shares = " and ".join(f"{ratio:.0%}" for ratio in ratios)
            console.print(f"Kept {shares}: within the noise of the full prompt, and far ahead of random chunks.")


def _known_tasks() -> tuple[str, ...]:
    from specprefill_kernels.quality.tasks import TASKS

    return tuple(TASKS)


def _names(option: str, text: str | None, known: Sequence[str], default: Sequence[str] | None) -> tuple[str, ...]:
    if text is None:
        return tuple(default or ())
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    return names


def _load(
    base: str, speculator: str, config: Any, self_layers: str | None, device: str, errors: Console
) -> tuple[Any, int | None]:
    """The loop, and the tokens for which both models have room; None where neither says."""
    from specprefill_kernels.loop import SpecPrefill
    from specprefill_kernels.loop.prompts import same_tokens
    from specprefill_kernels.loop.support import context_length
    from specprefill_kernels.models import RichProgress

    layers = parse_layers(self_layers)
    one, other = load_pair(base, base if layers else speculator, device, RichProgress(errors))
    if layers is not None:
        loop = SpecPrefill(one.model, None, config, tokenizer=one.tokenizer, self_layers=layers)
        return loop, context_length(one.model)
    loop = SpecPrefill(one.model, other.model, config, tokenizer=one.tokenizer, speculator_tokenizer=other.tokenizer)
    theirs = context_length(other.model)
    if theirs is not None and not same_tokens(one.tokenizer, other.tokenizer):
        theirs = int(theirs / 1.25)  # another tokenizer may need more tokens for the same text
    known = [length for length in (context_length(one.model), theirs) if length is not None]
    return loop, min(known, default=None)


def _plan(
    tasks: Sequence[str],
    seeds: range,
    tokens: int,
    answer_tokens: int,
    sources: Sequence[Path] | None,
    tokenizer: Any,
) -> list[Planned]:
    """Seed by seed through all tasks: what is there when time is up is balanced."""
    from specprefill_kernels.quality.runner import Planned
    from specprefill_kernels.quality.tasks import make

    def maker(task: str, seed: int) -> Callable[[], Any]:
        def sample() -> Any:
            made = make(task, seed, tokens, tokenizer, sources or None)
            return replace(made, max_new_tokens=max(made.max_new_tokens, answer_tokens))

        return sample

    return [Planned(task, seed, maker(task, seed)) for seed in seeds for task in tasks]


def _longbench_plan(
    files: Sequence[Path], prompts_file: Path | None, count: int, loop: Any, room: int | None
) -> list[Planned]:
    """The first `count` prompts of each file."""
    from specprefill_kernels.quality.longbench import longbench_sample, prompt_limit, read_formats, read_longbench
    from specprefill_kernels.quality.runner import Planned

    formats = None if prompts_file is None else read_formats(prompts_file)
    columns: list[list[Planned]] = []
    for file in files:
        column = []
        for task, number, fields in read_longbench(file, formats, count):

            def make(task: str = task, number: int = number, fields: Any = fields) -> Any:
                limit = prompt_limit(task, room, loop.tokenizer, loop.config.look_ahead)
                return longbench_sample(task, number, fields, loop.tokenizer, limit, formats)

            column.append(Planned(task, number, make))
        columns.append(column)
    keys = [(planned.task, planned.seed) for column in columns for planned in column]
    if len(set(keys)) < len(keys):
        raise ValueError("--longbench: expected each data set in one file, got one in several")
    rows = max(map(len, columns), default=0)
    return [column[row] for row in range(rows) for column in columns if row < len(column)]


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from specprefill_kernels._version import __version__

    return {
        "specprefill": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _shown(name: str) -> str:
    """A model's name without the folders around it."""
    return Path(name).name if Path(name).is_dir() or Path(name).is_file() else name


@contextmanager
def _progress(console: Console, total: int, done: int) -> Iterator[Callable[[Record], None]]:
    """A bar with the time left. Without a terminal a line now and then."""
    from rich import progress

    if not console.is_terminal:
        lines = _Lines(console, total, done)
        yield lines.step
        return
    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=28),
        progress.MofNCompleteColumn(),
        progress.TextColumn("answers,"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("so far,"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
    )
    # Answers come in bursts of quick and slow ones; a long window tells the time left better than a short one.
    with progress.Progress(*columns, console=console, speed_estimate_period=600) as bar:
        handle = bar.add_task("starting", total=total, completed=done)

        def step(record: Record) -> None:
            bar.update(handle, advance=1, description=f"{record.task} {record.seed}")

        yield step


class _Lines:
    def __init__(self, console: Console, total: int, done: int) -> None:
        import time

        self._console, self._total, self._first, self._done = console, total, done, done
        self._clock = time.monotonic
        self._start = self._said = self._clock()

    def step(self, record: Record) -> None:
        self._done += 1
        now = self._clock()
        if now - self._said < 20 and self._done < self._total:
            return
        self._said = now
        left = (now - self._start) / (self._done - self._first) * (self._total - self._done)
        self._console.print(
            f"{self._done:,} of {self._total:,} answers, {now - self._start:.0f} s so far, about {left:.0f} s left"
        )


def _write(output: Path, summary: Summary, setting: dict[str, Any], errors: Console) -> None:
    from specprefill_kernels.quality.plot import save_plot
    from specprefill_kernels.quality.summary import markdown

    plot: str | None = "score.png"
    scorer = "own layers" if setting["speculator"] is None else setting["speculator"]["name"]
    title = f"{setting['base']['name']}, scored by {scorer}: equally many tokens kept, chosen in different ways"
    try:
        save_plot(summary, output / "score.png", title)
    except ImportError as error:
        errors.print(f"No plot: {error}", style="dim", markup=False)
        plot = None
    values = {"setting": setting, **summary.json()}
    (output / "summary.json").write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (output / "summary.md").write_text(markdown(summary, setting, plot), encoding="utf-8")


def _show(summary: Summary, console: Console) -> None:
    from specprefill_kernels.quality.methods import TITLES
    from specprefill_kernels.quality.summary import text_of

    task = summary.tasks[0]
    rows: list[Row] = [row for row in summary.rows if row.task == task]
    table = Table(box=None, pad_edge=False, header_style="dim", title=f"{task}, {rows[0].prompts} prompts")
    for name in ("keep", "method", "score", "to full", "to random", "evidence", "TTFT s"):
        table.add_column(name, justify="right" if name in ("keep", "TTFT s") else "left")
    for row in rows:
        table.add_row(
            "all" if row.method == "full" else f"{row.keep_ratio:g}",
            TITLES[row.method],
            text_of(row.score),
            text_of(row.to_full, signed=True),
            text_of(None if row.method == "full" else row.to_random, signed=True),
            "-" if row.evidence is None else f"{row.evidence.estimate:.2f}",
            f"{row.ttft:.2f}",
            style="bold" if row.method == "kept" else None,
        )
    if not console.is_terminal:
        console.width = max(console.width, 120)  # nobody can widen a log
    console.print(table)
