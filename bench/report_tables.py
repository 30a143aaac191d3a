"""The report's tables, as Markdown. Each takes the results and returns "" where it has nothing to show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.environment import describe
from bench.report_data import FILES, Results
from bench.shapes import size_name

DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16", "float8_e4m3fn": "e4m3", "int64": "int64"}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns are aligned left, the others right."""
    lines = [list(row) for row in rows]
    if not lines:
        return ""
    marks = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), marks, *lines])


def time(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        value = seconds * factor
        if value >= 1 or unit == "us":
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    raise AssertionError("unreachable")


def size(nbytes: float | None) -> str:
    if nbytes is None:
        return "?"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def dtype(name: str) -> str:
    return DTYPES.get(name, name)


def machine(results: Results) -> str:
    """Hardware, versions, commit and command of every file."""
    rows = []
    for file, environment in results.environments():
        reports = {FILES[name]: found for name, found in results.files.items()}
        reports |= {found["_file"]: found for found in results.ops_files}
        report = reports[file]
        rows.append((f"`{file}`", describe(environment), "<br>".join(f"`{one}`" for one in _commands(report))))
    return markdown(("file", "measured on", "command"), rows, left=3)


def _commands(report: dict[str, Any]) -> list[str]:
    """The file's, and those of its rows where several runs filled it."""
    rows = [row for row in report.get("rows", []) if isinstance(row, dict)]
    return list(dict.fromkeys(one["command"] for one in (report, *rows) if "command" in one))


def ceilings(results: Results) -> str:
    """What the roofline's fractions are fractions of."""
    rows = []
    for found in results.ceilings:
        streams = {way: found.get(way, {}).get("memory", 0.0) / 1e9 for way in ("copy", "read")}
        products = {name: found.get("matmul", {}).get(name, 0.0) / 1e9 for name in ("float32", "bfloat16")}
        figures = [f"{value:.1f}" for value in streams.values()] + [f"{value:.0f}" for value in products.values()]
        rows.append((found["device"], str(found["threads"]), *figures))
    header = ("device", "threads", "copy, GB/s", "read, GB/s", "fp32 matmul, GFLOP/s", "bf16 matmul, GFLOP/s")
    return markdown(header, rows)


def goals(results: Results) -> str:
    found = results.files.get("goals", {}).get("verdicts", [])
    rows = [
        (
            v["goal"],
            f"{v['met']} of {v['of']}",
            f"{v['median']:.2f}",
            f"{v['worst']:.2f}",
            "yes" if v["met"] == v["of"] else "no",
        )
        for v in found
    ]
    return markdown(("goal", "shapes that reach it", "median", "worst", "reached"), rows)


def score(results: Results) -> str:
    """One line for each model and length: times the bare matmul, and how much faster than the definition and than the
    leanest eager form."""
    measured = [row for row in results.rows("goals") if row["op"] == "score_layers"]
    kinds = list(dict.fromkeys((row["dtype"], row["threads"]) for row in measured))
    keyed: dict[tuple[str, int], dict[tuple[str, int], dict[str, Any]]] = {}
    for row in measured:
        keyed.setdefault((row["model"], row["tokens"]), {})[row["dtype"], row["threads"]] = row
    header = ["model", "tokens", *(f"{dtype(kind)}, {count} thread{'s' * (count > 1)}" for kind, count in kinds)]
    rows = []
    for (model, tokens), by_kind in keyed.items():
        cells = []
        for kind in kinds:
            if kind not in by_kind:
                cells.append("")
                continue
            one = by_kind[kind]
            layers = "" if one["layers"] == one["of_layers"] else f" ({one['layers']}/{one['of_layers']} layers)"
            factors = [f"{one['to_matmul']:.2f}", f"{one['over_definition']:.1f}", f"{one['over_eager']:.1f}"]
            spent, near = time(one["seconds"]["p50"]), " / ".join(factors)
            cells.append(f"{spent}{layers}: {near}")
        rows.append((model, size_name(tokens), *cells))
    return markdown(header, rows, left=2)


def select(results: Results) -> str:
    measured = [row for row in results.rows("goals") if row["op"] != "score_layers"]
    rows = [
        (
            row["op"] + (f", {row['rows']} row{'s' * (row['rows'] > 1)}" if row["rows"] else ""),
            size_name(row["tokens"]),
            row["caches"],
            str(row["threads"]),
            time(row["seconds"]["p50"]),
            time(row["bound_seconds"]["p50"]),
            f"{row['to_bound']:.2f}",
            f"{row['compiled_to_bound']:.2f}" if row.get("compiled_to_bound") else "",
            f"{row['over_eager']:.1f}x" if row.get("over_eager") else "",
        )
        for row in measured
    ]
    header = (
        "op",
        "tokens",
        "caches",
        "threads",
        "time",
        "copy + sort",
        "times",
        "compiled call alone",
        "faster than eager",
    )
    return markdown(header, rows, left=1)


def ops(results: Results) -> str:
    rows = [
        (
            row["op"],
            row["shape"],
            row["backend"] + " graph" * bool(row.get("graph")),
            str(row["threads"]),
            time(row["seconds"]["p50"]),
            f"{row['gbps']:.1f}",
            f"{row['gflops']:.1f}",
            f"{row['roofline_fraction']:.0%}",
            size(row["peak_bytes"]),
            f"{row['ratios']['eager']:.1f}x" if "eager" in row.get("ratios", {}) else "",
        )
        for row in results.ops
    ]
    header = ("op", "shape", "backend", "threads", "time", "GB/s", "GFLOP/s", "of the roofline", "peak memory", "eager")
    return markdown(header, rows, left=3)


def peers(results: Results) -> str:
    rows = [
        (
            row["op"],
            row["shape"],
            str(row["threads"]),
            row["peer"],
            time(row["seconds"]) + _layers(row),
            f"{row['ratio']:.2f}x",
            size(row["peak_bytes"]),
            f"{row['kept_overlap']:.3f}" if "kept_overlap" in row else "",
        )
        for row in results.rows("peers")
    ]
    header = ("what", "shape", "threads", "by", "time", "to ours", "peak memory", "kept as fp64 keeps")
    return markdown(header, rows, left=2)


def _layers(row: dict[str, Any]) -> str:
    few = row.get("layers_run", 1) != row.get("layers", 1)
    return f" (from {row['layers_run']} of {row['layers']} layers)" if few else ""


def peers_compute(results: Results) -> str:
    """What each peer computes that the others do not, and those that could not be measured."""
    every = [*results.rows("peers"), *results.left_out("peers")]
    what = dict.fromkeys((row["peer"], row["computes"]) for row in every)
    lines = [f"- **{peer}**: {computes}." for peer, computes in what]
    absent = dict.fromkeys(
        f"- {row['peer']} was not measured{_on(row)}: {row['skipped']}." for row in results.left_out("peers")
    )
    return "\n".join([*lines, *absent])


def _on(row: dict[str, Any]) -> str:
    return f" on {row['shape']}" if row.get("shape") else ""


def timing(results: Results) -> str:
    """bench.timing's table, which a GPU machine's check makes."""
    rows = [
        (
            row["op"],
            row["shape"],
            row["backend"],
            time(row["seconds"]["p50"]),
            time(row["graph_seconds"]["p50"]) if "graph_seconds" in row else "",
            f"{row['rate'] / 1e9:.0f}",
            f"{row['of_copy']:.0%}",
            *(f"{row[name]:.1f}x" if name in row else "" for name in ("faster_than_eager", "faster_than_triton")),
        )
        for row in results.rows("timing")
        if "seconds" in row
    ]
    header = ("op", "shape", "backend", "time", "as a graph", "GB/s", "of a copy", "to eager", "to triton")
    return markdown(header, rows, left=3)


def scaling(results: Results) -> str:
    found = results.files.get("scaling", {}).get("fits", {})

    def power(fit: dict[str, Any], name: str) -> str:
        exponent, interval = fit.get(f"{name}_exponent"), fit.get(f"{name}_interval95")
        if exponent is None:
            return ""
        return f"{exponent:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")

    rows = [
        (
            op,
            power(fit, "time"),
            power(fit, "upper"),
            power(fit, "copy"),
            power(fit, "memory"),
            "" if fit.get("peak_bytes_per_token") is None else f"{fit['peak_bytes_per_token']:.1f}",
        )
        for op, fit in found.items()
    ]
    header = ("op", "time: exponent [95%]", "longer half", "of a copy", "memory: exponent", "bytes a token")
    return markdown(header, rows)


