"""The definition once more, in float64 and as naively as it can be said: what every backend is compared with.

Nothing here is shared with the package. Inputs are *logical*: the keys of sequence ``b`` are ``keys[b]``, an array
``[tokens, kv_heads, head_dim]``, however a backend lays them out in memory (``layouts.py`` does that).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def _pool(row: np.ndarray, size: int, edge: str) -> np.ndarray:
    """Centred window of ``size`` positions over one row; what lies outside the row is zero."""
    around = np.pad(row, size // 2)
    sums = np.array([around[t : t + size].sum() for t in range(len(row))])
    if edge == "zero":
        return sums / size
    inside = np.pad(np.ones(len(row)), size // 2)
    return sums / np.array([inside[t : t + size].sum() for t in range(len(row))])


def row_position(row: int, seq_len: int, rows: int, queries: str) -> int:
    """The position in the sequence at which a query row sits."""
    return seq_len - 1 + row if queries == "look_ahead" else seq_len - rows + row


def _logits(query: np.ndarray, keys: np.ndarray, scale: float, softcap: float | None) -> np.ndarray:
    logits = keys @ query * scale
    return logits if softcap is None else softcap * np.tanh(logits / softcap)


def row_lse(query, keys, position, *, upto, scale, softcap=None, window=None) -> float:
    """Natural logarithm of the sum of exp over the keys that one row sees among the first ``upto`` ones."""
    seen = [t for t in range(upto) if t <= position and (window is None or t > position - window)]
    logits = _logits(query, keys[seen], scale, softcap)
    if len(logits) == 0:
        return -math.inf
    return float(logits.max() + np.log(np.exp(logits - logits.max()).sum()))


@dataclass
class Scoring:
    """The options of ``score_layer_``, with the paper's values as defaults."""

    queries: str = "look_ahead"
    normalize_over: str = "prompt"
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    pool_kernel_size: int = 13
    pool_edge: str = "zero"
    pool_order: str = "before_max"


def score_layer(state, query, keys, seq_lens, rows, options: Scoring, *, lse=None, key_scale=None, heads=None):
    """One layer's scores, maxed into a copy of ``state``; ``heads`` restricts the query heads (for faulty variants)."""
    result = np.array(state, dtype=np.float64)
    batch, _, query_heads, head_dim = query.shape
    scale = options.scale if options.scale is not None else 1.0 / math.sqrt(head_dim)
    for b in range(batch):
        kv_heads = keys[b].shape[1]
        for head in range(query_heads) if heads is None else heads:
            kv_head = head // (query_heads // kv_heads)
            stored = keys[b][:, kv_head].astype(np.float64)
            factor = 1.0 if key_scale is None else np.broadcast_to(key_scale, (kv_heads,))[kv_head]
            for row in range(rows[b]):
                position = row_position(row, seq_lens[b], rows[b], options.queries)
                scores = _one_row(
                    query[b, row, head].astype(np.float64),
                    stored * factor,
                    seq_lens[b],
                    position,
                    scale,
                    options,
                    None if lse is None else float(lse[b, row, head]),
                )
                target = result[b, row if result.shape[1] > 1 else 0, : seq_lens[b]]
                np.maximum(target, scores, out=target)
    return result


def _one_row(query, keys, seq_len, position, scale, options: Scoring, lse: float | None) -> np.ndarray:
    upto = seq_len if options.normalize_over == "prompt" else max(seq_len, position + 1)
    shown = {"scale": scale, "softcap": options.softcap}
    if lse is None:
        lse = row_lse(query, keys, position, upto=upto, window=options.window, **shown)
    weights = np.zeros(seq_len)
    for t in range(seq_len):
        if t <= position and (options.window is None or t > position - options.window):
            weights[t] = 1.0
    if weights.any():
        seen = weights > 0
        weights[seen] = np.exp(_logits(query, keys[:seq_len][seen], **shown) - lse)
    if options.pool_order == "after_max":
        return weights
    return _pool(weights, options.pool_kernel_size, options.pool_edge)


def finalize_importance(state, seq_lens, rows, *, reduce="mean", pool_kernel_size=None, pool_edge="zero") -> np.ndarray:
    """The mean or the largest of each sequence's valid rows, zero after its end."""
    batch, _, width = state.shape
    importance = np.zeros((batch, width))
    for b in range(batch):
        valid = [np.asarray(state[b, n, : seq_lens[b]], dtype=np.float64) for n in range(rows[b])]
        if pool_kernel_size is not None:
            valid = [_pool(row, pool_kernel_size, pool_edge) for row in valid]
        importance[b, : seq_lens[b]] = sum(valid) / rows[b] if reduce == "mean" else np.maximum.reduce(valid)
    return importance


@dataclass
class Budget:
    """The options of ``select_chunks``."""

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    keep_mass: float | None = None
    chunk_size: int = 32
    rounding: str = "ceil"
    sink: int = 0
    tail: int = 0

    def chunks(self, seq_len: int) -> int:
        """How many chunks may be kept of a sequence; not for ``keep_mass``, which asks the content."""
        total = math.ceil(seq_len / self.chunk_size)
        if self.keep_ratio is not None:
            wanted = self.keep_ratio * total
            if abs(wanted - round(wanted)) <= 1e-9 * max(1, total):
                wanted = round(wanted)
        else:
            wanted = self.keep_tokens / self.chunk_size
        whole = math.ceil(wanted) if self.rounding == "ceil" else math.floor(wanted)
        return min(max(whole, 1), total)


@dataclass
class Kept:
    """What one sequence keeps: token positions in ascending order, and whether protection broke the budget."""

    tokens: list[int]
    overflow: bool


def select_chunks(importance, seq_lens, budget: Budget, protect=None) -> list[Kept]:
    """Whole chunks, protected ones first, then by rank; ties go to the lower index."""
    return [
        _select_one(importance[b], int(seq_lens[b]), budget, None if protect is None else protect[b])
        for b in range(len(seq_lens))
    ]


def _select_one(importance, seq_len: int, budget: Budget, protect) -> Kept:
    size = budget.chunk_size
    chunks = [range(start, min(start + size, seq_len)) for start in range(0, seq_len, size)]
    sums = [math.fsum(float(importance[t]) for t in chunk) for chunk in chunks]

    def guarded(t: int) -> bool:
        return t < budget.sink or t >= seq_len - budget.tail or (protect is not None and bool(protect[t]))

    forced = [c for c, chunk in enumerate(chunks) if any(guarded(t) for t in chunk)]
    kept = set(forced)
    if budget.keep_mass is not None:
        ranked = sorted(range(len(chunks)), key=lambda c: (-np.float32(sums[c]), c))
        enough = (budget.keep_mass - 1e-9) * math.fsum(sums)
        for c in ranked:
            if kept and math.fsum(sums[k] for k in kept) >= enough:
                break
            kept.add(c)
        overflow = False
    else:
        means = [np.float32(total / len(chunk)) for total, chunk in zip(sums, chunks, strict=True)]
        ranked = sorted(range(len(chunks)), key=lambda c: (-means[c], c))
        room = budget.chunks(seq_len)
        overflow = len(forced) > room
        for c in ranked:
            if len(kept) >= room:
                break
            kept.add(c)
    return Kept([t for c in sorted(kept) for t in chunks[c]], overflow)
