"""A small set of calls for compute-sanitizer: every op and layout once, odd sizes, in memory of its own.

    compute-sanitizer --tool memcheck python -m bench.sanitize --backend cuda

Without torch's caching allocator each tensor is an allocation of its own, so that what lies beside it is nobody's.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read when torch starts

import argparse
import sys
from collections.abc import Callable

import torch

import specprefill_kernels as spk

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
DEVICE = "cuda"


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).to(DEVICE)


def _int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def scores(backend: str) -> torch.Tensor:
    """Dense, packed and paged keys of one token too few for a whole tile; fp8 and bf16; D that is no power of two."""
    lengths = _int32(301, 37)
    state = spk.new_state(2, 5, 301, device=DEVICE)
    for dim, dtype in ((64, BF16), (80, torch.float16), (128, E4M3), (40, torch.float32)):
        query = _random(2, 5, 6, dim, dtype=BF16 if dtype == E4M3 else dtype)
        dense = _random(2, 2, 301, dim, dtype=dtype)
        packed = dense.transpose(1, 2).reshape(602, 2, dim)
        table = torch.arange(38, dtype=torch.int32, device=DEVICE).view(2, 19)
        blocks = _random(38, 16, 2, dim, dtype=dtype)
        calls = [
            (dense, {}),
            (packed, {"layout": "packed", "cu_seqlens": _int32(0, 301, 602)}),
            (blocks, {"layout": "paged_nhd", "block_table": table}),
        ]
        for key, how in calls:
            spk.score_layer_(state, query, key, seq_lens=lengths, backend=backend, **how)
        lse = torch.full((2, 5, 6), 3.0, device=DEVICE)
        spk.score_layer_(state, query, dense, seq_lens=lengths, lse=lse, pool_kernel_size=101, backend=backend)
    return state


def several_layers(backend: str, _: torch.Tensor) -> None:
    """One launch for layers that differ, long enough that several blocks share a sequence; the other kinds of rows."""
    queries = [_random(2, 3, heads, dim, dtype=BF16) for heads, dim in ((8, 64), (4, 128), (9, 64))]
    keys = [_random(2, heads, 1500, dim, dtype=BF16) for heads, dim in ((2, 64), (4, 128), (3, 64))]
    state = spk.new_state(2, 3, 1490, device=DEVICE)
    lengths, rows = _int32(1490, 700), _int32(3, 2)
    for options in (
        {},
        {"normalize_over": "visible", "softcap": 20.0},
        {"queries": "observation_window", "window": [None, 100, 700]},
    ):
        spk.score_layers_(state, queries, keys, seq_lens=lengths, num_look_ahead=rows, backend=backend, **options)
    spk.score_layers_(spk.new_state(2, 1, 1490, device=DEVICE), queries, keys, seq_lens=lengths, backend=backend)


def tail(backend: str, state: torch.Tensor) -> None:
    """Selections of all three kinds, and every gather."""
    lengths = _int32(301, 37)
    ids = torch.arange(602, device=DEVICE).view(2, 301)
    protect = torch.zeros(2, 301, dtype=torch.bool, device=DEVICE)
    for options in ({"keep_ratio": 0.3, "protect": protect}, {"keep_mass": 0.4}, {"keep_tokens": 70, "tail": 9}):
        _, selection, importance = spk.select_tokens(state, ids, lengths, chunk_size=7, backend=backend, **options)
        spk.gather_tokens(_random(2, 301, 13, dtype=BF16), selection, backend=backend)
        for layout, shape in (("bhtd", (2, 2, 301, 40)), ("bthd", (2, 301, 2, 40))):
            spk.gather_kv(_random(*shape), _random(*shape), selection, layout=layout, backend=backend)
        table = torch.arange(38, dtype=torch.int32, device=DEVICE).view(2, 19)
        cache = _random(38, 16, 2, 24, dtype=BF16)
        spk.gather_kv(cache, cache, selection, layout="paged_nhd", block_table=table, backend=backend)
    spk.finalize_importance(state, lengths, reduce="max", pool_kernel_size=13, backend=backend)
    if bool(importance.isnan().any()):
        sys.exit("NaN in the importance")


def long_and_many(backend: str, _: torch.Tensor) -> None:
    """Selections that several blocks share, of one long prompt and of many short ones."""
    for batch, tokens, chunk in ((1, 40001, 1), (40, 300, 8)):
        importance = _random(batch, tokens).abs()
        for options in ({"keep_ratio": 0.2, "sink": 3}, {"keep_mass": 0.3}):
            selection = spk.select_chunks(importance, chunk_size=chunk, backend=backend, **options)
            spk.gather_tokens(importance, selection, backend=backend)


PARTS: tuple[Callable[[str, torch.Tensor], None], ...] = (several_layers, tail, long_and_many)


def main() -> int:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default=DEVICE, help="cpu: tries these calls without a GPU")
    options = parser.parse_args()
    DEVICE = options.device
    state = scores(options.backend)
    for part in PARTS:
        part(options.backend, state)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("all calls made")
    return 0


if __name__ == "__main__":
    sys.exit(main())
