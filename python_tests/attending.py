"""What the tests of block-sparse attention share: drawn tensors, and both ops spelled out in fp64 with plain loops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from layouts import place
from torch import Tensor

import specprefill_kernels as spk

# Of the result's dtype's last digit, at values about 1.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One call. Queries and keys are small integers: sums and products are exact, and ties are frequent."""

    rows: int = 100
    total: int = 100
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 16
    batch: int = 1
    block_size: int = 16
    keep: int = 4
    sink: int = 1
    local: int = 2
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def integers(heads: int, tokens: int) -> Tensor:
            return torch.randint(-2, 3, (self.batch, heads, tokens, self.head_dim), generator=generator).to(self.dtype)

        value = torch.randn(self.batch, self.heads[1], self.total, self.head_dim, generator=generator).to(self.dtype)
        return integers(self.heads[0], self.rows), integers(self.heads[1], self.total), value

    @property
    def budget(self) -> dict[str, int]:
        return {
            "block_size": self.block_size,
            "keep_blocks": self.keep,
            "sink_blocks": self.sink,
            "local_blocks": self.local,
        }


def expected_lists(case: Case, query: Tensor, key: Tensor) -> list[list[list[list[int]]]]:
    """[B][Hq][query block]: the earlier blocks, ascending."""
    size, start = case.block_size, case.total - case.rows
    first = start // size
    group = case.heads[0] // case.heads[1]

    def lists(b: int, h: int) -> list[list[int]]:
        found = []
        for own in range(first, math.ceil(case.total / size)):
            low, high = max(own * size, start) - start, min((own + 1) * size, case.total) - start
            mean = query[b, h, low:high].double().mean(0)
            scores = [float(mean @ key[b, h // group, j * size : (j + 1) * size].double().mean(0)) for j in range(own)]
            fixed = [j for j in range(own) if j < case.sink or j > own - case.local]
            # Rounded, as fp64 means of a short query block are not exact; the scores of integers lie further apart.
            others = sorted(set(range(own)) - set(fixed), key=lambda j: (-round(scores[j], 9), j))
            found.append(sorted([*fixed, *others[: min(case.keep, own + 1) - 1 - len(fixed)]]))
        return found

    return [[lists(b, h) for h in range(case.heads[0])] for b in range(case.batch)]


def expected_output(
    case: Case, lists: list, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """[B, Hq, rows, D] fp64: softmax over the listed blocks and the row's own, up to the row itself."""
    size, start = case.block_size, case.total - case.rows
    group = case.heads[0] // case.heads[1]
    output = torch.empty(query.shape, dtype=torch.float64)
    for b in range(case.batch):
        for h in range(case.heads[0]):
            for n in range(case.rows):
                own = (start + n) // size
                seen = [*lists[b][h][own - start // size], own]
                t = [j * size + i for j in seen for i in range(size) if j * size + i <= start + n]
                logits = key[b, h // group, t].double() @ query[b, h, n].double()
                weights = (logits * (case.head_dim**-0.5 if scale is None else scale)).softmax(-1)
                output[b, h, n] = weights @ value[b, h // group, t].double()
    return output


def as_lists(blocks: spk.AttentionBlocks) -> list:
    """What `expected_lists` gives; checks the padding too."""
    indices, counts = (x.cpu() for x in blocks)
    assert indices.dtype == counts.dtype == torch.int32
    assert bool((indices[torch.arange(indices.shape[3]) >= counts[..., None]] == -1).all())
    return [
        [[row[:n].tolist() for row, n in zip(rows, ns, strict=True)] for rows, ns in zip(heads, per, strict=True)]
        for heads, per in zip(indices, counts, strict=True)
    ]


def check(case: Case, backend) -> None:
    """Both ops on a backend, and the composite, against the loops above."""
    query, key, value = case.tensors()
    lists = expected_lists(case, query, key)
    q, k, v = (place(x, backend.device) for x in (query, key, value))
    blocks = spk.select_attention_blocks(q, k, **case.budget, backend=backend.name)
    assert as_lists(blocks) == lists
    output = spk.block_sparse_attention(q, k, v, blocks, block_size=case.block_size, backend=backend.name)
    assert_close(output, expected_output(case, lists, query, key, value))


def assert_close(output: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[output.dtype]
    torch.testing.assert_close(output.cpu().double(), expected, rtol=tolerance, atol=tolerance)
