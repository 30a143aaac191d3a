"""What the CPU kernels are to reach, measured: each against the plain operation that bounds it, in one run, in turn.

    python -m bench.score_goals            writes bench/results/score_goals.json and prints the table
    python -m bench.score_goals --quick    tiny shapes: tries the harness, measures nothing

- score_layers_ within 1.5x of the bare QK^T matmul by torch of the same shape and dtype: all layers, per KV head
  [G*N, D] x [D, T], into an output that is there already and used again. Of several ways to write it the fastest.
- score_layers_ at least 8x faster than the eager definition, which is the package's `reference` backend, timed on one
  layer. Beside it the leanest eager form (bench/eager.py), without masks, lengths and checks. Where either is timed on
  fewer layers than there are, its time is multiplied, and the row says on how many.
- select_tokens within 1.5x of a copy of the importance and torch.sort of the chunks' scores; beside it the
  compiled call alone, as a fixed part of a Python call (some 60 us) is longer than the copy and sort of a short prompt.
- Peak extra memory: the score's weights of one KV head at a time, whatever the number of heads and layers, beside a
  state and 4 MiB.

Every op's result, and those of both eager forms, are compared with fp64 before anything is timed; the bare matmul's,
the copy's and the sort's are not. A goal that is missed is said, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import specprefill_kernels as spk
from bench import eager, measure, memory, problems, traffic, truth
from bench.environment import command, environment
from bench.shapes import CHUNK, GRIDS, KEEP_RATIO, LOOK_AHEAD, Grid, Model, layers_within, size_name
from specprefill_kernels import _native
from specprefill_kernels.ops.finalize import native as finalize
from specprefill_kernels.ops.gather import native as gather
from specprefill_kernels.ops.select import native as select
from specprefill_kernels.ops.select.budget import Budget

MATMUL, EAGER, SELECT = 1.5, 8.0, 1.5
SLACK = 4 * 2**20  # bytes that tiles of all threads and the C library may take


def matmul_forms(query: Tensor, key: Tensor) -> dict[str, Callable[[Tensor, Tensor], object]]:
    """Ways to write one layer's QK^T in torch: grouped query [Hkv, G*N, D] and key [Hkv, T, D] -> products in `out`."""
    heads, rows, _ = query.shape
    wide = torch.empty(heads, rows, key.shape[1], dtype=key.dtype)
    tall = torch.empty(heads, key.shape[1], rows, dtype=key.dtype)

    def each(out: Tensor, left: Tensor, right: Tensor) -> None:
        for head in range(heads):
            torch.mm(left[head], right[head], out=out[head])

    return {
        "bmm Q K^T": lambda q, k: torch.bmm(q, k.transpose(1, 2), out=wide),
        "bmm K Q^T": lambda q, k: torch.bmm(k, q.transpose(1, 2), out=tall),
        "mm Q K^T per head": lambda q, k: each(wide, q, k.transpose(1, 2)),
        "mm K Q^T per head": lambda q, k: each(tall, k, q.transpose(1, 2)),
    }


def grouped(query: Tensor, heads: int) -> Tensor:
    """[1, N, Hq, D] -> [Hkv, G*N, D]."""
    return query[0].unflatten(1, (heads, -1)).permute(1, 2, 0, 3).flatten(1, 2).contiguous()


