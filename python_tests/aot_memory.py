"""Tensors of any size for calls that are recorded and not made: their memory is reserved and never touched."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def tensor(
    shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None, offset: int = 0
) -> Tensor:
    """A tensor with these strides (None: contiguous), `offset` elements behind an address that is divisible by 16.

    Its storage is as large as it says: for HIP, Triton tells storages of more than 2 GiB from smaller ones.
    """
    strides = contiguous(shape) if strides is None else strides
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, (last + 1) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides, offset)
