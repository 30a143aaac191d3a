"""The bound on scores is worth something: plausible faults, applied to the oracle, must fall outside it."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from scoring import BF16, E4M3, Case, Problem, close, draw

CASES = {
    "fp32": Case(seq_lens=(150, 97), rows=(4, 3), look_ahead=4, heads=(8, 4)),
    "bf16": Case(seq_lens=(150, 97), rows=(4, 3), look_ahead=4, heads=(8, 4), dtypes=(BF16, BF16)),
    "fp8": Case(seq_lens=(150, 97), rows=(4, 3), look_ahead=4, heads=(8, 4), dtypes=(BF16, E4M3), key_scale="per_head"),
    "long": Case(seq_lens=(1500, 1025), rows=(2, 2), look_ahead=2, heads=(4, 2)),
    "windowed": Case(
        seq_lens=(150, 97),
        rows=(4, 3),
        look_ahead=4,
        heads=(8, 4),
        options={"queries": "observation_window", "window": 20, "softcap": 5.0},
    ),
    "visible": Case(
        seq_lens=(150, 97),
        rows=(4, 3),
        look_ahead=4,
        heads=(8, 4),
        options={"normalize_over": "visible", "pool_edge": "valid", "window": 300},
    ),
}


def wrong_option(**changes):
    return lambda problem: problem.expected(options=dataclasses.replace(problem.options, **changes))


def on_keys(fault):
    return lambda problem: problem.expected(keys=[fault(keys) for keys in problem.oracle_inputs()["keys"]])


def on_live(fault):
    """A fault applied to each sequence's live part of the right answer, ``[rows, length]``."""

    def apply(problem: Problem) -> np.ndarray:
        state = problem.expected()
        for b, length in enumerate(problem.case.seq_lens):
            live = state[b, : problem.rows[b], :length]
            state[b, : problem.rows[b], :length] = fault(live)
        return state

    return apply


def halo_missed(tile: int):
    """Pooling that does not look across the last tile border of a sequence."""
    pool = oracle._pool

    def blind(row: np.ndarray, size: int, edge: str) -> np.ndarray:
        left = np.arange(len(row)) < (len(row) - 1) // tile * tile
        return np.where(left, pool(row * left, size, edge), pool(row * ~left, size, edge))

    def apply(problem: Problem) -> np.ndarray:
        with mock.patch.object(oracle, "_pool", blind):
            return problem.expected()

    return apply


def interleaved_groups(problem: Problem) -> np.ndarray:
    """Query head h reads KV head h % Hkv instead of h // group."""
    inputs = problem.oracle_inputs()
    query_heads, kv_heads = problem.case.heads
    order = sorted(range(query_heads), key=lambda head: head % kv_heads)
    return problem.expected(query=inputs["query"][:, :, order])


def rounded(dtype: torch.dtype):
    return on_live(lambda live: torch.from_numpy(live).to(dtype).double().numpy())


def wrong_batch(problem: Problem) -> np.ndarray:
    return problem.expected(query=problem.oracle_inputs()["query"][::-1])


def without_head(head: int):
    return lambda p: p.expected(heads=[h for h in range(p.case.heads[0]) if h != head])


def one_key_fewer(problem: Problem) -> np.ndarray:
    """The last prompt key is left out."""
    lengths = [length - 1 for length in problem.case.seq_lens]
    return problem.expected(seq_lens=lengths)


def state_of_last_head_only(problem: Problem) -> np.ndarray:
    return problem.expected(heads=[problem.case.heads[0] - 1])


FAULTS = {
    "zeros": on_live(np.zeros_like),
    "nan": on_live(lambda live: np.full_like(live, np.nan)),
    "untouched state": lambda problem: problem.state.double().numpy(),
    "one element": on_live(lambda live: np.where(np.arange(live.size).reshape(live.shape) == 70, live * 1.01, live)),
    "a shift by one token": on_live(lambda live: np.roll(live, 1, axis=1)),
    "a shift back": on_live(lambda live: np.roll(live, -1, axis=1)),
    "first rows swapped": on_live(lambda live: live[[1, 0, *range(2, len(live))]]),
    "last row dropped": on_live(lambda live: np.concatenate([live[:-1], 0 * live[-1:]])),
    "bf16 scores": rounded(torch.bfloat16),
    "fp16 scores": rounded(torch.float16),
    "sums instead of the max": lambda p: (
        sum(np.maximum(p.expected(heads=[head]), 0) for head in range(p.case.heads[0])) + np.minimum(p.expected(), 0)
    ),
    "KV heads rolled": on_keys(lambda keys: np.roll(keys, 1, axis=1)),
    "keys reversed": on_keys(lambda keys: keys[::-1]),
    "keys late by one": on_keys(lambda keys: np.roll(keys, 1, axis=0)),
    "interleaved groups": interleaved_groups,
    "last key dropped": one_key_fewer,
    "other sequence's queries": wrong_batch,
    "last head only": state_of_last_head_only,
    "scale 1/D": wrong_option(scale=1 / 64),
    "no scale": wrong_option(scale=1.0),
    "pool 11": wrong_option(pool_kernel_size=11),
    "pool 15": wrong_option(pool_kernel_size=15),
    "no pool": wrong_option(pool_kernel_size=1),
    "pool left to later": wrong_option(pool_order="after_max"),
    "halo of 32 missed": halo_missed(32),
    "halo of 64 missed": halo_missed(64),
} | {f"head {head} dropped": without_head(head) for head in range(4)}

# Faults that only show where the option is in use.
SPECIAL = {
    ("fp32", "wrong divisor at the edges"): wrong_option(pool_edge="valid"),
    ("long", "wrong divisor at the edges"): wrong_option(pool_edge="valid"),
    ("visible", "wrong divisor at the edges"): wrong_option(pool_edge="zero"),
    ("visible", "look-ahead keys left out of the sum"): wrong_option(normalize_over="prompt"),
    ("fp8", "key scale ignored"): lambda p: p.expected(key_scale=None),
    ("fp8", "first head's key scale for all"): lambda p: p.expected(key_scale=np.float64(p.key_scale[0])),
    ("windowed", "window ignored"): wrong_option(window=None),
    ("windowed", "window longer by one"): wrong_option(window=21),
    ("windowed", "window shorter by one"): wrong_option(window=19),
    ("windowed", "softcap ignored"): wrong_option(softcap=None),
    ("windowed", "not causal"): wrong_option(queries="look_ahead"),
    ("windowed", "all rows at one position"): lambda p: np.maximum(
        p.expected(seq_lens=[n - 1 for n in p.case.seq_lens]), -1
    ),
}


def live_part(problem: Problem, state: np.ndarray) -> np.ndarray:
    return np.where(problem.state.numpy() == 0, state, 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_rejects(name, fault):
    problem = draw(CASES[name])
    right = live_part(problem, problem.expected())
    assert close(right, right)
    assert not close(live_part(problem, FAULTS[fault](problem)), right), f"{fault} passes for {name}"


@pytest.mark.parametrize(("name", "fault"), SPECIAL, ids=lambda value: value)
def test_the_bound_rejects_a_wrong_option(name, fault):
    problem = draw(CASES[name])
    right = live_part(problem, problem.expected())
    assert not close(live_part(problem, SPECIAL[name, fault](problem)), right), f"{fault} passes for {name}"


def test_the_bound_leaves_room_for_fp32():
    """Rounding every score to fp32 passes: the bound asks for fp32 accumulation and no more."""
    right = draw(CASES["fp32"]).expected()
    assert close(right.astype(np.float32), right)
