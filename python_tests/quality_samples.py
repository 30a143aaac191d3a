"""Samples and records made by hand for the tests of the quality harness."""

from __future__ import annotations

from specprefill_kernels.quality.records import Record
from specprefill_kernels.quality.tasks import Sample

FILLER = "Nothing of note is said in this line. "
NEEDLE = "The code of the door is 4711."


def sample(seed: int = 0, *, task: str = "door", lines: int = 12, place: int = 5, **changes) -> Sample:
    """A needle between lines of filler, its characters as evidence."""
    before = FILLER * place
    text = before + NEEDLE + " " + FILLER * (lines - place) + f"\nPrompt {seed}. What is the code of the door?"
    fields = {
        "task": task, "seed": seed, "prompt": text, "answers": ("4711",),
        "evidence": ((len(before), len(before) + len(NEEDLE)),), "metric": "contains_all", "max_new_tokens": 4,
        "context_tokens": len(text), "prompt_tokens": len(text),
    }  # fmt: skip
    return Sample(**{**fields, **changes})


def record(seed: int = 0, method: str = "kept", keep_ratio: float = 0.3, score: float = 1.0, **changes) -> Record:
    fields = {
        "task": "door", "seed": seed, "method": method, "keep_ratio": 1.0 if method == "full" else keep_ratio,
        "metric": "contains_all", "score": score, "answer": "4711", "new_tokens": 3, "prompt_tokens": 100,
        "kept_tokens": 100 if method == "full" else round(100 * keep_ratio),
        "mode": "dense" if method == "full" else "sparse", "reason": "", "evidence": 1.0,
        "seconds": {"base_prefill": 1.0, "decode": 2.0}, "ttft": 1.0,
    }  # fmt: skip
    return Record(**{**fields, **changes})
