"""Put logical keys (one ``[tokens, heads, dim]`` tensor a sequence) into every layout and stride an engine may have.

Whatever a sequence does not own is poison (NaN), so that a kernel which reads it cannot pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from grid import untouched_memory

BEYOND = 2**31 + 4096  # elements

LAYOUTS = ("bhtd", "bthd", "packed", "paged_nhd", "paged_hnd")
STRIDES = ("plain", "permuted", "gaps", "stepped")


def poison(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A buffer of NaN, or of 77 where the type has no NaN (True for bool)."""
    value = float("nan") if dtype.is_floating_point else 77
    return torch.full(shape, value, dtype=torch.float32 if dtype.is_floating_point else dtype).to(dtype)


def restride(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides; memory between them is poison."""
    shape = tensor.shape
    if how == "permuted":  # the last dim is the slowest
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if how == "gaps":  # a slice out of the middle of a larger buffer; the last stride stays 1
        buffer = poison(*(size + 2 for size in shape), dtype=tensor.dtype)
        view = buffer[tuple(slice(1, 1 + size) for size in shape)]
    elif how == "stepped":  # every second element along the last dim
        buffer = poison(*shape[:-1], 2 * shape[-1] + 1, dtype=tensor.dtype)
        view = buffer[..., 1::2]
    else:
        return tensor.contiguous()
    view.copy_(tensor)
    return view


def place(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Move to a device and keep the strides, gaps and all; what is meant to lie elsewhere stays there."""
    if tensor.device.type in (device, "meta"):
        return tensor
    if tensor.layout != torch.strided:
        return tensor.to(device)
    flat = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).to(device)
    return torch.as_strided(flat, tensor.shape, tensor.stride(), tensor.storage_offset())


@dataclass
class Cache:
    """A key (or value) buffer and the arguments that say how to read it."""

    buffer: torch.Tensor
    arguments: dict[str, torch.Tensor] = field(default_factory=dict)


def lay_out(
    sequences: list[torch.Tensor],
    layout: str,
    *,
    strides: str = "plain",
    block_size: int = 16,
    spare: int = 0,
    table_dtype: torch.dtype = torch.int32,
) -> Cache:
    """Write the sequences into one buffer; ``spare`` tokens of poison follow each where the layout has room."""
    heads, dim = sequences[0].shape[1:]
    dtype = sequences[0].dtype
    lengths = [len(tokens) for tokens in sequences]
    arguments: dict[str, torch.Tensor] = {}
    if layout in ("bhtd", "bthd"):
        buffer = poison(len(sequences), max(lengths) + spare, heads, dim, dtype=dtype)
        for b, tokens in enumerate(sequences):
            buffer[b, : lengths[b]] = tokens
        if layout == "bhtd":
            buffer = buffer.transpose(1, 2)
    elif layout == "packed":
        starts = torch.tensor([0, *lengths]).cumsum(0)
        starts[1:] += spare * torch.arange(1, len(lengths) + 1)
        buffer = poison(int(starts[-1]), heads, dim, dtype=dtype)
        for b, tokens in enumerate(sequences):
            buffer[int(starts[b]) : int(starts[b]) + lengths[b]] = tokens
        arguments["cu_seqlens"] = starts.to(table_dtype)
    else:
        buffer, arguments["block_table"] = _paged(sequences, block_size, spare, table_dtype)
        if layout == "paged_hnd":
            buffer = buffer.transpose(1, 2)
    return Cache(restride(buffer.contiguous(), strides), arguments)


def _paged(sequences, block_size, spare, table_dtype):
    """Blocks in shuffled order among unused ones; table entries that no token needs are nonsense ids."""
    heads, dim = sequences[0].shape[1:]
    counts = [-(-(len(tokens) + spare) // block_size) for tokens in sequences]
    needed = [-(-len(tokens) // block_size) for tokens in sequences]
    total = 2 * sum(counts) + 1
    order = torch.randperm(total, generator=torch.Generator().manual_seed(total)).tolist()
    buffer = poison(total, block_size, heads, dim, dtype=sequences[0].dtype)
    table = torch.full((len(sequences), max(counts) + 1), -(2**31) + 1, dtype=table_dtype)
    table[:, 1::2] = 2**31 - 1
    for b, tokens in enumerate(sequences):
        for i in range(needed[b]):
            block = order.pop()
            table[b, i] = block
            part = tokens[i * block_size : (i + 1) * block_size]
            buffer[block, : len(part)] = part
    return buffer, table


def read_token(buffer: torch.Tensor, layout: str, sequence: int, token: int, *, starts=None, table=None):
    """One token's ``[heads, dim]`` out of a laid-out buffer: the address rule of each layout, said once."""
    if layout == "bhtd":
        return buffer[sequence, :, token]
    if layout == "bthd":
        return buffer[sequence, token]
    if layout == "packed":
        return buffer[int(starts[sequence]) + token]
    block_size = buffer.shape[1 if layout == "paged_nhd" else 2]
    block = int(table[sequence, token // block_size])
    return buffer[block, token % block_size] if layout == "paged_nhd" else buffer[block, :, token % block_size]


def far_apart(tensor: torch.Tensor, axis: int, at: int) -> torch.Tensor:
    """The same values; indices from ``at`` on along ``axis`` lie more than 2^31 elements away, in untouched memory."""
    small = tensor.contiguous()
    stride = BEYOND // at
    strides = list(small.stride())
    strides[axis] = stride
    size = sum((n - 1) * s for n, s in zip(small.shape, strides, strict=True)) + 1
    try:
        with untouched_memory():
            flat = torch.empty(size, dtype=small.dtype, device=small.device)
    except RuntimeError as error:
        pytest.skip(f"no room for {size * small.element_size() / 2**30:.1f} GiB: {error}")
    far = flat.as_strided(small.shape, strides)
    far.copy_(small)
    return far
