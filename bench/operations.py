"""The fewest floating-point operations of each op, beside traffic.py's bytes: a multiply and an add are two.

Divided by what a plain matmul reaches they give the second of the roofline's two floors. An exponential counts as one
operation, although it takes a dozen: the floor must not be above what a better kernel could do.
"""

from __future__ import annotations

# Of each weight beside its dot product: scaled, shifted and exponentiated (3), summed (1), normalised (1), one add and
# one subtract of a running sum over the pool (2), maximum (1).
PER_WEIGHT = 8


def matmul(rows: int, columns: int, depth: int) -> int:
    """[rows, depth] x [depth, columns]."""
    return 2 * rows * columns * depth


def score(look_ahead: int, query_heads: int, head_dim: int, tokens: int) -> int:
    """One layer: N*Hq rows of T dot products of D numbers, and what follows each."""
    rows = look_ahead * query_heads
    return matmul(rows, tokens, head_dim) + PER_WEIGHT * rows * tokens


def finalize(look_ahead: int, tokens: int) -> int:
    """The mean of N rows."""
    return look_ahead * tokens


def select(tokens: int) -> int:
    """Each token added to its chunk's sum; what ranks the chunks is not floating-point arithmetic."""
    return tokens


def select_tokens(look_ahead: int, tokens: int) -> int:
    return finalize(look_ahead, tokens) + select(tokens)
