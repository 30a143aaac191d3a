"""This library beside other ways to get the same, or nearly the same: timed in turn, in one process.

    python -m bench.peers                                    the eager definition, torch.compile of it, the published
                                                             algorithm, torch.topk and sort
    python -m bench.peers --kvpress-python ENV/bin/python    kvpress's SnapKV scoring too, in an environment that has it
    python3 run.py bench peers                               makes that environment and runs all of it

Results: peers.json under --out. What each peer computes otherwise is in WHAT, and in every row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import specprefill_kernels as spk
from bench import eager, measure, memory, peers_published, problems, traffic, truth
from bench.environment import command, environment
from bench.shapes import CHUNK, GRIDS, KEEP_RATIO, LOOK_AHEAD, Model, layers_within, size_name

ROOT = Path(__file__).resolve().parents[1]
WHAT = {
    "specprefill_kernels": "score_layers_ and finalize_importance: the definition, accumulated in fp32, weights of one "
    "KV head at a time",
    "eager": "the same result: the definition in PyTorch, in fp32, a layer at a time",
    "torch.compile": "the same result: torch.compile of the eager definition of one layer, called for each; compiled "
    "before it is timed",
    "published": "the authors' steps: keys repeated for each query head, products in the model's dtype, weights of all "
    "layers kept and rounded to that dtype; in bf16 it is less exact than the definition",
    "topk + sort": "the same selection and gather: mean of the state, chunk means, torch.topk, sort, indexing; no rule "
    "for ties",
    "published selection": "the authors' steps from the importance to kept positions: a Python loop over chunks; no "
    "mean over rows, no gather of ids",
    "kvpress SnapKV": "another score: mean over the window's rows and over each group's heads, per layer and KV head, "
    "no maximum over heads and layers, products in the model's dtype; it also projects and rotates the window's "
    "queries, which this library gets from the attention layer",
}
PUBLISHED_BYTES = 4 * 2**30  # it is run on as many layers as stay below this


def score_rows(
    m: Model, tokens: int, dtype: torch.dtype, share: int, ticks: Any, seconds: float, compiling: bool = True
) -> Iterator[dict[str, Any]]:
    """Scores: ours and each peer, from queries and keys to the importance."""
    layers = layers_within(m, tokens, dtype.itemsize, share)
    shape = f"{m.name} {size_name(tokens)} {str(dtype).removeprefix('torch.')}"
    queries, keys = problems.layer_tensors("cpu", m, tokens, dtype, layers)
    state = spk.new_state(1, LOOK_AHEAD, tokens)
    plain_queries, plain_keys = [query[0] for query in queries], [key[0] for key in keys]

    def ours() -> Tensor:
        return spk.finalize_importance(spk.score_layers_(state, queries, keys, backend="cpu"), backend="cpu")[0]

    per_layer = LOOK_AHEAD * m.query_heads
    few = max(1, min(layers, PUBLISHED_BYTES // peers_published.peak_bytes(1, per_layer, tokens, dtype.itemsize)))
    some = max(1, min(layers, problems.EAGER_SCORES // (per_layer * tokens)))
    calls: dict[str, tuple[Callable[[], Tensor], int]] = {
        "specprefill_kernels": (ours, layers),
        "eager": (lambda: eager.score_layers(plain_queries[:some], plain_keys[:some]).mean(0), some),
        "published": (lambda: peers_published.importance(plain_queries[:few], plain_keys[:few]), few),
    }
    skipped: dict[str, str] = {}
    compiled, reason = compile_eager(plain_queries[0], plain_keys[0]) if compiling else (None, "left out")
    if compiled is None:
        skipped["torch.compile"] = reason
    else:
        calls["torch.compile"] = (partial(_in_layers, compiled, plain_queries[:some], plain_keys[:some]), some)
    wanted = {count: _truth(plain_queries[:count], plain_keys[:count]) for count in {layers, few, some}}
    agreements: dict[str, dict[str, float]] = {}
    common: dict[str, Any] = {
        "op": "score",
        "shape": shape,
        "model": m.name,
        "tokens": tokens,
        "layers": layers,
        "of_layers": m.layers,
    }
    common |= {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    for name, (call, count) in list(calls.items()):
        state.zero_()
        exact = None if name == "published" and dtype != torch.float32 else 1e-4
        try:
            agreement = compared(call(), wanted[count], exact)
        except Exception as error:
            if name == "specprefill_kernels":
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del calls[name]
            continue
        calls[name] = (call, count)
        agreements[name] = agreement
    peaks = {name: memory.peak_bytes(call, "cpu") for name, (call, _) in calls.items()}
    times = measure.in_turn(ticks, {name: call for name, (call, _) in calls.items()}, seconds, least=3, warm_up=1)
    own = times["specprefill_kernels"].p50
    for name, (_, count) in calls.items():
        row: dict[str, Any] = {
            **common,
            "peer": name,
            "computes": WHAT[name],
            "layers_run": count,
            "peak_bytes": peaks[name],
        }
        row |= {"seconds": times[name].p50 * layers / count, "spread": times[name].json(), **agreements[name]}
        yield row | {"ratio": row["seconds"] / own}
    for name, why in skipped.items():
        yield {**common, "peer": name, "computes": WHAT[name], "skipped": why}


def compile_eager(query: Tensor, key: Tensor) -> tuple[Callable[..., Tensor] | None, str]:
    """torch.compile of one layer, compiled; or None and why not."""
    try:
        print("       torch.compile ...", file=sys.stderr, flush=True)
        torch._dynamo.reset()
        compiled = torch.compile(eager.score_layer, dynamic=False)
        compiled(torch.zeros(query.shape[0], key.shape[1]), query, key)
        return compiled, ""
    except Exception as error:  # no compiler, no support: a row that says so
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _in_layers(layer: Callable[..., Tensor], queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    best = torch.zeros(queries[0].shape[0], keys[0].shape[1])
    for query, key in zip(queries, keys, strict=True):
        best = layer(best, query, key)
    return best.mean(0)


def _truth(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    best = torch.zeros(queries[0].shape[0], keys[0].shape[1], dtype=torch.float64)
    for query, key in zip(queries, keys, strict=True):
        best = torch.maximum(best, truth.state(query, key))
    return best.mean(0)


def compared(got: Tensor, wanted: Tensor, exact: float | None) -> dict[str, float]:
    """Largest relative error against fp64, and the share of fp64's kept tokens that are kept too.

    Raises WrongResult beyond `exact`; without one, only where the result is no importance at all.
    """
    error = float(((got.double() - wanted).abs() / wanted).max())
    if not error < (exact or 1.0):  # NaN too
        raise problems.WrongResult(f"off by {error:.3g} of the importance")
    kept = [set(problems._kept(values.float()).tolist()) for values in (got, wanted)]
    return {"relative_error": error, "kept_overlap": len(kept[0] & kept[1]) / len(kept[1])}


def select_rows(tokens: int, ticks: Any, seconds: float) -> Iterator[dict[str, Any]]:
    """Selections: from the state to packed ids, or what part of it the peer does."""
    state = torch.rand(1, LOOK_AHEAD, tokens, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(tokens)[None]
    values = state[0].mean(0)
    count = traffic.kept_tokens(tokens, KEEP_RATIO, CHUNK) // CHUNK
    calls: dict[str, Callable[[], Tensor]] = {
        "specprefill_kernels": lambda: (
            spk.select_tokens(state, ids, keep_ratio=KEEP_RATIO, backend="cpu").packed.values
        ),
        "topk + sort": lambda: eager.select_tokens(state[0], ids[0], count, CHUNK)[0],
        "published selection": lambda: peers_published.select(values, KEEP_RATIO, CHUNK),
    }
    wanted = problems._kept(values)
    for name, call in calls.items():
        got = call()
        if not torch.equal(got[: len(wanted)], wanted):
            raise problems.WrongResult(f"{name}: other tokens than the best chunks'")
    times = measure.in_turn(ticks, calls, seconds, least=3, warm_up=1)
    for name, call in calls.items():
        yield {
            "op": "select",
            "peer": name,
            "computes": WHAT[name] if name != "specprefill_kernels" else "select_tokens: state to packed ids, one call",
            "shape": size_name(tokens),
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            "seconds": times[name].p50,
            "spread": times[name].json(),
            "ratio": times[name].p50 / times["specprefill_kernels"].p50,
            "peak_bytes": memory.peak_bytes(call, "cpu"),
        }


def kvpress_rows(python: str, options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """Rows that bench/peers_kvpress.py prints as JSON lines, under a Python that has kvpress."""
    started = [python, "-m", "bench.peers_kvpress", "--shapes", options.shapes, "--threads", str(threads)]
    started += ["--seconds", str(options.seconds), "--only", options.only, "--key-mib", str(options.key_mib)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    absent = {
        "op": "score",
        "peer": "kvpress SnapKV",
        "computes": WHAT["kvpress SnapKV"],
        "shape": "",
        "threads": threads,
    }
    try:
        # What it says on stderr is its progress.
        run = subprocess.run(
            started, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=False
        )
    except OSError as error:
        return [absent | {"skipped": str(error)}]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        row["computes"] = WHAT[row["peer"]]
    if run.returncode or not rows:
        rows.append(absent | {"skipped": f"bench.peers_kvpress ended with exit status {run.returncode}"})
    return rows


def line(row: dict[str, Any]) -> str:
    head = f"{row['op']:14}{row['shape']:30}{row['threads']}t  {row['peer']:21}"
    if "skipped" in row:
        return f"{head} not here: {row['skipped']}"
    run = f", on {row['layers_run']} of {row['layers']} layers" if row.get("layers_run") != row.get("layers") else ""
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
    return f"{head}{1e3 * row['seconds']:11.3f} ms {row['ratio']:8.2f}x   peak {peak:>8} MiB{run}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=tuple(GRIDS), default="default")
    parser.add_argument("--quick", dest="shapes", action="store_const", const="quick", help="tiny shapes")
    parser.add_argument("--threads", default="2", help="comma-separated")
    parser.add_argument("--only", default="", help="only models whose name contains this; 'select' for no scores")
    parser.add_argument("--key-mib", type=int, default=0, help="MiB of all layers' keys (default: the shapes' own)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each shape")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--kvpress-python", default="", help="a Python in whose environment kvpress is installed")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(argv)
    grid, quick = GRIDS[options.shapes], options.shapes == "quick"
    options.seconds = 0.0 if quick else options.seconds
    share = options.key_mib * 2**20 or grid.key_bytes or memory.free_bytes("cpu") // 4
    report: dict[str, Any] = {
        "environment": environment("cpu"),
        "command": command("python -m bench.peers", sys.argv[1:] if argv is None else argv),
    }
    rows: list[dict[str, Any]] = report.setdefault("rows", [])
    options.out.mkdir(parents=True, exist_ok=True)
    cold, warm = measure.clock("cpu", quick), measure.clock("cpu", quick, cold=False)
    before, started = torch.get_num_threads(), time.monotonic()

    def keep(new: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
        for row in new:
            rows.append(row)
            print(f"{time.monotonic() - started:5.0f} s  {line(row)}", flush=True)
            (options.out / "peers.json").write_text(json.dumps(report, indent=1) + "\n")

    try:
        for threads in (int(n) for n in options.threads.split(",")):
            torch.set_num_threads(threads)
            if options.only in "select":
                for tokens in grid.long:
                    keep(select_rows(tokens, warm, options.seconds / 2))
            for m in (m for m in grid.models if options.only in m.name):
                for tokens in grid.prompts:
                    for dtype in grid.dtypes:
                        keep(
                            score_rows(m, tokens, getattr(torch, dtype), share, cold, options.seconds, options.compile)
                        )
            if options.kvpress_python:
                keep(kvpress_rows(options.kvpress_python, options, threads))
    finally:
        torch.set_num_threads(before)
    return 0 if rows else 2


if __name__ == "__main__":
    sys.exit(main())
