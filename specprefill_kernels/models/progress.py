"""How long work reports itself: bars where rich and a terminal are there, log lines where not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import rich.progress
    from rich.console import Console

logger = logging.getLogger("specprefill_kernels")


class Task(Protocol):
    def update(self, done: int, total: int | None = None) -> None: ...


class Progress(Protocol):
    """`size` is in bytes; `steps` says that the number of steps will be known on the way; neither: nobody knows."""

    def task(self, label: str, size: int | None = None, steps: bool = False) -> AbstractContextManager[Task]: ...

    def note(self, text: str) -> None: ...


class _NoTask:
    def update(self, done: int, total: int | None = None) -> None:
        pass


class LogProgress:
    """One log line per task."""

    @contextmanager
    def task(self, label: str, size: int | None = None, steps: bool = False) -> Iterator[Task]:
        logger.info(label)
        yield _NoTask()

    def note(self, text: str) -> None:
        logger.info(text)


class RichProgress:
    """One live line per task; it stays as a quiet tick when the task is done, and goes when the task failed."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True)

    @contextmanager
    def task(self, label: str, size: int | None = None, steps: bool = False) -> Iterator[Task]:
        from rich import progress as rich_progress

        columns: list[rich_progress.ProgressColumn] = [
            rich_progress.SpinnerColumn(finished_text="[green]✓"),
            rich_progress.TextColumn("{task.description}"),
        ]
        if size is not None or steps:
            columns.append(rich_progress.BarColumn(bar_width=28))
        if size is not None:
            columns += [rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn()]
        with rich_progress.Progress(*columns, rich_progress.TimeElapsedColumn(), console=self._console) as bar:
            handle = bar.add_task(label, total=size)
            try:
                yield _RichTask(bar, handle)
            except BaseException:
                bar.remove_task(handle)
                raise
            end = bar.tasks[0].total or 1
            bar.update(handle, total=end, completed=end)

    def note(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False, markup=False)


class _RichTask:
    def __init__(self, bar: rich.progress.Progress, handle: rich.progress.TaskID) -> None:
        self._bar, self._handle = bar, handle

    def update(self, done: int, total: int | None = None) -> None:
        self._bar.update(self._handle, completed=done, total=total)


def default_progress() -> Progress:
    if sys.stderr.isatty():
        try:
            return RichProgress()
        except ImportError:
            pass
    return LogProgress()
