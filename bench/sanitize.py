"""A small set of calls for compute-sanitizer: every op and layout once, odd sizes, in memory of its own.

    compute-sanitizer --tool memcheck python -m bench.sanitize

Without torch's caching allocator each tensor is an allocation of its own, so that what lies beside it is nobody's.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read when torch starts

import argparse
import sys

import torch

import specprefill_kernels as spk

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).cuda()


def scores(backend: str) -> torch.Tensor:
    """Dense, packed and paged keys of one token too few for a whole tile; fp8 and bf16; D that is no power of two."""
    lengths = torch.tensor([301, 37], dtype=torch.int32, device="cuda")
    state = spk.new_state(2, 5, 301, device="cuda")
    for dim, dtype in ((64, BF16), (80, torch.float16), (128, E4M3), (40, torch.float32)):
        query = _random(2, 5, 6, dim, dtype=BF16 if dtype == E4M3 else dtype)
        dense = _random(2, 2, 301, dim, dtype=dtype)
        packed = dense.transpose(1, 2).reshape(602, 2, dim)
        table = torch.arange(38, dtype=torch.int32, device="cuda").view(2, 19)
        blocks = _random(38, 16, 2, dim, dtype=dtype)
        starts = torch.tensor([0, 301, 602], dtype=torch.int32, device="cuda")
        calls = [
            (dense, {}),
            (packed, {"layout": "packed", "cu_seqlens": starts}),
            (blocks, {"layout": "paged_nhd", "block_table": table}),
        ]
        for key, how in calls:
            spk.score_layer_(state, query, key, seq_lens=lengths, backend=backend, **how)
        lse = torch.full((2, 5, 6), 3.0, device="cuda")
        spk.score_layer_(state, query, dense, seq_lens=lengths, lse=lse, pool_kernel_size=101, backend=backend)
    return state


def tail(backend: str, state: torch.Tensor) -> None:
    lengths = torch.tensor([301, 37], dtype=torch.int32, device="cuda")
    ids = torch.arange(602, device="cuda").view(2, 301)
    protect = torch.zeros(2, 301, dtype=torch.bool, device="cuda")
    for options in ({"keep_ratio": 0.3, "protect": protect}, {"keep_mass": 0.4}, {"keep_tokens": 70, "tail": 9}):
        _, selection, importance = spk.select_tokens(state, ids, lengths, chunk_size=7, backend=backend, **options)
        spk.gather_tokens(_random(2, 301, 13, dtype=BF16), selection, backend=backend)
        for layout, shape in (("bhtd", (2, 2, 301, 40)), ("bthd", (2, 301, 2, 40))):
            spk.gather_kv(_random(*shape), _random(*shape), selection, layout=layout, backend=backend)
        table = torch.arange(38, dtype=torch.int32, device="cuda").view(2, 19)
        cache = _random(38, 16, 2, 24, dtype=BF16)
        spk.gather_kv(cache, cache, selection, layout="paged_nhd", block_table=table, backend=backend)
    spk.finalize_importance(state, lengths, reduce="max", pool_kernel_size=13, backend=backend)
    if bool(importance.isnan().any()):
        sys.exit("NaN in the importance")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="triton")
    backend = parser.parse_args().backend
    tail(backend, scores(backend))
    torch.cuda.synchronize()
    print("all calls made")
    return 0


if __name__ == "__main__":
    sys.exit(main())