def fastest_matmul(ticks: Any, queries: list[Tensor], keys: list[Tensor]) -> tuple[str, Callable[[], None]]:
    """The fastest form, tried on a few layers, and a call of it on all layers."""
    forms = matmul_forms(queries[0], keys[0])
    few = list(zip(queries, keys))[:2]

    def on(form: Callable[[Tensor, Tensor], object], pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        def call() -> None:
            for query, key in pairs:
                form(query, key)

        return call

    tried = measure.in_turn(ticks, {name: on(form, few) for name, form in forms.items()}, 0, least=3, warm_up=1)
    name = min(tried, key=lambda form: tried[form].p50)
    return name, on(forms[name], list(zip(queries, keys)))


def score_row(
    m: Model, tokens: int, dtype: torch.dtype, threads: list[int], share: int, ticks: Any, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for each number of threads, on the same tensors."""
    layers = layers_within(m, tokens, dtype.itemsize, share)
    problem = problems.score_layers("cpu", m, tokens, dtype, layers)
    assert problem.tensors is not None
    queries, keys = problem.tensors
    expected = problem.expected()
    problems.verify_plain(problem, expected)
    definition = one_layer(queries[0], keys[0])[0]
    problems.compare(f"{problem.shape}, definition", [definition], [truth.state(queries[0][0], keys[0][0])], 1e-4)
    pairs = [grouped(query, m.kv_heads) for query in queries], [key[0] for key in keys]
    wide = [query.float() for query in pairs[0][:1]], [key.float() for key in pairs[1][:1]]
    for count in threads:
        torch.set_num_threads(count)
        problems.verify(problem, "cpu", expected)
        assert problem.eager is not None
        name, matmul = fastest_matmul(ticks, *pairs)
        calls = {"score": lambda: problem.call("cpu"), "matmul": matmul, "eager": problem.eager}
        calls["definition"] = partial(one_layer, queries[0], keys[0])
        if dtype != torch.float32:  # what the product would take if the keys were fp32 already: one layer's
            calls["matmul float32"] = fastest_matmul(ticks, *wide)[1]
        peak = memory.peak_bytes(calls["score"], "cpu")
        times = measure.in_turn(ticks, calls, seconds, most=30, least=3, warm_up=1)
        own = times["score"].p50
        weights = 4 * LOOK_AHEAD * tokens * (m.query_heads // m.kv_heads)
        yield {
            "op": "score_layers",
            "model": m.name,
            "tokens": tokens,
            "dtype": problem.dtype,
            "threads": count,
            "layers": layers,
            "of_layers": m.layers,
            "seconds": times["score"].json(),
            "matmul_form": name,
            "matmul_seconds": times["matmul"].json(),
            "matmul_float32_seconds": times["matmul float32"].p50 * layers if "matmul float32" in times else None,
            "eager_seconds": times["eager"].p50 * problem.eager_times,
            "eager_layers": round(layers / problem.eager_times),
            "to_matmul": own / times["matmul"].p50,
            "over_eager": times["eager"].p50 * problem.eager_times / own,
            "over_definition": times["definition"].p50 * layers / own,
            "peak_bytes": peak,
            "peak_limit": weights + 4 * LOOK_AHEAD * tokens + SLACK,
            "state_bytes": 4 * LOOK_AHEAD * tokens,
        }


def one_layer(query: Tensor, key: Tensor) -> Tensor:
    """One layer by the package's definition in plain PyTorch."""
    state = spk.new_state(1, LOOK_AHEAD, key.shape[2])
    return spk.score_layer_(state, query, key, backend="reference")


def select_rows(tokens: int, threads: int, clocks: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """select_tokens on a state of all look-ahead rows and of one, and select_chunks, from cold and from warm caches."""
    torch.set_num_threads(threads)
    ids = torch.arange(tokens)[None] * 7 + 1
    generator = torch.Generator().manual_seed(0)
    for rows in (LOOK_AHEAD, 1, 0):
        state = torch.rand(1, max(rows, 1), tokens, generator=generator)
        importance = state.mean(1)
        scores = eager.chunk_scores(importance[0], CHUNK)
        copied, ranked = torch.empty_like(importance), torch.sort(scores)
        if rows:
            check_selection(state, ids, rows)
        else:
            check_chunks(importance)

        def ours(state: Tensor = state, importance: Tensor = importance, rows: int = rows) -> object:
            if rows == 0:
                return spk.select_chunks(importance, keep_ratio=KEEP_RATIO, chunk_size=CHUNK, backend="cpu")
            return spk.select_tokens(state, ids, keep_ratio=KEEP_RATIO, chunk_size=CHUNK, backend="cpu")

        def bound(
            importance: Tensor = importance,
            scores: Tensor = scores,
            copied: Tensor = copied,
            ranked: Any = ranked,
        ) -> None:
            copied.copy_(importance)
            torch.sort(scores, out=ranked)

        count = traffic.kept_tokens(tokens, KEEP_RATIO, CHUNK) // CHUNK
        plain = partial(eager.select_tokens, state[0], ids[0], count, CHUNK) if rows else None
        if rows:
            problems.compare(f"eager, {tokens} tokens", *eager.selection_check(state[0], ids[0], count, CHUNK), 2e-6)
        for caches, ticks in clocks.items():
            calls: dict[str, Callable[[], object]] = {"select": ours, "bound": bound}
            if plain is not None:
                calls |= {"eager": plain, "compiled": compiled_call(state, ids, rows)}
            times = measure.in_turn(ticks, calls, seconds)
            yield {
                "op": "select_tokens" if rows else "select_chunks",
                "tokens": tokens,
                "threads": threads,
                "rows": rows or None,
                "caches": caches,
                "seconds": times["select"].json(),
                "bound_seconds": times["bound"].json(),
                "to_bound": times["select"].p50 / times["bound"].p50,
                "over_eager": times["eager"].p50 / times["select"].p50 if plain is not None else None,
                "compiled_to_bound": times["compiled"].p50 / times["bound"].p50 if plain is not None else None,
            }


def compiled_call(state: Tensor, ids: Tensor, rows: int) -> Callable[[], object]:
    """The C interface's function alone, as an engine calls it: on outputs that are there, arguments made once; its
    outputs have been checked."""
    compiled, budget = _native.module(), Budget(KEEP_RATIO, None, None, CHUNK, "ceil", 0, 0)
    importance = finalize.new_importance(state)
    selection = select.new_selection(importance, None, budget)
    packed = gather.new_packed(ids, selection[0], False, 1)
    arguments = (
        finalize.arguments(compiled, state, None, None, "mean", 1, "zero", importance),
        select.arguments(compiled, importance, None, None, budget, selection),
        gather.token_arguments(compiled, ids, selection[0], selection[1], None, 1, packed),
    )
    threads, held = torch.get_num_threads(), (importance, selection, packed)

    def call(_held: object = held) -> None:
        compiled.select_tokens(*arguments, threads)

    for output in (importance, *selection, *packed):
        output.zero_()
    call()
    _check_kept(
        f"the compiled call, {state.shape[2]} tokens, {rows} rows", state, ids, importance, selection[1], packed
    )
    return call


def check_selection(state: Tensor, ids: Tensor, rows: int) -> None:
    """Refuse a wrong selection before it is timed: the kept ids are those of the best chunks of this importance."""
    packed, selection, importance = spk.select_tokens(
        state, ids, keep_ratio=KEEP_RATIO, chunk_size=CHUNK, backend="cpu"
    )
    name = f"select_tokens, {state.shape[2]} tokens, {rows} rows"
    _check_kept(name, state, ids, importance, selection.num_kept, (packed.values, packed.position_ids))


def _check_kept(
    name: str, state: Tensor, ids: Tensor, importance: Tensor, num_kept: Tensor, packed: Sequence[Tensor]
) -> None:
    wanted = problems._kept(importance[0])
    problems.compare(name, [importance[0]], [state[0].double().mean(0)], 2e-6)
    found = [num_kept, *(one[: len(wanted)] for one in packed[:2])]
    problems.compare(f"{name}, kept", found, [torch.tensor([len(wanted)]), ids[0, wanted], wanted], 0)


def check_chunks(importance: Tensor) -> None:
    """The same of select_chunks: the positions of the best chunks."""
    found = spk.select_chunks(importance, keep_ratio=KEEP_RATIO, chunk_size=CHUNK, backend="cpu")
    wanted = problems._kept(importance[0])
    results = [found.num_kept, found.indices[0, : len(wanted)]]
    problems.compare(f"select_chunks, {importance.shape[1]} tokens", results, [torch.tensor([len(wanted)]), wanted], 0)


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a goal: how many of its rows reach it, and the worst of them."""
    score = [row for row in rows if row["op"] == "score_layers"]
    measured = [row for row in score if row["peak_bytes"] is not None]
    chosen = [row for row in rows if row["op"] == "select_tokens"]
    judged = [
        (f"score_layers_ <= {MATMUL}x the bare matmul", score, "to_matmul", MATMUL, True),
        (f"score_layers_ >= {EAGER:g}x faster than the eager definition", score, "over_definition", EAGER, False),
        ("the same, than the leanest eager form", score, "over_eager", EAGER, False),
    ]
    for caches in ("warm", "cold"):
        for count in (1, LOOK_AHEAD):
            mine = [row for row in chosen if (row["rows"], row["caches"]) == (count, caches)]
            name = f"select_tokens, {count} row{'s' * (count > 1)}, {caches}, <= {SELECT}x copy + sort"
            judged.append((name, mine, "to_bound", SELECT, True))
            judged.append(("the same, the compiled call alone", mine, "compiled_to_bound", SELECT, True))
    found = []
    for goal, mine, value, limit, low in judged:
        values = sorted(row[value] for row in mine)
        if values:
            met = sum(v <= limit if low else v >= limit for v in values)
            worst = values[-1] if low else values[0]
            found.append(
                {"goal": goal, "met": met, "of": len(values), "worst": worst, "median": statistics.median(values)}
            )
    if measured:
        met = sum(row["peak_bytes"] <= row["peak_limit"] for row in measured)
        worst = max(row["peak_bytes"] / row["peak_limit"] for row in measured)
        middle = statistics.median(row["peak_bytes"] / row["peak_limit"] for row in measured)
        goal = "peak extra memory <= weights of one KV head + state + 4 MiB"
        found.append({"goal": goal, "met": met, "of": len(measured), "worst": worst, "median": middle})
    return found


def line(row: dict[str, Any]) -> str:
    if row["op"] == "score_layers":
        layers = f"{row['layers']}/{row['of_layers']}"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        return (
            f"{row['model']:14}{size_name(row['tokens']):>6} {row['dtype']:9}{layers:>6}{row['threads']:3}t"
            f"{1e3 * row['seconds']['p50']:10.2f} ms   matmul x{row['to_matmul']:5.2f} ({row['matmul_form']})"
            f"   definition /{row['over_definition']:5.1f}, lean eager /{row['over_eager']:5.1f}   peak {peak} MiB"
        )
    what = row["op"] + (f" {row['rows']} rows" if row["rows"] else "")
    return (
        f"{what:22}{size_name(row['tokens']):>6} {row['caches']:5}{row['threads']:3}t"
        f"{1e6 * row['seconds']['p50']:10.1f} us   copy + sort x{row['to_bound']:5.2f}"
        + (f", the compiled call alone x{row['compiled_to_bound']:5.2f}" if row["compiled_to_bound"] else "")
    )


def table(found: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{v['goal']:60} {v['met']:3} of {v['of']:3}   median {v['median']:6.2f}   worst {v['worst']:6.2f}"
        f"{'' if v['met'] == v['of'] else '   NOT REACHED everywhere'}"
        for v in found
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--shapes", choices=tuple(GRIDS), default="full")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", default="", help="only models whose name contains this; 'select' for no scores")
    parser.add_argument(
        "--key-mib", type=int, default=0, help="MiB of all layers' keys (default: half of what is free)"
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="of timing a row")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(argv)
    grid: Grid = GRIDS["quick" if options.quick else options.shapes]
    seconds = 0.0 if options.quick else options.seconds
    threads = [int(n) for n in options.threads.split(",")]
    before, started = torch.get_num_threads(), time.monotonic()
    clocks = {name: measure.clock("cpu", options.quick, cold=name == "cold") for name in ("cold", "warm")}
    report: dict[str, Any] = {
        "environment": environment("cpu"),
        "command": command("python -m bench.score_goals", sys.argv[1:] if argv is None else argv),
    }
    rows: list[dict[str, Any]] = report.setdefault("rows", [])
    options.out.mkdir(parents=True, exist_ok=True)

    def keep(new: Iterator[dict[str, Any]]) -> None:
        for row in new:
            rows.append(row)
            print(f"{time.monotonic() - started:6.0f} s  {line(row)}", flush=True)
            report["verdicts"] = verdicts(rows)
            # After every row: what has been measured is not lost when time runs out.
            (options.out / "score_goals.json").write_text(json.dumps(report, indent=1) + "\n")

    try:
        if options.only in "select_tokens":
            for tokens in grid.long:
                for count in threads:
                    keep(select_rows(tokens, count, clocks, seconds / 3))
        for m in grid.models:
            for tokens in grid.prompts:
                for dtype in grid.dtypes:
                    if options.only in m.name:
                        share = options.key_mib * 2**20 or grid.key_bytes or memory.free_bytes("cpu") // 2
                        kind = getattr(torch, dtype)
                        keep(score_row(m, tokens, kind, threads, share, clocks["cold"], seconds))
    finally:
        torch.set_num_threads(before)
    print("\n" + table(report.get("verdicts", [])))
    return 0 if rows else 2


if __name__ == "__main__":
    sys.exit(main())
