"""One page and its pictures from whatever results a folder holds.

    python -m bench.report                       reads bench/results, writes report.md and PNG files there
    python -m bench.report FOLDER --out OTHER
    python -m bench.report --readme              also puts tables between the markers of bench/README.md and README.md

A marker is a pair of comments, <!-- bench:NAME --> and <!-- /bench:NAME -->; what stands between is replaced by the
table NAME (see TABLES), or left as it is where there are no results for it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench import report_tables as tables
from bench.report_data import FILES, Results, load

ROOT = Path(__file__).resolve().parents[1]
READMES = (ROOT / "bench" / "README.md", ROOT / "README.md")
# name -> title, what to say above it, the table
TABLES: dict[str, tuple[str, str, Callable[[Results], str]]] = {
    "machine": ("Where the figures come from", "", tables.machine),
    "ceilings": (
        "The machine's ceilings",
        "Measured with plain torch, out of cache. A fraction of the roofline is max(bytes / faster stream, operations "
        "/ faster matmul) over the measured time; on warm caches the stream is one of as many bytes.",
        tables.ceilings,
    ),
    "goals": ("Goals on the CPU", "Each in turn with what it is compared with, in one run.", tables.goals),
    "score": (
        "Scoring",
        "`score_layers_`: median time: times the bare QK^T matmul by torch (less is better) / times faster than the "
        "eager definition (more is better). Cold caches.",
        tables.score,
    ),
    "select": (
        "Selecting",
        "Beside a copy of the importance and torch.sort of the chunks' scores.",
        tables.select,
    ),
    "peers": (
        "Peers",
        "In turn with this library, in one process. The last column is the share of the tokens that an fp64 run keeps.",
        tables.peers,
    ),
    "peers_compute": ("What each computes", "", tables.peers_compute),
    "scaling": ("Growth", "Exponents of T, from 1K tokens on.", tables.scaling),
    "ttft": (
        "Time to first token",
        "The limit is what the two models' own costs allow. Where fewer layers of the base were timed than it has, its "
        "time was multiplied.",
        tables.ttft,
    ),
    "timing": ("The first table of a GPU check", "", tables.timing),
    "ops": ("Every microbenchmark", "Medians; `eager` is how many times faster than the plain form.", tables.ops),
}


def page(results: Results, pictures: list[tuple[str, str]]) -> str:
    """The whole report."""
    parts = ["# Benchmarks", ""]
    on_gpu = any(environment.get("device") == "cuda" for _, environment in results.environments())
    if not on_gpu:
        parts += ["Nothing here was measured on a GPU.", ""]
    for name, (title, text, make) in TABLES.items():
        table = make(results)
        if not table:
            continue
        parts += [f"## {title}", ""]
        parts += [text, ""] if text else []
        parts += [table, ""]
        if name == "score":
            parts += _pictures(pictures, ("latency.png", "roofline.png", "matmul.png", "eager.png", "memory.png"))
        elif name in ("select", "peers", "scaling", "ttft"):
            wanted = {"select": "tail.png"}.get(name, f"{name}.png")
            parts += _pictures(pictures, (wanted,))
    shown = "\n".join(parts)
    rest = [picture for picture in pictures if picture[0] not in shown]
    if rest:
        parts += ["## More pictures", "", *_pictures(rest, tuple(name for name, _ in rest))]
    absent = [file for name, file in FILES.items() if name not in results.files and name != "timing"]
    absent += [] if results.ops_files else ["ops*.json"]
    if absent:
        parts += [f"Not in this folder: {', '.join(absent)}.", ""]
    parts += [f"Could not be read: {line}" for line in results.unreadable]
    return "\n".join(parts).rstrip() + "\n"


def _pictures(pictures: list[tuple[str, str]], wanted: tuple[str, ...]) -> list[str]:
    lines = []
    for name, caption in pictures:
        if name in wanted:
            lines += [f"![{caption}]({name})", "", f"*{caption}*", ""]
    return lines


def fill(text: str, results: Results) -> tuple[str, list[str]]:
    """The text with its markers' contents made anew, and the names that were."""
    filled: list[str] = []

    def put(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise ValueError(f"<!-- bench:{name} -->: expected one of {', '.join(TABLES)}")
        table = TABLES[name][2](results)
        if not table:
            return found[0]
        filled.append(name)
        return f"<!-- bench:{name} -->\n{table}\n<!-- /bench:{name} -->"

    pattern = r"<!-- bench:(?P<name>\w+) -->.*?<!-- /bench:(?P=name) -->"
    return re.sub(pattern, put, text, flags=re.DOTALL), filled


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "bench" / "results")
    parser.add_argument("--out", type=Path, help="where the page goes (default: the same folder)")
    parser.add_argument("--readme", action="store_true", help="fill the markers of the READMEs too")
    parser.add_argument("--files", type=Path, nargs="+", default=list(READMES), help="which files --readme fills")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(argv)
    results = load(options.folder)
    if results.empty():
        print(
            f"bench.report: no results in {options.folder}: {', '.join([*FILES.values(), 'ops*.json'])}",
            file=sys.stderr,
        )
        return 2
    out = options.out or options.folder
    out.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, str]] = []
    if not options.no_plots:
        from bench import plots

        pictures = plots.draw(results, out)
    (out / "report.md").write_text(page(results, pictures), encoding="utf-8")
    print(f"{out / 'report.md'}, {len(pictures)} pictures")
    for line in results.unreadable:
        print(f"could not be read: {line}", file=sys.stderr)
    if options.readme:
        for file in options.files:
            text, filled = fill(file.read_text(encoding="utf-8"), results)
            file.write_text(text, encoding="utf-8")
            print(f"{file}: {', '.join(filled) or 'no marker to fill'}")
    return 1 if results.unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
