"""SGLang's two pools with prompts in them: its own classes where it is installed, and others of the same shapes.

`Like...` hold what the adaptor reads of SGLang 0.5.23's `ReqToTokenPool` and `MHATokenToKVPool`: buffers of
`size + page_size` slots in one allocation for keys and values, fp8 stored as bytes, row 0 of `req_to_token` and page 0
kept for padding, int32 rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

REQUESTS, CONTEXT = 6, 512


class LikeReqToTokenPool:
    def __init__(self, size: int, max_context_len: int) -> None:
        self.req_to_token = torch.zeros(size + 1, max_context_len, dtype=torch.int32)


class LikeKVPool:
    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        head_num: int,
        head_dim: int,
        layer_num: int,
        start_layer: int = 0,
        kv_cache_layout: str = "nhd",
    ) -> None:
        self.size, self.page_size, self.dtype = size, page_size, dtype
        self.layer_num, self.start_layer, self.kv_cache_layout = layer_num, start_layer, kv_cache_layout
        self.store_dtype = torch.uint8 if dtype.itemsize == 1 else dtype
        self.k_scale_buffer = None
        rows = size + page_size
        shape = (rows, head_num, head_dim)
        if kv_cache_layout == "hnd":
            shape = (rows // page_size, head_num, page_size, head_dim)
        elif kv_cache_layout == "nhd":
            shape = (-(-rows // page_size) * page_size, head_num, head_dim)
        fused = [torch.zeros((2, *shape), dtype=self.store_dtype) for _ in range(layer_num)]
        self.k_buffer = [buffer[0] if kv_cache_layout == "hnd" else buffer[0, :rows] for buffer in fused]

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        buffer = self.k_buffer[layer_id - self.start_layer]
        return buffer.view(self.dtype) if self.store_dtype != self.dtype else buffer


def sglangs_own() -> Any:
    """SGLang's module of pools, or a skip that says why it cannot be imported."""
    try:
        from sglang.srt.mem_cache import memory_pool
    except Exception as error:  # its imports fail in many ways where parts of it are missing
        pytest.skip(f"sglang's memory pools cannot be imported: {type(error).__name__}: {error}")
    return memory_pool


def new_pools(kind: str, *, size: int, **options: Any) -> tuple[Any, Any]:
    """(req_to_token_pool, token_to_kv_pool) on the CPU, of `kind` "like" or "sglang"."""
    if kind == "like":
        return LikeReqToTokenPool(REQUESTS, CONTEXT), LikeKVPool(size, **options)
    pools = sglangs_own()
    layout = options.pop("kv_cache_layout", "nhd")
    more = {"device": "cpu", "enable_memory_saver": False}
    requests = pools.ReqToTokenPool(size=REQUESTS, max_context_len=CONTEXT, **more)
    with mock.patch.dict(os.environ, {"SGLANG_USE_HND_KVCACHE": "1" if layout == "hnd" else "0"}):
        pool = pools.MHATokenToKVPool(size=size, **options, **more)
    assert pool.kv_cache_layout == layout
    return requests, pool


@dataclass
class Filled:
    """Pools that hold these prompts, and NaN in every slot that is not theirs.

    Attributes:
        keys: [layer][request] of [T, Hkv, D], what was written.
        rows: int64, the requests' rows of `req_to_token`.
        lengths: prompt tokens of each.
    """

    requests: Any
    pool: Any
    keys: list[list[torch.Tensor]]
    rows: torch.Tensor
    lengths: torch.Tensor


def fill(
    kind: str = "like",
    *,
    lengths: tuple[int, ...] = (70, 33, 128),
    page_size: int = 1,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 3,
    behind: int = 0,
    **options: Any,
) -> Filled:
    """Prompts in pages that lie in random order, `behind` tokens behind each, and pools twice as large as needed."""
    generator = torch.Generator().manual_seed(0)
    pages = [-(-(length + behind) // page_size) for length in lengths]
    size = 2 * sum(pages) * page_size
    options |= {"page_size": page_size, "dtype": dtype, "head_num": kv_heads, "head_dim": head_dim}
    requests, pool = new_pools(kind, size=size, layer_num=layers, **options)
    order = (torch.randperm(size // page_size, generator=generator) + 1).tolist()  # page 0 is for padding
    rows = torch.tensor([(5, 2, 3, 1)[i] for i in range(len(lengths))])
    slots = []
    for row, length, count in zip(rows.tolist(), lengths, pages):
        taken = torch.tensor([order.pop() for _ in range(count)])
        own = (taken[:, None] * page_size + torch.arange(page_size)).reshape(-1)[: length + behind]
        requests.req_to_token[row] = 2**31 - 1  # what stands behind a request's tokens is not read
        requests.req_to_token[row, : length + behind] = own.to(torch.int32)
        slots.append(own)
    start = getattr(pool, "start_layer", 0)
    keys = []
    for layer in range(start, start + layers):
        buffer = pool.get_key_buffer(layer)
        values = torch.full((size + page_size, kv_heads, head_dim), float("nan")).to(dtype)
        own_keys = [torch.randn(len(own), kv_heads, head_dim, generator=generator).to(dtype) for own in slots]
        raw = values.view(torch.uint8) if dtype.itemsize == 1 else values
        for own, key in zip(slots, own_keys):
            raw[own] = key.view(torch.uint8) if dtype.itemsize == 1 else key
        paged = values.unflatten(0, (-1, page_size)).transpose(1, 2) if buffer.ndim == 4 else values
        buffer.copy_(paged)
        keys.append(own_keys)
    return Filled(requests, pool, keys, rows, torch.tensor(lengths))
