"""What the GPU kernels are written to reach, and whether a table's rows do: said, never a reason to fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """For an op on long prompts: a least part of a copy's rate, or most microseconds as a CUDA graph."""

    op: str
    ends: str  # of the shape's name
    of_copy: float = 0.0
    graph_us: float = 0.0


LONG = "128K"
GOALS = (
    Goal("score_layer", f"{LONG} lse", of_copy=0.8),  # keys are read once
    Goal("score_layer", LONG, of_copy=0.55),  # and twice, the second time partly out of a cache
    Goal("select_tokens", f"{LONG} ids", graph_us=30),  # from the state to packed tokens
)


def reached(rows: list[dict[str, Any]], backend: str = "cuda") -> list[str]:
    """A line for each row of the backend that has a goal and was timed."""
    lines = []
    for row in rows:
        for goal in GOALS:
            fits = row["op"] == goal.op and row["shape"].endswith(goal.ends) and row["backend"] == backend
            if not fits or "seconds" not in row:
                continue
            if goal.of_copy:
                met, text = row["of_copy"] >= goal.of_copy, f"{row['of_copy']:.0%} of a copy, goal {goal.of_copy:.0%}"
            else:
                us = 1e6 * row.get("graph_seconds", row["seconds"])["p50"]
                met, text = us <= goal.graph_us, f"{us:.1f} us, goal {goal.graph_us:.0f} us"
            lines.append(f"{row['op']} {row['shape']} on {backend}: {text}{'' if met else ', NOT REACHED'}")
    return lines
