"""How time and memory of every op grow with the prompt, from 1K to 1M tokens, and the exponents of that growth.

    python -m bench.scaling                                  # on the CPU, one layer of SmolLM2-135M, about 4 minutes
    python -m bench.scaling --threads 1 --only score
    python -m bench.scaling --device cuda --backend triton --model Llama-3.1-8B

Every op is measured at every power of two, first upward and then downward again, so that a machine that gets busier on
the way does not look like growth. A call is timed as everywhere in bench: after caches were overwritten
(bench/measure.py), in turn with a plain copy of as many bytes as the op must move (bench/traffic.py). Exponents are
those of the 20th percentile, not of medians: what other programs take from the machine only ever adds, and to short
calls the most.

Outputs and workspaces are allocated by each call, as for a caller who gives no `out=` and no `workspace=`. On a CPU the
C library takes large blocks from the system anew each time, and touching them costs as much as the copy of gather_kv
itself: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in front of the command shows the ops without that.
Data of short prompts come out of a cache all the same, those of 1M tokens do not: that bends the curve of any op, and
the copy's too. So the table gives bytes per second, and the exponents stand beside those of the copy.

Results are checked (in fp64) up to --verify tokens before they are timed. How exponents are made: bench/scaling_fit.py;
how memory is measured: bench/scaling_memory.py. The goal is an exponent of at most 1.05, for time over all lengths,
for time over the longer half of them, and for memory. scaling.json and scaling.txt go to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import specprefill_kernels as spk
from bench import measure, problems, scaling_fit, scaling_memory, shapes
from bench.environment import environment
from bench.problems import Problem
from bench.scaling_cases import WARM_UP, makers, parse

GOAL = 1.05
LEAST_CALLS = 3  # of each sweep
MOST_CALLS = 40

Say = Callable[[str], None]


def lengths(options: argparse.Namespace) -> list[int]:
    """Powers of two times the shortest."""
    found = [options.shortest]
    while 2 * found[-1] <= options.longest:
        found.append(2 * found[-1])
    return found


def timed(options: argparse.Namespace, rows: dict[tuple[str, int], dict[str, Any]], say: Say) -> None:
    """Two sweeps over all lengths, up and down; each row gets its seconds and those of the copy. Saved op by op."""
    ticks = measure.clock(options.device, options.quick)
    for op, make in makers(options).items():
        made: dict[int, Problem] = {}  # all lengths together are twice the longest
        taken: dict[int, tuple[list[float], list[float]]] = {}
        if options.device == "cuda" and "failed" not in rows[op, options.shortest]:
            make(WARM_UP).call(options.backend)
        for sweep, order in (("up", lengths(options)), ("down", reversed(lengths(options)))):
            for tokens in order:
                say(f"{op}, {shapes.size_name(tokens)} tokens, {sweep}")
                row = rows[op, tokens]
                if "failed" in row:
                    continue
                try:
                    if tokens not in made:
                        made[tokens] = _checked(options, make(tokens), row)
                    seconds, copies = _sample(options, ticks, made[tokens], row)
                except Exception as error:  # the others are worth having
                    row["failed"] = f"{type(error).__name__}: {error}"
                    continue
                own, theirs = taken.setdefault(tokens, ([], []))
                own.extend(seconds)
                theirs.extend(copies)
                row["seconds"] = measure.Times.of(own).json()
                row["copy_seconds"] = measure.Times.of(theirs).json()
                row["rate"] = row["bytes"] / row["seconds"]["p50"]
                if "layers" in row:
                    row["layer_seconds"] = row["seconds"]["p50"] / row["layers"]
        save(options, list(rows.values()))


def _checked(options: argparse.Namespace, problem: Problem, row: dict[str, Any]) -> Problem:
    row["bytes"] = problem.traffic
    if options.device == "cuda":  # of this length's first call, as on a CPU
        row["peak_bytes"] = scaling_memory.of_call(lambda: problem.call(options.backend), "cuda")
    if row["tokens"] <= options.verify:
        problems.verify(problem, options.backend, problem.expected())
        row["verified"] = True
    return problem


def _sample(
    options: argparse.Namespace, ticks: Any, problem: Problem, row: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """Seconds of the op's calls and of the copies between them."""
    source = torch.ones(max(1, row["bytes"] // 2), dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    calls = (lambda: problem.call(options.backend)), (lambda: target.copy_(source))
    for call in (*calls, *calls):
        call()
    seconds: tuple[list[float], list[float]] = ([], [])
    stop = time.perf_counter() + options.seconds / 2
    for done in range(MOST_CALLS):
        if done >= LEAST_CALLS and time.perf_counter() > stop:
            break
        for values, call in zip(seconds, calls):
            values.append(ticks.seconds(call))
    return seconds


def memory(
    options: argparse.Namespace, argv: Sequence[str], rows: dict[tuple[str, int], dict[str, Any]], say: Say
) -> None:
    """Each row's peak bytes, or why they are not known; those of a GPU came with its times."""
    if options.device == "cuda":
        return
    for op, tokens, value in scaling_memory.in_processes(argv, [key for key in rows if "failed" not in rows[key]]):
        say(f"memory of {op}, {shapes.size_name(tokens)} tokens")
        rows[op, tokens].update({"peak_bytes": value} if isinstance(value, int) else {"peak_bytes_unknown": value})


def fits(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """op -> exponents with their 95% intervals; None where there are too few lengths."""
    found: dict[str, dict[str, Any]] = {}
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op and "seconds" in row]
        times = [(row["tokens"], row["seconds"]["p20"]) for row in own]
        copies = [(row["tokens"], row["copy_seconds"]["p20"]) for row in own]
        sizes = [(row["tokens"], row["peak_bytes"]) for row in own if "peak_bytes" in row]
        whole = scaling_fit.with_overhead(times)
        upper = scaling_fit.longer_half(times)
        copied = scaling_fit.with_overhead(copies)
        copied_upper = scaling_fit.longer_half(copies)
        large = [point for point in sizes if point[1] >= scaling_memory.RESOLUTION]
        grown = scaling_fit.power(large) if len(large) > 2 else None
        found[op] = {
            "time_exponent": whole and whole.exponent,
            "time_interval95": whole and whole.interval,
            "overhead_seconds": whole and whole.overhead,
            "upper_exponent": upper and upper.exponent,
            "upper_interval95": upper and upper.interval,
            "upper_from_tokens": scaling_fit.upper_half(times)[0][0] if times else None,
            "copy_exponent": copied and copied.exponent,
            "copy_upper_exponent": copied_upper and copied_upper.exponent,
            "memory_exponent": grown and grown.exponent,
            "memory_interval95": grown and grown.interval,
            "peak_bytes_per_token": sizes[-1][1] / sizes[-1][0] if sizes else None,
        }
    return found


def save(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """scaling.json as far as it has come, so that nothing is lost when time runs out; returns the exponents."""
    measured = [row for row in rows if row.keys() & {"seconds", "failed"}]
    found = fits(measured)
    report = {
        "environment": environment(options.device),
        "command": options.command,
        "goal": GOAL,
        "model": options.model.name,
        "rows": measured,
        "fits": found,
    }
    (options.out / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")
    return found


JUDGED = (("time", "time"), ("upper half", "upper"), ("memory", "memory"))


def unreached(fit: dict[str, Any]) -> list[str]:
    """Which exponents are above the goal. One of time that is unknown is not below it."""
    over = [f"{name} unknown" for name, key in JUDGED[:2] if fit[f"{key}_exponent"] is None]
    for name, key in JUDGED:
        exponent, interval = fit[f"{key}_exponent"], fit[f"{key}_interval95"]
        if exponent is not None and exponent > GOAL:
            unsure = interval is None or interval[0] <= GOAL
            over.append(f"{name} {exponent:.3f}" + ", within the noise" * unsure)
    return over


def goal_lines(found: dict[str, dict[str, Any]], backend: str) -> list[str]:
    lines = []
    for op, fit in found.items():
        over = unreached(fit)
        text = f"{op} on {backend}: time {_power(fit, 'time')}, upper half {_power(fit, 'upper')}, "
        text += f"memory {_power(fit, 'memory')}, goal {GOAL}"
        if over:
            text += f", NOT REACHED ({', '.join(over)})"
            if fit["copy_exponent"] is not None:
                text += f"; a copy: T^{fit['copy_exponent']:.3f}, upper half T^{fit['copy_upper_exponent']:.3f}"
        elif any((fit[f"{key}_interval95"] or (0, 0))[1] > GOAL for _, key in JUDGED):
            text += ", reached within the noise"
        lines.append(text)
    return lines


def _power(fit: dict[str, Any], name: str) -> str:
    exponent, interval = fit[f"{name}_exponent"], fit[f"{name}_interval95"]
    if exponent is None:
        return "too small for one" if name == "memory" and fit["peak_bytes_per_token"] is not None else "unknown"
    return f"T^{exponent:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")


def show(rows: Sequence[dict[str, Any]], found: dict[str, dict[str, Any]], title: str, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left")
    for name in ("op", "tokens", "ms", "p20-p80", "GB/s", "copy ms", "extra MB"):
        table.add_column(name, justify="left" if name == "op" else "right", no_wrap=True)
    last = None
    for row in rows:
        head = (row["op"] if row["op"] != last else "", shapes.size_name(row["tokens"]))
        last = row["op"]
        if "seconds" not in row:
            table.add_row(*head, "failed")
            continue
        ms = {name: 1e3 * row["seconds"][name] for name in ("p20", "p50", "p80")}
        size = f"{row['peak_bytes'] / 1e6:.2f}" if "peak_bytes" in row else "-"
        spread = f"{ms['p20']:.3f}-{ms['p80']:.3f}"
        table.add_row(
            *head,
            f"{ms['p50']:.3f}",
            spread,
            f"{row['rate'] / 1e9:.2f}",
            f"{1e3 * row['copy_seconds']['p50']:.3f}",
            size,
        )
    console.print(table)
    exponents = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("op", "time", "upper half", "copy", "its upper half", "memory", "bytes a token"):
        exponents.add_column(name, justify="left" if name == "op" else "right", no_wrap=True)
    for op, fit in found.items():
        copies = ["-" if fit[key] is None else f"T^{fit[key]:.3f}" for key in ("copy_exponent", "copy_upper_exponent")]
        each = "-" if fit["peak_bytes_per_token"] is None else f"{fit['peak_bytes_per_token']:.2f}"
        powers = (_power(fit, name) for name in ("time", "upper"))
        exponents.add_row(op, *powers, *copies, _power(fit, "memory"), each)
    console.print(exponents)


@contextmanager
def _progress(console: Console, steps: int) -> Iterator[Say]:
    """A bar with the time left; without a terminal a line every ten seconds."""
    from rich import progress

    if not console.is_terminal:
        done, spoken = 0, time.monotonic()

        def line(text: str) -> None:
            nonlocal done, spoken
            done += 1
            if time.monotonic() - spoken >= 10:
                spoken = time.monotonic()
                console.print(f"{done} of {steps}: {text}")

        yield line
        return
    columns: tuple[Any, ...] = (
        progress.SpinnerColumn(),
        progress.BarColumn(bar_width=28),
        progress.TimeElapsedColumn(),
        progress.TextColumn("so far,"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left  {task.description}"),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        handle = bar.add_task("", total=steps)
        yield lambda text: bar.update(handle, advance=1, description=text)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv, __doc__)
    errors = Console(stderr=True, highlight=False)
    if options.device == "cuda" and not torch.cuda.is_available():
        errors.print("bench.scaling: no GPU that torch can use")
        return 2
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)  # before the long work
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for op in makers(options):
        reason = spk.available_backends(op).get(options.backend, "no such backend")
        for tokens in lengths(options):
            rows[op, tokens] = row = {
                "op": op,
                "backend": options.backend,
                "device": options.device,
                "threads": options.threads if options.device == "cpu" else None,
                "tokens": tokens,
                "shape": options.model.name if op.startswith(("score", "gather_kv")) else "",
            }
            if op == "score_layers":
                row["layers"] = options.layers
            if reason is not None:
                row["failed"] = reason
    steps = len(rows) * (2 if options.device == "cuda" else 3)
    with _progress(errors, steps) as say:
        timed(options, rows, say)
        memory(options, argv, rows, say)
    everything = list(rows.values())
    found = save(options, everything)
    threads = f", {options.threads} threads" if options.device == "cpu" else ""
    title = f"{options.model.name} on {options.backend}{threads}; copy: as many bytes as the op must move"
    failures = list(dict.fromkeys(f"{row['op']}: {row['failed']}" for row in everything if "failed" in row))
    lines = [*goal_lines(found, options.backend), *(f"FAILED {failure}" for failure in failures)]
    with (options.out / "scaling.txt").open("w") as file:
        for console in (Console(highlight=False), Console(file=file, width=140, highlight=False)):
            if not console.is_terminal:
                console.width = 140
            show(everything, found, title, console)
            for text in lines:
                console.print(text, soft_wrap=True, markup=False)
    missed = options.check and any(map(unreached, found.values()))
    return 1 if failures or missed else 0


if __name__ == "__main__":
    sys.exit(main())