def layers_timed(row: Mapping[str, Any]) -> str:
    """The base's layers; the speculator's too where they are not all."""
    found = row.get("layers_measured", {})
    shown = {name for name, text in found.items() if name == "base" or len(set(text.split(" of "))) > 1}
    return ", ".join(f"{name} {found[name]}" for name in ("base", "speculator") if name in shown)


def notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What rows say about themselves, each once."""
    return list(dict.fromkeys(row["note"] for row in rows if row.get("note")))


def ttft(results: Results) -> str:
    measured = [row for row in results.rows("ttft") if {"full_seconds", "speculative_seconds", "ratio"} <= set(row)]
    rows = [
        (
            f"{row.get('speculator', '?')} -> {row.get('base', '?')}",
            f"{row.get('device', '?')}, {dtype(row.get('dtype', '?'))}, {row.get('weights', '?')} weights"
            + ("" if row.get("preset", "default") == "default" else f", preset {row['preset']}"),
            str(row.get("tokens", "?")),
            f"{row.get('keep_ratio', 0):g}",
            str(row.get("speculator_attention_ran", "")),
            time(row["full_seconds"]),
            time(row["speculative_seconds"]),
            f"{row['ratio']:.2f}x",
            f"{row['limit']:.2f}x" if row.get("limit") else "",
            layers_timed(row),
        )
        for row in measured
    ]
    header = (
        "speculator -> base",
        "measured",
        "tokens",
        "keep",
        "speculator's attention",
        "full",
        "speculative",
        "ratio",
        "limit",
        "layers timed",
    )
    under = [*notes(measured), *results.files.get("ttft", {}).get("warnings", [])] if rows else []
    return "\n\n".join(filter(None, [markdown(header, rows, left=2), "\n".join(f"- {note}" for note in under)]))
