"""Readings and comparisons for the tests of page, picture and table, from random numbers and hostile text."""

from __future__ import annotations

import itertools
import random

from specprefill_kernels.report.data import (
    Comparison,
    LayerImportance,
    Measured,
    Protected,
    Reading,
    make_pieces,
)

NASTY = '<script>alert("1")</script> & "quotes" \'single\' </span></i> $css ${js} 語😀\n\n  end </body> <!-- ]]> \u2028'
WORDS = "The quick brown fox jumps over the lazy dog, and <b>nobody</b> & 'nothing' minds it at all.\n\n"
EVIDENCE = (40, 45)
CHUNK = 8
# Chunks 0, 3, 6, ... are kept; beside them a few protected tokens in the middle of chunk 4, and the last token.
PROTECTED = (Protected(0, 3, "markers"), Protected(3, 6, "system <prompt>"), Protected(34, 37, "markers"))


def measured(**changes: object) -> Measured:
    values = {"ttft": 8.0, "seconds": {"tokenize": 0.01, "base_prefill": 7.99}, "tokens_read": 100, "answer": "yes",
              "right": True, "rounds": [7.0, 9.0]}  # fmt: skip
    return Measured(**{**values, **changes})


def offsets_of(text: str, seed: int = 0) -> list[tuple[int, int]]:
    cuts = sorted({0, len(text), *random.Random(seed).sample(range(len(text)), len(text) // 3)})
    return list(itertools.pairwise(cuts))


def values(text: str = NASTY * 8, seed: int = 0, layers: int = 0) -> dict:
    rng = random.Random(seed)
    offsets = offsets_of(text, seed)
    total = len(offsets)
    kept = [token // CHUNK % 3 == 0 or any(part.start <= token < part.end for part in PROTECTED)
            for token in range(total)]  # fmt: skip
    kept[-1] = True
    rows = [[rng.random() ** 8 * (layer + 1) for _ in offsets] for layer in range(layers)]
    importance = [max(row[token] for row in rows) if rows else rng.random() ** 6 for token in range(total)]
    return {
        "title": "A <b>title</b> for $5",
        "question": "Is <i>this</i> & that escaped?",
        "base": "Base <1.5B>",
        "speculator": "Small & fast",
        "prompt_tokens": total,
        "kept_tokens": sum(kept),
        "budget": "keep ratio 0.34",
        "chunk_size": CHUNK,
        "mode": "sparse",
        "reason": "kept <some>",
        "backend": "cpu",
        "pieces": make_pieces(text, offsets, importance, kept),
        "seconds": {"tokenize": 0.01, "speculator_prefill": 1.5, "select": 0.001},
        "layers": LayerImportance(range(10, 10 + layers), rows) if layers else None,
        "machine": "a <machine>",
        "command": "specprefill demo",
        "version": "1",
    }


def reading(text: str = NASTY * 8, seed: int = 0, layers: int = 0, **changes: object) -> Reading:
    return Reading(**{**values(text, seed, layers), **changes})


def comparison(text: str = NASTY * 8, seed: int = 0, layers: int = 0, **changes: object) -> Comparison:
    common = values(text, seed, layers)
    stages = {"tokenize": 0.01, "speculator_prefill": 1.0, "look_ahead": 0.2, "score": 0.05, "select": 0.001,
              "base_prefill": 0.74}  # fmt: skip
    common["full"] = measured(answer="<img src=x onerror=alert(1)>", right=True)
    common["sparse"] = measured(ttft=2.0, seconds=stages, tokens_read=common["kept_tokens"], answer="no & no",
                                right=False)  # fmt: skip
    return Comparison(**{**common, **changes})


def full(**changes: object) -> Reading:
    """A page with everything on it: 5 layers (10 to 14), protected spans, evidence, hostile text."""
    return comparison(WORDS * 14 + NASTY, layers=5, **{"protected": PROTECTED, "evidence": [EVIDENCE], **changes})
