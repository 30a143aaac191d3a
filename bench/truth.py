"""What the results must be, said independently of the package: scores in fp64, selections by a stable sort."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def state(query: Tensor, key: Tensor, pool: int = 13) -> Tensor:
    """The paper's score of one sequence: query [N, Hq, D], key [Hkv, T, D] -> [N, T] fp64, a KV head at a time."""
    group = query.shape[1] // key.shape[0]
    best = torch.zeros(query.shape[0], key.shape[1], dtype=torch.float64, device=query.device)
    for head in range(key.shape[0]):
        rows = query[:, head * group : (head + 1) * group].double()
        logits = torch.einsum("ngd,td->gnt", rows, key[head].double()) * query.shape[2] ** -0.5
        best = torch.maximum(best, F.avg_pool1d(logits.softmax(-1), pool, 1, pool // 2).amax(0))
    return best


def lse(query: Tensor, key: Tensor) -> Tensor:
    """Natural log of each row's sum of exponentials: [N, Hq] fp32."""
    group = query.shape[1] // key.shape[0]
    heads = []
    for head in range(query.shape[1]):
        logits = query[:, head].double() @ key[head // group].double().T * query.shape[2] ** -0.5
        heads.append(logits.logsumexp(-1))
    return torch.stack(heads, 1).float()


def kept(importance: Tensor, count: int, chunk: int) -> Tensor:
    """Ascending positions of the `count` chunks of largest mean of one sequence, ties to the lower index."""
    tokens = len(importance)
    chunks = -(-tokens // chunk)
    padded = torch.zeros(chunks * chunk, dtype=torch.float64, device=importance.device)
    padded[:tokens] = importance
    sizes = torch.full((chunks,), float(chunk), dtype=torch.float64, device=importance.device)
    sizes[-1] = tokens - (chunks - 1) * chunk
    means = (padded.view(chunks, chunk).sum(1) / sizes).float()
    best = torch.sort(means, descending=True, stable=True).indices[:count].sort().values
    positions = (best[:, None] * chunk + torch.arange(chunk, device=importance.device)).flatten()
    return positions[positions < tokens]
