"""What travels with a pruned request of vLLM, and what its blocks are called. Needs no vLLM."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specprefill_kernels.integrations.vllm.core import positional, positions_of
from specprefill_kernels.integrations.vllm.positions import KEY, Positions, from_arguments
from specprefill_kernels.integrations.vllm.worker import follow, shift_rows, tracked


@st.composite
def selections(draw):
    """(T, kept positions as a mask), at least one kept."""
    mask = draw(st.lists(st.booleans(), min_size=1, max_size=60).filter(any))
    return len(mask), mask


def spans(mask):
    runs = [[*run] for keep, run in itertools.groupby(range(len(mask)), mask.__getitem__) if keep]
    return [(run[0], run[-1] + 1) for run in runs]


def by_definition(mask, count):
    """Positions of the first `count` tokens: the kept ones, then T, T + 1, ..."""
    kept = [position for position, keep in enumerate(mask) if keep]
    return [*kept, *range(len(mask), len(mask) + count)][:count]


@given(selections(), st.integers(0, 80), st.integers(1, 40))
def test_shifts_lead_from_index_to_position(selection, first, count):
    length, mask = selection
    positions = Positions(length, spans(mask))
    assert positions.kept_tokens == sum(mask)
    got = np.arange(first, first + count) + positions.shifts(first, count)
    assert got.dtype == np.int64
    assert got.tolist() == by_definition(mask, first + count)[first:]


@given(selections(), selections(), st.integers(0, 5), st.sampled_from([1, 4, 16]))
def test_blocks_have_equal_keys_only_at_equal_positions(one, other, block, size):
    """For one block: equal keys exactly where all of its tokens stand at the same positions."""
    first, end = block * size, (block + 1) * size
    a, b = (Positions(length, spans(mask)) for length, mask in (one, other))
    same = by_definition(one[1], end)[first:] == by_definition(other[1], end)[first:]
    assert (a.block_key(first, end) == b.block_key(first, end)) == same
    ordinary = by_definition(one[1], end)[first:] == list(range(first, end))
    assert (a.block_key(first, end) is None) == ordinary


@given(selections())
def test_the_wire_holds_all_of_it(selection):
    length, mask = selection
    wire = Positions(length, spans(mask)).to_wire()
    assert all(type(value) is int for value in wire)
    again = from_arguments({"other": 1, KEY: wire})
    assert again.prompt_tokens == length
    assert again.shifts(0, 80).tolist() == Positions(length, spans(mask)).shifts(0, 80).tolist()
    assert from_arguments({"other": 1}) is from_arguments(None) is None


@pytest.mark.parametrize(
    "bad", [[(5, 5)], [(4, 2)], [(0, 4), (3, 6)], [(0, 4), (4, 6)], [(8, 11)], [(-1, 3)], []], ids=str
)
def test_spans_that_are_no_selection_are_refused(bad):
    with pytest.raises(ValueError, match=r"spans: expected ascending \(start, end\) pairs within 10 tokens"):
        Positions(10, bad)


@pytest.mark.parametrize("wire", ["10", [10], [10, 0], [10, 0, 3.0], [10, 0, True], [10, 0, 3, 5], {"a": 1}], ids=str)
def test_a_wire_that_says_something_else_is_refused(wire):
    with pytest.raises(ValueError, match=r"specprefill_positions: expected ints"):
        from_arguments({KEY: wire})


# ---- the scheduler's side ----


def request(arguments):
    return types.SimpleNamespace(sampling_params=types.SimpleNamespace(extra_args=arguments))


def test_the_hash_gets_the_blocks_positions_beside_its_own_keys():
    hasher = positional(lambda request, start, end, mm: (None if request.plain else (("lora", "a"),), mm + 1))
    one = request({KEY: Positions(100, [(0, 20), (40, 60)]).to_wire()})
    one.plain = True
    assert hasher(one, 0, 16, 7) == (None, 8)  # as in an ordinary request
    assert hasher(one, 16, 32, 7) == ((("specprefill", (4, 0, 12, 20)),), 8)
    assert hasher(one, 32, 48, 0) == ((("specprefill", (8, 20, 8, 60)),), 1)  # 8 kept, then decoded ones
    one.plain = False
    assert hasher(one, 16, 32, 7) == ((("lora", "a"), ("specprefill", (4, 0, 12, 20))), 8)
    other = request(None)
    other.plain = True
    assert hasher(other, 16, 32, 7) == (None, 8)
    pooling = types.SimpleNamespace(sampling_params=None, plain=True)
    assert hasher(pooling, 16, 32, 7) == (None, 8)
    assert positions_of(one) is positions_of(one)  # read once


# ---- the worker's side ----


def step(new=(), finished=()):
    return types.SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=[
            types.SimpleNamespace(req_id=name, sampling_params=types.SimpleNamespace(extra_args=arguments))
            for name, arguments in new
        ],
    )


def test_only_pruned_requests_are_followed_and_only_while_they_live():
    runner = types.SimpleNamespace()
    wire = Positions(9, [(2, 4)]).to_wire()
    follow(runner, step(new=[("a", {KEY: wire}), ("b", None), ("c", {"x": 1})]))
    assert list(tracked(runner)) == ["a"]
    follow(runner, step(new=[("d", {KEY: wire})], finished=["b"]))
    follow(runner, step(new=[("a", {KEY: Positions(9, [(5, 7)]).to_wire()})]))  # preempted, and back as new
    assert tracked(runner)["a"].shifts(0, 2).tolist() == [5, 5]
    follow(runner, step(new=[("d", None)], finished=["a"]))  # the name again, for an ordinary request
    assert tracked(runner) == {}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_of_a_batch_are_shifted_and_no_others(dtype):
    requests = {"a": Positions(50, [(10, 14), (30, 33)]), "z": Positions(20, [(3, 4)])}
    rows = [("x", 5, 3), ("a", 2, 7), ("y", 0, 2), ("z", 6, 1)]
    buffer = torch.cat([torch.arange(first, first + count) for _, first, count in rows] + [torch.full((4,), -1)])
    expected = [5, 6, 7, 12, 13, 30, 31, 32, 50, 51, 0, 1, 25, -1, -1, -1, -1]
    buffer = buffer.to(dtype)
    place = buffer.data_ptr()
    shift_rows(buffer, requests, rows)
    assert buffer.tolist() == expected
    assert (buffer.data_ptr(), buffer.dtype) == (place, dtype)


def test_a_buffer_that_does_not_fit_is_refused_and_others_left_alone():
    requests = {"a": Positions(50, [(10, 14)])}
    with pytest.raises(RuntimeError, match=r"positions: expected at least 3 in one dimension, got \[3, 8\]"):
        shift_rows(torch.zeros(3, 8, dtype=torch.int64), requests, [("a", 0, 3)])
    with pytest.raises(RuntimeError, match=r"positions: expected at least 5"):
        shift_rows(torch.zeros(4, dtype=torch.int64), requests, [("b", 0, 2), ("a", 0, 3)])
    untouched = torch.zeros(3, 8, dtype=torch.int64)
    shift_rows(untouched, requests, [("b", 0, 3)])
    assert not untouched.any()
