"""What the tests on a GPU share: graphs, calls that must not sync, guarded memory, and the definition in fp64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F

T = TypeVar("T")
SENTINEL = 77
MIB = 2**20


def captured(function: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of the call and the tensors that each replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Inside, whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tensors_in(value: object) -> list[torch.Tensor]:
    """The tensors among a call's arguments or results."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, (tuple, list)) else []


def asked_for_memory() -> int:
    """How often torch's allocator has been asked for memory so far."""
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


def allocations(function: Callable[[], object]) -> int:
    """How often a call, made for the second time, asks the allocator for memory."""
    function()
    torch.cuda.synchronize()
    before = asked_for_memory()
    function()
    return asked_for_memory() - before


def peak(function: Callable[[], object]) -> int:
    """Bytes that a call, made for the second time, holds at most beside what is there before."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def random(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal random numbers, drawn where they are used: large ones would take long to copy."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def guarded(tensor: torch.Tensor, room: int = 1 << 16) -> tuple[torch.Tensor, Callable[[], bool]]:
    """A copy amid sentinels, with the same strides, and a question: are the sentinels as they were?"""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = torch.full((extent + 2 * room,), SENTINEL, device=tensor.device).to(tensor.dtype)
    view = flat.as_strided(tensor.shape, tensor.stride(), room)
    view.copy_(tensor)

    def untouched() -> bool:
        return bool((flat[:room] == SENTINEL).all()) and bool((flat[room + extent :] == SENTINEL).all())

    return view, untouched


def exact_state(query: torch.Tensor, key: torch.Tensor, pool: int = 13) -> torch.Tensor:
    """The paper's score of one sequence in fp64: query [N, Hq, D], key [Hkv, T, D] -> [N, T].

    A KV head at a time, so that a prompt of 128K fits.
    """
    group = query.shape[1] // key.shape[0]
    best = torch.zeros(query.shape[0], key.shape[1], dtype=torch.float64, device=query.device)
    for head in range(key.shape[0]):
        rows = query[:, head * group : (head + 1) * group].double()
        logits = torch.einsum("ngd,td->gnt", rows, key[head].double()) * query.shape[2] ** -0.5
        pooled = F.avg_pool1d(logits.softmax(-1), pool, 1, pool // 2)
        best = torch.maximum(best, pooled.amax(0))
    return best


def kept_by_sorting(importance: torch.Tensor, lengths: Sequence[int], ratio: float, chunk: int) -> list[torch.Tensor]:
    """Kept positions of each sequence: fp64 means rounded to fp32, a stable sort, ceil of the ratio."""
    kept = []
    for row, length in zip(importance, lengths, strict=True):
        count = -(-length // chunk)
        padded = torch.zeros(count * chunk, dtype=torch.float64, device=row.device)
        padded[:length] = row[:length]
        tokens = torch.full((count,), float(chunk), dtype=torch.float64, device=row.device)
        tokens[-1] = length - (count - 1) * chunk
        means = (padded.view(count, chunk).sum(1) / tokens).float()
        order = torch.sort(means, descending=True, stable=True).indices
        chunks = order[: max(1, -(-round(ratio * count * 1000) // 1000))].sort().values
        positions = (chunks[:, None] * chunk + torch.arange(chunk, device=row.device)).flatten()
        kept.append(positions[positions < length])
    return kept
