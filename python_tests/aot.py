"""Compile every Triton kernel for every architecture, without a GPU, and fail on what would hurt on one.

    python python_tests/aot.py [--arch 80,90,gfx942] [--only score] [--json FILE] [--jobs 2] [--full]

Exit status 1: a kernel that does not compile, spills registers (more bytes than aot_table.PARKED) or wants more shared
memory than the architecture has; a score kernel whose dot uses no tensor core; a configuration that the heuristics
could choose and no call covers.
The compiled kernels are kept where Triton keeps its own (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: the interpreter compiles nothing

import aot_table
import triton
import triton.language as tl
from aot_compile import ARCHS, Job, Result, compile_job
from aot_record import Recorded, Room, record

# Set before the workers are forked, which is how they get it: a kernel cannot be pickled.
_work: list[tuple[Job, bool]] = []


def _run(index: int) -> tuple[int, Result]:
    job, disassemble = _work[index]
    started = time.perf_counter()
    try:
        result = compile_job(job, disassemble)
    except Exception as error:
        # Triton's errors begin with the place, go on with the source and end with what is wrong.
        lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()]
        result = Result(error=f"{type(error).__name__}: {' | '.join([*lines[:1], *lines[-2:]])[-600:]}")
    result.seconds = time.perf_counter() - started
    return index, result


def compile_all(jobs: Sequence[Job], workers: int, full: bool = False) -> Iterator[tuple[Job, Result]]:
    """Compile in `workers` processes; (job, result) as they come.

    Without `full`, one binary per kernel, dtype of its dots and architecture is disassembled, and any that spills. Of
    the others the instructions are counted in the PTX.
    """
    seen: set[tuple[object, ...]] = set()
    _work.clear()
    for job in jobs:
        dtypes = [str(value) for value in job.constants.values() if isinstance(value, tl.dtype)]
        sample = (job.name, job.arch.name, *dtypes)
        _work.append((job, full or sample not in seen))
        seen.add(sample)
    fork = multiprocessing.get_context("fork")
    left = set(range(len(jobs)))
    try:
        with ProcessPoolExecutor(workers, fork) as pool:
            for future in as_completed([pool.submit(_run, index) for index in range(len(jobs))]):
                index, result = future.result()
                left.discard(index)
                yield jobs[index], result
        return
    except BrokenProcessPool:
        pass  # the compiler took its process down: the rest one by one, to see which kernel does that
    for index in sorted(left):
        with ProcessPoolExecutor(1, fork) as pool:
            try:
                yield jobs[index], pool.submit(_run, index).result()[1]
            except BrokenProcessPool:
                yield jobs[index], Result(error="the compiler crashed")


def _progress(total: int, outcomes: Iterator[tuple[Job, Result]]) -> Iterator[tuple[Job, Result]]:
    """Pass the outcomes on: a bar on a terminal that rich knows, else a line now and then."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        Progress = None  # type: ignore[misc,assignment]
    if Progress is not None and sys.stderr.isatty():
        from rich.console import Console

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("compiling", total=total)
            for job, result in outcomes:
                bar.update(task, advance=1, description=f"compiled {job.name} {job.arch.name}")
                yield job, result
        return
    started = said = time.monotonic()
    for done, outcome in enumerate(outcomes, 1):
        if time.monotonic() - said > 15:
            said = time.monotonic()
            print(f"  {done} of {total} kernels in {said - started:.0f} s", file=sys.stderr, flush=True)
        yield outcome


def check(rooms: Sequence[Room], recorded: Recorded, workers: int, full: bool) -> tuple[list, list[str]]:
    """(every job with its result, what is wrong)."""
    strict = {room.name: room.needs_tensor_cores for room in rooms}
    order = {id(job): index for index, job in enumerate(recorded.jobs)}
    outcomes = list(_progress(len(order), compile_all(recorded.jobs, workers, full)))
    outcomes.sort(key=lambda outcome: order[id(outcome[0])])
    wrong = list(recorded.problems)
    for job, result in outcomes:
        wrong += aot_table.problems(job, result, strict[job.room])
    return outcomes, wrong


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", help=f"comma-separated, of {', '.join(ARCHS)}; all by default")
    parser.add_argument("--only", help="comma-separated rooms; all by default")
    parser.add_argument("--json", type=Path, help="write all figures of all kernels to this file")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--full", action="store_true", help="every combination of options, every binary disassembled")
    chosen = parser.parse_args(argv)
    names = [name.strip() for name in (chosen.arch or ",".join(ARCHS)).split(",")]
    chosen.archs = []
    for name in names:
        arch = ARCHS.get(name) or ARCHS.get(f"sm_{name}")
        if arch is None:
            parser.error(f"--arch: expected some of {', '.join(ARCHS)}, got {name}")
        chosen.archs.append(arch)
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(argv)
    import aot_cases

    rooms = aot_cases.rooms()
    if chosen.only:
        known = {room.name: room for room in rooms}
        unknown = [name for name in chosen.only.split(",") if name not in known]
        if unknown:
            print(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}", file=sys.stderr)
            return 2
        rooms = [known[name] for name in chosen.only.split(",")]
    started = time.monotonic()
    recorded = record(rooms, chosen.archs, chosen.full)
    recording = time.monotonic() - started
    print(
        f"Triton {triton.__version__}: {recorded.calls} calls, {recorded.launches} launches, {len(recorded.jobs)} "
        f"distinct kernels ({recording:.0f} s)",
        file=sys.stderr,
        flush=True,
    )
    outcomes, wrong = check(rooms, recorded, chosen.jobs, chosen.full)
    print(aot_table.table(outcomes, chosen.archs))
    print()
    for line in wrong:
        print(f"WRONG  {line}")
    sass = sum(result.disassembled for _, result in outcomes)
    seconds = time.monotonic() - started
    scope = "the whole product of options" if chosen.full else "a covering set of options (--full: the whole product)"
    print(
        f"Triton {triton.__version__}: {len(outcomes)} kernels, {len(chosen.archs)} architectures, {seconds:.0f} s; "
        f"{sass} disassembled; {scope}; AMD only compiled; {'all well' if not wrong else f'{len(wrong)} WRONG'}"
    )
    if chosen.json:
        chosen.json.write_text(json.dumps({"triton": triton.__version__, "kernels": aot_table.as_json(outcomes)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
