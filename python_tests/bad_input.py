"""Faults in arguments: what changes, and what the error must name and report."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from calls import LENGTH

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Bad:
    """One fault: the arguments that change, and what the message must name and report.

    ``values``: the fault lies in a tensor's contents, which only CPU tensors are checked for.
    """

    call: str
    fault: str
    changes: dict[str, Any]
    names: str
    words: str = ""
    values: bool = False
    error: type[Exception] = field(default=ValueError)


def ints(*values: int, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def to(dtype):
    return lambda tensor: tensor.to(dtype)


def planted(value: float, *index: int):
    """A copy of the tensor with one element replaced."""

    def plant(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return plant


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def lengths_table(call: str, name: str = "seq_lens", most: int = LENGTH) -> list[Bad]:
    """What can be wrong with a tensor of one integer per sequence."""
    rows = [
        ("float", ints(3, 3).float(), "float32", False),
        ("rank 2", ints(3, 3).view(1, 2), r"\[1, 2\]", False),
        ("one too many", ints(3, 3, 3), r"\[3\]", False),
        ("on meta", meta(ints(3, 3)), "meta", False),
        ("zero", ints(3, 0), "0", True),
        ("negative", ints(-1, 3), "-1", True),
        ("too large", ints(3, most + 1), str(most + 1), True),
        ("int64 that wraps", ints(3, 2**32 + 1, dtype=torch.int64), str(2**32 + 1), True),
        ("negative int64 that wraps", ints(3, 1 - 2**32, dtype=torch.int64), str(1 - 2**32), True),
    ]
    table = [Bad(call, f"{name} {fault}", {name: value}, name, words, values) for fault, value, words, values in rows]
    return [*table, Bad(call, f"{name} a list", {name: [3, 3]}, name, "list", error=TypeError)]


def tensor_table(call: str, name: str, *, dtype=torch.int8, rank: bool = True) -> list[Bad]:
    """What can be wrong with any tensor argument: not a tensor, another device, type, rank; a sparse one."""
    rows = [
        Bad(call, f"{name} a list", {name: [1.0]}, name, "list", error=TypeError),
        Bad(call, f"{name} None", {name: None}, name, "None", error=TypeError),
        Bad(call, f"{name} on meta", {name: meta}, name, "meta"),
        Bad(call, f"{name} sparse", {name: lambda tensor: tensor.to_sparse()}, name, "sparse"),
    ]
    if dtype is not None:
        rows.append(Bad(call, f"{name} {dtype}", {name: to(dtype)}, name, str(dtype).removeprefix("torch.")))
    if rank:
        rows.append(Bad(call, f"{name} of one rank more", {name: lambda tensor: tensor[None]}, name, r"\[1, "))
        rows.append(Bad(call, f"{name} of rank 0", {name: lambda tensor: tensor.flatten()[0]}, name, r"\[\]"))
    return rows


def option_table(call: str, **options: list) -> list[Bad]:
    """Values that an option refuses; the message shows them."""
    return [
        Bad(call, f"{name}={value!r}", {name: value}, name, re.escape(str(value)))
        for name, values in options.items()
        for value in values
    ]


def overlapping_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape, each slice of the first dim starting in the middle of the one before."""
    flat = torch.zeros(tensor.numel() + 8)
    strides = list(tensor.contiguous().stride())
    strides[0] //= 2
    return flat.as_strided(tensor.shape, strides)
