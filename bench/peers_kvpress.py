"""kvpress's SnapKV scoring beside ours, in turn, in an environment that has kvpress: one JSON line for each row.

Its own `score` method is called for each layer, on an attention module of the model's shape with random weights, with a
window as long as our look-ahead and our pooling width; ours scores the same keys with random queries of the same shape,
as `queries="observation_window"`: it is given its queries, kvpress projects them itself. So the scores are not to be
equal, and before they are timed only their shapes are checked and that all is finite. Called by bench/peers.py; needs
nothing that kvpress does not bring, and this repository on PYTHONPATH with its compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import specprefill_kernels as spk
from bench import measure, memory, problems
from bench.eager import POOL
from bench.shapes import GRIDS, LOOK_AHEAD, Model, layers_within, size_name

HIDDEN = {"SmolLM2-135M": 576, "Llama-3.2-1B": 2048, "Qwen3-0.6B": 1024, "Llama-3.1-8B": 4096}


def module_of(m: Model, dtype: torch.dtype) -> Any:
    """One attention layer of the shape; a Llama one also for Qwen's, whose extra norms of queries are small."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    config = LlamaConfig(
        hidden_size=HIDDEN.get(m.name, m.query_heads * m.head_dim),
        num_attention_heads=m.query_heads,
        num_key_value_heads=m.kv_heads,
        head_dim=m.head_dim,
        num_hidden_layers=1,
    )
    torch.manual_seed(0)
    return LlamaAttention(config, layer_idx=0).to(dtype)


@torch.no_grad()
def rows_of(m: Model, tokens: int, dtype: torch.dtype, share: int, ticks: Any, seconds: float) -> Iterator[dict]:
    from importlib.metadata import version

    from kvpress import SnapKVPress

    layers = layers_within(m, tokens, dtype.itemsize, share)
    queries, keys = problems.layer_tensors("cpu", m, tokens, dtype, layers)
    press, module = SnapKVPress(0.5, LOOK_AHEAD, POOL), module_of(m, dtype)
    # The window's rows are all it reads of the hidden states and angles; the prompt's length comes from a shape.
    hidden = torch.randn(1, 1, module.config.hidden_size).to(dtype).expand(1, tokens, -1)
    ones = torch.ones(1, 1, m.head_dim, dtype=dtype).expand(1, tokens, -1)
    kwargs = {"position_embeddings": (ones, torch.zeros_like(ones[:, :1]).expand(1, tokens, -1))}
    state = spk.new_state(1, LOOK_AHEAD, tokens)

    def theirs() -> list[Tensor]:
        return [press.score(module, hidden, key, key, None, kwargs) for key in keys]

    def ours() -> Tensor:
        spk.score_layers_(state, queries, keys, queries="observation_window", backend="cpu")
        return spk.finalize_importance(state, backend="cpu")

    for name, result in (("theirs", theirs()[0]), ("ours", ours())):
        if result.shape[-1] != tokens or not bool(torch.isfinite(result).all()):
            raise problems.WrongResult(f"{name}: {tuple(result.shape)}")
    calls = {"specprefill_kernels": ours, "kvpress SnapKV": theirs}
    times = measure.in_turn(ticks, calls, seconds, least=3, warm_up=1)
    kind = str(dtype).removeprefix("torch.")
    for name, call in calls.items():
        yield {
            "op": "score, window",
            "peer": name,
            "version": version("kvpress"),
            "shape": f"{m.name} {size_name(tokens)} {kind}",
            "model": m.name,
            "tokens": tokens,
            "dtype": kind,
            "threads": torch.get_num_threads(),
            "layers": layers,
            "layers_run": layers,
            "of_layers": m.layers,
            "torch": torch.__version__,
            "seconds": times[name].p50,
            "spread": times[name].json(),
            "ratio": times[name].p50 / times["specprefill_kernels"].p50,
            "peak_bytes": memory.peak_bytes(call, "cpu"),
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=tuple(GRIDS), default="default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--key-mib", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    grid, quick = GRIDS[options.shapes], options.shapes == "quick"
    share = options.key_mib * 2**20 or grid.key_bytes or memory.free_bytes("cpu") // 4
    ticks = measure.clock("cpu", quick)
    for m in (m for m in grid.models if options.only in m.name):
        for tokens in grid.prompts:
            for dtype in grid.dtypes:
                print(f"kvpress: {m.name} {size_name(tokens)} {dtype}", file=sys.stderr, flush=True)
                for row in rows_of(m, tokens, getattr(torch, dtype), share, ticks, options.seconds):
                    print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
