"""One good call of every public op, small, as a dict of arguments: tests of bad input and of torch.library vary it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from layouts import lay_out, place
from selecting import selection_of

import specprefill_kernels as spk

BATCH, ROWS, HEADS, KV_HEADS, DIM, LENGTH, LAYERS = 2, 3, 4, 2, 8, 20, 2
KEPT = [[0, 3, 19], [7, 8]]


@dataclass(frozen=True)
class Call:
    """A public function and how to make its arguments (fresh tensors each time)."""

    op: str  # the name that available_backends knows
    function: Callable
    make: Callable[[], dict]

    def arguments(self, device: str = "cpu") -> dict:
        return {name: placed(value, device) for name, value in self.make().items()}


def placed(value, device: str):
    """An argument, with every tensor in it on the device."""
    if isinstance(value, torch.Tensor):
        return place(value, device)
    if isinstance(value, (spk.Selection, spk.AttentionBlocks)):
        return type(value)(*(placed(part, device) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(placed(part, device) for part in value)
    return value


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def lengths() -> torch.Tensor:
    return torch.tensor([LENGTH, 11], dtype=torch.int32)


def _cache(layout: str, seed: int = 0) -> dict:
    cache = lay_out([_random(LENGTH, KV_HEADS, DIM, seed=seed + b) for b in range(BATCH)], layout, block_size=8)
    return {"key": cache.buffer, "layout": layout, **cache.arguments}


def score(layout: str = "bhtd") -> dict:
    query = _random(BATCH, ROWS, HEADS, DIM)
    return {"state": spk.new_state(BATCH, ROWS, LENGTH), "query": query, "seq_lens": lengths(), **_cache(layout)}


def score_layers(layout: str = "bhtd") -> dict:
    arguments = score(layout)
    del arguments["query"], arguments["key"]
    arguments["queries_per_layer"] = [_random(BATCH, ROWS, HEADS, DIM, seed=i) for i in range(LAYERS)]
    arguments["keys_per_layer"] = [_cache(layout, seed=10 * i)["key"] for i in range(LAYERS)]
    return arguments


def finalize() -> dict:
    return {"state": _random(BATCH, ROWS, LENGTH).abs(), "seq_lens": lengths(), "num_look_ahead": torch.tensor([3, 1])}


def select() -> dict:
    return {"importance": _random(BATCH, LENGTH).abs(), "seq_lens": lengths(), "keep_ratio": 0.4, "chunk_size": 4}


def select_protected() -> dict:
    protect = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    protect[:, 5] = True
    return {**select(), "protect": protect, "sink": 1, "tail": 2}


def select_mass() -> dict:
    return {"importance": _random(BATCH, LENGTH).abs(), "keep_mass": 0.6, "chunk_size": 4}


def gather() -> dict:
    return {"x": torch.arange(BATCH * LENGTH).view(BATCH, LENGTH), "selection": selection_of(KEPT)}


def gather_packed() -> dict:
    cu_seqlens = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)
    return {"x": _random(2 * LENGTH, 5), "selection": selection_of(KEPT), "cu_seqlens": cu_seqlens}


def gather_kv(layout: str = "bhtd") -> dict:
    arguments = _cache(layout)
    key_cache = arguments.pop("key")
    return {
        "key_cache": key_cache,
        "value_cache": _cache(layout, seed=5)["key"],
        "selection": selection_of(KEPT),
        **arguments,
    }


def gather_kv_out(layout: str = "bhtd") -> dict:
    arguments = gather_kv(layout)
    fresh = spk.gather_kv(**arguments, backend="reference")
    arguments["out"] = tuple(torch.zeros_like(buffer) for buffer in fresh)
    if layout.startswith("paged"):
        arguments["out_block_table"] = torch.arange(len(fresh[0]), dtype=torch.int32).view(BATCH, -1)
    return arguments


def select_tokens() -> dict:
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    return {**finalize(), "x": ids, "keep_ratio": 0.4, "chunk_size": 4}


def attention() -> dict:
    cache = {"key": _random(BATCH, KV_HEADS, 70, DIM), "value": _random(BATCH, KV_HEADS, 70, DIM, seed=5)}
    return {"query": _random(BATCH, HEADS, 50, DIM, seed=9), **cache, "block_size": 16, "keep_blocks": 3}


def attention_blocks() -> dict:
    arguments = attention()
    del arguments["value"]
    return arguments


def attention_listed() -> dict:
    arguments = attention()
    blocks = spk.select_attention_blocks(**attention_blocks(), backend="reference")
    del arguments["keep_blocks"]
    return {**arguments, "blocks": blocks}


CALLS = {
    "score": Call("score_layer", spk.score_layer_, score),
    "score packed": Call("score_layer", spk.score_layer_, lambda: score("packed")),
    "score paged": Call("score_layer", spk.score_layer_, lambda: score("paged_hnd")),
    "score layers": Call("score_layers", spk.score_layers_, score_layers),
    "finalize": Call("finalize_importance", spk.finalize_importance, finalize),
    "select": Call("select_chunks", spk.select_chunks, select),
    "select protected": Call("select_chunks", spk.select_chunks, select_protected),
    "select mass": Call("select_chunks", spk.select_chunks, select_mass),
    "gather": Call("gather_tokens", spk.gather_tokens, gather),
    "gather packed": Call("gather_tokens", spk.gather_tokens, gather_packed),
    "kv": Call("gather_kv", spk.gather_kv, gather_kv),
    "kv packed": Call("gather_kv", spk.gather_kv, lambda: gather_kv("packed")),
    "kv paged": Call("gather_kv", spk.gather_kv, lambda: gather_kv("paged_nhd")),
    "kv out": Call("gather_kv", spk.gather_kv, gather_kv_out),
    "kv paged out": Call("gather_kv", spk.gather_kv, lambda: gather_kv_out("paged_nhd")),
    "tokens": Call("select_tokens", spk.select_tokens, select_tokens),
    "attention": Call("block_sparse_attention", spk.sparse_prefill_attention, attention),
    "attention blocks": Call("select_attention_blocks", spk.select_attention_blocks, attention_blocks),
    "attention listed": Call("block_sparse_attention", spk.block_sparse_attention, attention_listed),
}
