"""Made-up files of results in the shapes that the tools of bench/ write: for the report's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "commit": "abc1234",
    "time": "2026-01-02T03:04:05Z",
    "processor": "Some Processor",
    "cores": 2,
    "flags": ["avx2", "avx512f"],
    "torch": "2.13.0",
    "python": "3.11.2",
    "device": "cpu",
}
MODELS = {"SmolLM2-135M": (30, 3e-4), "Llama-3.2-1B": (16, 9e-4), "Qwen3-0.6B": (28, 1e-3), "Llama-3.1-8B": (32, 2e-3)}
PROMPTS = (2048, 8192, 32768, 131072)
PEERS = ("specprefill_kernels", "eager", "published", "torch.compile")


def times(seconds: float) -> dict[str, float]:
    return {"p20": seconds * 0.9, "p50": seconds, "p80": seconds * 1.2, "runs": 7}


def ops() -> dict[str, Any]:
    found = []

    def add(op: str, shape: str, tokens: int, seconds: float, **more: Any) -> None:
        info = {"op": op, "shape": shape, "backend": "cpu", "tokens": tokens, "dtype": "float32", "threads": 2}
        info |= {"seconds": times(seconds), "gbps": 8.1, "gflops": 60.0, "roofline_fraction": 0.62, "layers": 1}
        info |= {"peak_bytes": 32 * tokens, "ratios": {"eager": 9.5}, "graph": False} | more
        found.append({"name": shape, "stats": {"median": seconds}, "extra_info": info})

    for name, (layers, per) in MODELS.items():
        for tokens in PROMPTS:
            for dtype, factor in (("bfloat16", 1.0), ("float32", 0.8)):
                for threads in (1, 2):
                    seconds = per * factor * layers * tokens / 2048 / threads**0.8
                    more = {"dtype": dtype, "threads": threads, "layers": layers, "of_layers": layers}
                    more["roofline_fraction"] = min(0.95, 0.4 + per * 100 + tokens / 1e6) * factor
                    add("score_layers", f"{name} {tokens} {dtype} x{layers}", tokens, seconds, **more)
    for tokens in PROMPTS:
        for i, op in enumerate(("select_tokens", "select_chunks", "finalize_importance", "gather_tokens")):
            add(op, f"{tokens}", tokens, 2e-5 + tokens * 4e-9 / (i + 1))
    ceilings = [
        {
            "device": "cpu",
            "threads": n,
            "copy": {"memory": 1e10},
            "read": {"memory": 1.2e10},
            "matmul": {"float32": 1e11},
        }
        for n in (1, 2)
    ]
    command = "pytest bench"
    return {"benchmarks": found, "environment": ENVIRONMENT, "ceilings": ceilings, "command": command}


def goals() -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for name, (layers, per) in MODELS.items():
        for tokens in PROMPTS:
            row = {"op": "score_layers", "model": name, "tokens": tokens, "dtype": "bfloat16", "threads": 2}
            row |= {"layers": layers if tokens < 1e5 else 4, "of_layers": layers, "seconds": times(per * layers)}
            factors = {"to_matmul": 1.23, "over_definition": 11.2, "over_eager": 8.9}
            rows.append(row | factors | {"peak_bytes": 10, "peak_limit": 20})
    row = {"op": "select_tokens", "tokens": 2048, "threads": 1, "rows": 1, "caches": "warm", "seconds": times(3e-5)}
    rows.append(row | {"bound_seconds": times(2e-5), "to_bound": 1.5, "compiled_to_bound": 0.75, "over_eager": 4.0})
    verdicts = [{"goal": "fast enough", "met": 3, "of": 4, "worst": 1.7, "median": 1.2}]
    return {"environment": ENVIRONMENT, "command": "python -m bench.score_goals", "rows": rows, "verdicts": verdicts}


def peers() -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for tokens in PROMPTS:
        for i, name in enumerate(PEERS):
            row = {
                "op": "score",
                "shape": f"Llama-3.1-8B {tokens}",
                "model": "Llama-3.1-8B",
                "tokens": tokens,
                "peer": name,
            }
            row |= {
                "threads": 2,
                "dtype": "float32",
                "layers": 32,
                "layers_run": 1 if i else 32,
                "computes": f"does {name}",
            }
            rows.append(
                row
                | {"seconds": 0.01 * (1 + 4 * i), "ratio": 1.0 + 4 * i, "peak_bytes": 2**20 * (1 + i * tokens // 99)}
            )
    absent = {"op": "score", "shape": "", "threads": 2, "peer": "kvpress SnapKV", "computes": "another score"}
    return {"environment": ENVIRONMENT, "rows": [*rows, absent | {"skipped": "not installed"}]}


def scaling() -> dict[str, Any]:
    rows = [
        {"op": op, "tokens": 2**i, "seconds": times(1e-4 + 2**i * 1e-8 * (k + 1)), "peak_bytes": 4096 + 2**i * 4}
        for k, op in enumerate(("score_layer", "score_layers", "select_tokens"))
        for i in range(10, 21)
    ]
    fit = {"time_exponent": 1.01, "time_interval95": [0.99, 1.03], "memory_exponent": 1.0, "memory_interval95": None}
    fits = {"score_layer": fit, "score_layers": fit, "select_tokens": {"time_exponent": None, "memory_exponent": None}}
    return {"environment": ENVIRONMENT, "rows": rows, "fits": fits}


def ttft() -> dict[str, Any]:
    rows = [
        {
            "speculator": speculator,
            "base": base,
            "tokens": tokens,
            "keep_ratio": keep,
            "dtype": "bfloat16",
            "device": "cpu",
            "full_seconds": tokens * 1e-3,
            "speculative_seconds": tokens * 1e-3 / ratio,
            "stages": {},
            "ratio": ratio * (1 - keep),
            "limit": ratio,
            "layers_measured": {
                "speculator": "16 of 16" if speculator.endswith("1B") else "3 of 32",
                "base": "2 of 80",
            },
            "weights": "random",
            "note": "random weights" if tokens < 10000 else "random weights; base timed by 2 of 80 layers, scaled",
            "command": f"python -m bench.ttft --tokens {tokens}",
        }
        for speculator, base, ratio in (("Llama-3.2-1B", "Llama-3.1-8B", 5.0), ("Llama-3.1-8B", "Llama-3.1-70B", 8.0))
        for tokens in (4096, 32768, 131072)
        for keep in (0.05, 0.1, 0.2, 0.3)
    ]
    return {"environment": ENVIRONMENT | {"device": "cpu"}, "rows": rows}


def write(folder: Path) -> None:
    made = {"ops": ops(), "score_goals": goals(), "peers": peers(), "scaling": scaling(), "ttft": ttft()}
    for name, content in made.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
