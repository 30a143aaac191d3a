"""The fewest bytes that each op must move through device memory: every input read once, every output written once.

Divided by the time they give the rate that is compared with a plain copy's. Inputs that are read twice (keys, where no
`lse` is given) count once: the second time should come out of a cache.
"""

from __future__ import annotations

FP32, INT32, INT64 = 4, 4, 8


def kept_tokens(tokens: int, ratio: float, chunk: int) -> int:
    """Whole chunks, rounded up: chunk * ceil(ratio * ceil(T / chunk)), at most T."""
    chunks = -(-tokens // chunk)
    return min(tokens, chunk * -(-round(ratio * chunks * 1e6) // 10**6))


def score(
    look_ahead: int, query_heads: int, kv_heads: int, head_dim: int, tokens: int, *, key: int, query: int, lse: bool
) -> int:
    """One layer: keys Hkv*T*D*key + queries N*Hq*D*query (+ lse 4*N*Hq) + state read and written 2*4*N*T."""
    keys = kv_heads * tokens * head_dim * key
    queries = look_ahead * query_heads * head_dim * query
    return keys + queries + lse * FP32 * look_ahead * query_heads + 2 * FP32 * look_ahead * tokens


def score_layers(layers: int, look_ahead: int, tokens: int, one_layer: int) -> int:
    """L layers, but the state read and written once: L*(layer - 2*4*N*T) + 2*4*N*T."""
    state = 2 * FP32 * look_ahead * tokens
    return layers * (one_layer - state) + state


def finalize(look_ahead: int, tokens: int) -> int:
    """State 4*N*T in, importance 4*T out."""
    return FP32 * (look_ahead + 1) * tokens


def select(tokens: int, kept: int) -> int:
    """Importance 4*T in, indices 4*K out."""
    return FP32 * tokens + INT32 * kept


def gather_tokens(kept: int, token_bytes: int) -> int:
    """For each kept token: its index 4, its value in and out 2*bytes, its position 8 out."""
    return kept * (INT32 + 2 * token_bytes + INT64)


def gather_kv(kept: int, kv_heads: int, head_dim: int, element: int) -> int:
    """For each kept token: its index 4, its key and its value, each in and out: 2*2*Hkv*D*element."""
    return kept * (INT32 + 4 * kv_heads * head_dim * element)


def select_tokens(look_ahead: int, tokens: int, kept: int, token_bytes: int) -> int:
    """State in and importance out, indices out, values in and out, positions out: what no step leaves for the next."""
    return finalize(look_ahead, tokens) + gather_tokens(kept, token_bytes)
