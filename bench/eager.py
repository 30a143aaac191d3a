"""The definition as one writes it in PyTorch, with no more operations than it needs: what "eager" means in the tables.

The package's `reference` backend does more (masks, lengths, checks), so being faster than that would say less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

POOL = 13


def score_layer(best: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The maximum of `best` [N, T] and one layer: query [N, Hq, D], key [Hkv, T, D]; everything in fp32."""
    look_ahead, query_heads, head_dim = query.shape
    grouped = query.float().unflatten(1, (key.shape[0], -1)).permute(1, 2, 0, 3).flatten(1, 2)  # [Hkv, G*N, D]
    weights = torch.softmax(grouped @ key.float().transpose(1, 2) * head_dim**-0.5, dim=-1)
    pooled = F.avg_pool1d(weights, POOL, 1, POOL // 2)
    return torch.maximum(best, pooled.view(query_heads, look_ahead, -1).amax(0))


def score_layers(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """All layers, one after the other: the state [N, T]."""
    best = torch.zeros(queries[0].shape[0], keys[0].shape[1], device=keys[0].device)
    for query, key in zip(queries, keys, strict=True):
        best = score_layer(best, query, key)
    return best


def chunk_scores(importance: Tensor, chunk: int) -> Tensor:
    """Mean of each chunk of one sequence's importance [T]; the short last chunk by its own length."""
    tokens = importance.shape[0]
    whole = tokens // chunk * chunk
    means = importance[:whole].view(-1, chunk).mean(1)
    return means if whole == tokens else torch.cat([means, importance[whole:].mean()[None]])


def select_tokens(state: Tensor, ids: Tensor, count: int, chunk: int) -> tuple[Tensor, Tensor]:
    """State [N, T], ids [T] -> the ids and positions of the `count` best chunks, ascending."""
    scores = chunk_scores(state.mean(0), chunk)
    best = torch.sort(torch.topk(scores, count).indices).values
    positions = (best[:, None] * chunk + torch.arange(chunk, device=ids.device)).flatten()
    positions = positions[positions < len(ids)]
    return ids[positions], positions


def selection_check(state: Tensor, ids: Tensor, count: int, chunk: int) -> tuple[list[Tensor], list[Tensor]]:
    """`select_tokens`' ids, chunks and their scores, and what they must be. Two chunks whose fp64 scores are
    nearly equal may stand for each other: it adds in fp32."""
    packed, positions = select_tokens(state, ids, count, chunk)
    chunks = torch.unique(positions // chunk)
    every = (chunks[:, None] * chunk + torch.arange(chunk, device=ids.device)).flatten()
    scores = chunk_scores(state.double().mean(0), chunk)
    results = [packed, positions, scores[chunks].sort(descending=True).values]
    return results, [ids[positions], every[every < len(ids)], scores.topk(count).values]
