"""Which rows one command measures, and what they are written to reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bench.ttft_models import title
from bench.ttft_rows import Work

KEEPS = (0.05, 0.1, 0.2, 0.3)
QUICK = (Work("tiny", "tiny-base", 600, (0.1, 0.3), base_layers=2),)

# What a GPU is asked within nine minutes: the goals first. Layers of the large bases are few, since all their layers
# are alike. Seconds that the arithmetic takes on an H100 (600 TFLOP/s in matrix products, 360 in attention), a round:
#   8B -> 405B, 32K           full 56.2, timed by 1 of 126 layers: 0.45; speculator 1.5; 10% kept 4.5, by 1 layer 0.04
#   0.6B -> 32B, 128K         full 63.7, timed by 1 of 64 layers: 1.0; speculator 5.7; 5% kept 0.8, by 1 layer 0.01
#   the same, sparse          speculator 0.5 and what choosing blocks takes
#   1B -> 8B, 32K             full 1.5; speculator 0.3; 10% kept 0.1
# Three rounds of each: 6, 20, 5 and 6 s, beside about 25 s to import and to draw weights. So 0.6B -> 32B allows no
# more than 63.7 / (5.7 + 0.8) = 9.8 with dense speculator attention, and 8B -> 405B no more than 9.3.
GPU = (
    Work("llama-8b", "llama-405b", 32768, (0.1,), base_layers=1),
    Work("qwen3-0.6b", "qwen3-32b", 131072, (0.05,), attention="sparse", base_layers=1),
    Work("qwen3-0.6b", "qwen3-32b", 131072, (0.05,), base_layers=1),
    Work("llama-1b", "llama-8b", 32768, (0.1,)),
)
# Everything, short prompts first: 620 s of arithmetic on an H100 with dense attention, half of it at 128K.
GPU_FULL = tuple(
    Work(speculator, base, tokens, KEEPS, attention=attention, base_layers=layers)
    for tokens in (4096, 8192, 16384, 32768, 65536, 131072)
    for attention in ("dense", "sparse")
    for speculator, base, layers in (
        ("qwen3-0.6b", "qwen3-32b", 2),
        ("llama-8b", "llama-405b", 1),
        ("llama-1b", "llama-8b", None),
        ("llama-8b", "llama-70b", 2),
    )
    if attention == "dense" or tokens > 4096  # shorter prompts are read densely
)
# On two CPU cores: short prompts, few layers of what is large. At 280 GFLOP/s in fp32: 3, 3, 3 and 14 minutes.
CPU = (
    Work("smollm2-135m", "llama-1b", 4096, KEEPS),
    Work("llama-1b", "llama-8b", 4096, KEEPS, base_layers=2),
    Work("qwen3-0.6b", "qwen3-32b", 4096, KEEPS, base_layers=1),
    Work("llama-1b", "llama-8b", 16384, KEEPS, base_layers=1),
)
PLANS: Mapping[str, Sequence[Work]] = MappingProxyType({"gpu": GPU, "gpu-full": GPU_FULL, "cpu": CPU, "quick": QUICK})


@dataclass(frozen=True)
class Goal:
    """A least ratio of a pair at a budget on a GPU, and who reported it."""

    speculator: str
    base: str
    keep: float
    least_tokens: int
    ratio: float
    source: str


GOALS = (
    Goal("llama-8b", "llama-405b", 0.1, 32768, 7.66, "the paper, 405B"),
    Goal("qwen3-0.6b", "qwen3-32b", 0.05, 131072, 10.4, "PFlash, 27B at 128K"),
)


def reached(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each row on a GPU that has a goal: said, never a reason to fail."""
    lines = []
    for row in rows:
        for goal in GOALS:
            same = (row["speculator"], row["base"]) == (title(goal.speculator), title(goal.base))
            if not same or row["keep_ratio"] != goal.keep or row["tokens"] < goal.least_tokens:
                continue
            if not str(row["device"]).startswith("cuda"):
                continue
            met = row["ratio"] > goal.ratio
            lines.append(
                f"{row['speculator']} -> {row['base']}, {row['tokens']} tokens, keep {row['keep_ratio']:g}, "
                f"speculator attention {row['speculator_attention_ran']}: {row['ratio']:.2f}x, goal {goal.ratio:g}x "
                f"({goal.source}), limit {row['limit']:.2f}x{'' if met else ', NOT REACHED'}"
            )
    return lines
