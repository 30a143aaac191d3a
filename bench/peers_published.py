"""The published algorithm in the steps of its authors' vLLM implementation (arXiv 2502.02789), written anew.

What it does otherwise than this library: keys are copied once for each query head of their group; the products are
made in the model's dtype, and the fp32 softmax is rounded back to it; all layers' weights [L, Hq, N, T] are kept until
the end; chunks are averaged and gathered in Python, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

POOL = 13


def importance(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """Queries [N, Hq, D] and keys [Hkv, T, D] of each layer -> [T] in the keys' dtype."""
    products = []
    for query, key in zip(queries, keys, strict=True):
        repeated = torch.repeat_interleave(key, query.shape[1] // key.shape[0], dim=0)
        products.append((query.transpose(0, 1) @ repeated.transpose(1, 2)) / math.sqrt(query.shape[2]))
    stacked = torch.stack(products)  # [L, Hq, N, T]
    weights = F.softmax(stacked, dim=-1, dtype=torch.float32).to(stacked.dtype)
    pooled = F.avg_pool1d(weights.flatten(0, 1), POOL, stride=1, padding=POOL // 2)
    return pooled.amax(0).mean(0)


def select(importance: Tensor, keep_ratio: float, chunk: int) -> Tensor:
    """Kept positions of one prompt, ascending."""
    scores = torch.stack([part.mean() for part in importance.split(chunk)])
    best = scores.topk(math.ceil(len(scores) * keep_ratio)).indices
    positions = torch.arange(len(importance)).split(chunk)
    return torch.cat([positions[c.item()] for c in best]).sort().values


def peak_bytes(layers: int, rows: int, tokens: int, element: int) -> int:
    """About what it holds at once: products twice (list and stack), fp32 weights, weights, pooled weights."""
    return layers * rows * tokens * (4 * element + 4)
