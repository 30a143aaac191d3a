"""Tensors as gathering moves them: integer words, and as few strided dimensions as they have."""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Triton knows of an integer argument whether it is divisible by this, and nothing finer.
_DIVISOR = 16


def as_words(*tensors: Tensor, wide: bool) -> list[Tensor]:
    """The same bits as integers, all of one width.

    Args:
        tensors: of one dtype.
        wide: the last dimension is copied whole, so that several elements may be one word: the widest word whose
            strides Triton can prove aligned (then accesses have 16 bytes whatever the word), else the widest that fits.
    """
    if tensors[0].dtype == torch.complex128:  # no integer is as wide
        tensors = tuple(torch.view_as_real(x) for x in tensors)
        wide = True
    size = tensors[0].element_size()
    plain = [x.detach().view(_WORDS[size]) for x in tensors]
    if not wide:
        return plain
    fits = [word for word in (8, 4, 2, 1) if word >= size and all(_divisible(x, word, 1) for x in plain)]
    aligned = [word for word in fits if all(_divisible(x, word, _DIVISOR) for x in plain)]
    best = (aligned or fits or [size])[0]
    return [x.view(_WORDS[best]) for x in plain]


def _divisible(x: Tensor, word: int, by: int) -> bool:
    """Whether rows of x are whole words, at addresses of whole words, and their strides in words divisible."""
    size = x.element_size()
    if x.stride(-1) != 1 or x.data_ptr() % word or x.storage_offset() * size % word:
        return False
    return all(n * size % (word * by) == 0 for n in (x.shape[-1], *x.stride()[:-1]))


def merge(sizes: list[int], *strides: list[int]) -> list[tuple[int, ...]]:
    """(size, stride of each tensor) of as few dimensions as walk the same elements in the same order."""
    dims: list[tuple[int, ...]] = []
    for size, *steps in zip(sizes, *strides):
        if size == 1:
            continue
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1:], steps)):
            dims[-1] = (dims[-1][0] * size, *steps)
        else:
            dims.append((size, *steps))
    return dims
