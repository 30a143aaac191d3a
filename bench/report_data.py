"""Reads what the tools of this folder wrote; whatever is not there is simply absent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# name in the report -> file; ops*.json are pytest-benchmark's, of which there may be several (a CPU's, a GPU's)
FILES = {
    "goals": "score_goals.json",
    "peers": "peers.json",
    "scaling": "scaling.json",
    "ttft": "ttft.json",
    "roofline": "roofline.json",
    "timing": "timing.json",
}


@dataclass
class Results:
    """Attributes:
    files: report name -> parsed file.
    ops: every benchmark's `extra_info`, with "environment" of its file.
    ceilings: of each device and number of threads, from whichever file has them.
    unreadable: a line for each file that is there and cannot be read.
    """

    folder: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    ops: list[dict[str, Any]] = field(default_factory=list)
    ops_files: list[dict[str, Any]] = field(default_factory=list)
    ceilings: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a file that were measured: those skipped or failed are left out."""
        rows = self.files.get(name, {}).get("rows", [])
        return [row for row in rows if isinstance(row, dict) and not {"skipped", "failed"} & set(row)]

    def left_out(self, name: str) -> list[dict[str, Any]]:
        rows = self.files.get(name, {}).get("rows", [])
        return [row for row in rows if isinstance(row, dict) and {"skipped", "failed"} & set(row)]

    def environments(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(file's name, environment) of everything that was read."""
        for name, found in self.files.items():
            if "environment" in found:
                yield FILES[name], found["environment"]
        for found in self.ops_files:
            yield found["_file"], found["environment"]

    def empty(self) -> bool:
        return not self.files and not self.ops


def load(folder: Path) -> Results:
    results = Results(folder)
    for name, file in FILES.items():
        found = _parsed(folder / file, results)
        if found is not None:
            results.files[name] = found
    for path in sorted(folder.glob("ops*.json")):
        found = _parsed(path, results)
        if found is None or "benchmarks" not in found:
            continue
        found["_file"] = path.name
        found.setdefault("environment", {})
        results.ops_files.append(found)
        results.ceilings += found.get("ceilings", [])
        for one in found["benchmarks"]:
            info = one.get("extra_info", {})
            if "seconds" in info:
                results.ops.append(info | {"environment": found["environment"]})
    known = {(row.get("device"), row.get("threads")) for row in results.ceilings}
    for row in results.files.get("roofline", {}).get("ceilings", []):
        if (row.get("device"), row.get("threads")) not in known:
            results.ceilings.append(row)
    return results


def _parsed(path: Path, results: Results) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        results.unreadable.append(f"{path.name}: {error}")
        return None
    if not isinstance(found, dict):
        results.unreadable.append(f"{path.name}: not a report")
        return None
    return found
