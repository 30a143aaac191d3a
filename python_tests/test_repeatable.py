"""Bit for bit: two runs, any number of threads, a batch and its sequences alone."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from grid import on_backends, same
from layouts import LAYOUTS
from scoring import BF16, E4M3, FP16, FP32, Case, Problem, draw

import specprefill_kernels as spk

BATCH = Case(seq_lens=(700, 133, 1, 64), rows=(5, 2, 1, 5), look_ahead=5, heads=(6, 2), spare=3)
DTYPES = [(FP32, FP32), (FP16, FP16), (BF16, BF16), (BF16, E4M3), (FP32, BF16)]
OPTIONS = [
    {},
    {"queries": "observation_window", "window": 50, "softcap": 5.0},
    {"normalize_over": "visible", "pool_edge": "valid"},
    {"pool_order": "after_max"},
]


def alone(problem: Problem, b: int) -> Problem:
    """One sequence of a batch as a batch of its own."""
    case = problem.case
    length, rows = case.seq_lens[b], problem.rows[b]
    return dataclasses.replace(
        problem,
        case=case.but(seq_lens=(length,), rows=(rows,)),
        query=problem.query[b : b + 1],
        keys=[problem.keys[b]],
        state=problem.state[b : b + 1, :, :length].clone(),
        rows=(rows,),
        lse=None if problem.lse is None else problem.lse[b : b + 1],
    )


def batch_of(backend) -> Case:
    """A prompt of several tiles among short ones."""
    return backend.sized(BATCH, BATCH.but(seq_lens=(270, 9), rows=(5, 2), heads=(3, 1)))


def batch_case(backend, layout: str, dtypes, options: dict) -> Case:
    case = batch_of(backend).but(layout=layout, dtypes=dtypes, options=options)
    return case.but(rows=(5, 2, 1, 4)) if len(case.rows) == 4 and "queries" in options else case


@on_backends("score_layer")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_equals_its_sequences_alone(backend, layout, dtypes, options):
    problem = draw(batch_case(backend, layout, dtypes, options))
    together = problem.run(backend)
    for b, length in enumerate(problem.case.seq_lens):
        same(together[b : b + 1, :, :length].contiguous(), alone(problem, b).run(backend), f"sequence {b}")


@on_backends("score_layer")
@pytest.mark.parametrize("lse", [False, True], ids=["own lse", "given lse"])
@pytest.mark.parametrize("one_row", [False, True], ids=["all rows", "one row"])
def test_a_batch_equals_its_sequences_alone_with_lse_or_one_row(backend, lse, one_row):
    problem = draw(batch_of(backend).but(lse=lse, one_row=one_row))
    together = problem.run(backend)
    for b, length in enumerate(problem.case.seq_lens):
        same(together[b : b + 1, :, :length].contiguous(), alone(problem, b).run(backend), f"sequence {b}")


@on_backends("score_layer")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("one_row", [False, True], ids=["all rows", "one row"])
def test_scores_do_not_depend_on_run_or_threads(backend, dtypes, options, one_row, threads):
    problem = draw(batch_case(backend, "bhtd", dtypes, options).but(one_row=one_row))
    runs = []
    for count in backend.sized((1, 2, 3, 1), (1, 2)):
        threads(count)
        runs.append(problem.run(backend))
    for again in runs[1:]:
        same(again, runs[0])


def tail_inputs(device: str):
    random = torch.Generator().manual_seed(11)
    state = torch.rand(3, 8, 9000, generator=random) ** 6
    embeddings = torch.randn(3, 9000, 24, generator=random)
    lengths = torch.tensor([9000, 4097, 31])
    return tuple(x.to(device) for x in (state, embeddings, lengths))


def tail(backend, rows=slice(None)):
    """Everything after scoring, on some sequences of the batch."""
    state, embeddings, lengths = (x[rows] for x in tail_inputs(backend.device))
    return spk.select_tokens(
        state, embeddings, lengths, keep_ratio=0.3, pool_kernel_size=13, sink=4, backend=backend.name
    )


@on_backends("select_tokens")
def test_the_tail_does_not_depend_on_run_or_threads(backend, threads):
    runs = []
    for count in (1, 2, 3, 1):
        threads(count)
        runs.append(tail(backend))
    for again in runs[1:]:
        same(again.importance, runs[0].importance)
        same(again.selection.indices, runs[0].selection.indices)
        same(again.packed.values, runs[0].packed.values)
        same(again.packed.position_ids, runs[0].packed.position_ids)


@on_backends("select_tokens")
def test_the_tail_of_a_batch_equals_its_sequences_alone(backend):
    together = tail(backend)
    starts = together.packed.cu_seqlens.tolist()
    for b in range(3):
        single = tail(backend, slice(b, b + 1))
        same(together.importance[b : b + 1], single.importance)
        same(together.selection.indices[b : b + 1], single.selection.indices)
        count = int(single.selection.num_kept[0])
        assert starts[b + 1] - starts[b] == count
        same(together.packed.values[starts[b] : starts[b + 1]], single.packed.values[:count])


@on_backends("score_layer")
def test_callers_in_many_threads_do_not_disturb_each_other(backend):
    problems = [draw(batch_of(backend).but(seed=seed, dtypes=(BF16, BF16))) for seed in range(4)]
    single = [problem.run(backend) for problem in problems]
    # Triton's interpreter keeps the program's number in a global: there the callers take turns.
    with ThreadPoolExecutor(backend.sized(4, 1)) as pool:
        for _ in range(backend.sized(3, 1)):
            for left, right in zip(pool.map(lambda problem: problem.run(backend), problems), single, strict=True):
                same(left, right)


@pytest.mark.parametrize("pool_kernel_size", [13, 31, 101])
def test_a_short_prompt_is_scored_the_same_beside_a_long_one(pool_kernel_size):
    """Bit for bit, and in a state of its own size too: the window's sums are formed by the prompt, not by the batch."""
    generator = torch.Generator().manual_seed(3)
    lengths = [700, *range(1, 20)]
    query = torch.randn(len(lengths), 4, 4, 32, generator=generator)
    key = torch.randn(len(lengths), 2, max(lengths), 32, generator=generator)
    together = spk.new_state(len(lengths), 4, max(lengths))
    options = {"pool_kernel_size": pool_kernel_size, "backend": "cpu"}
    spk.score_layer_(together, query, key, seq_lens=torch.tensor(lengths), **options)
    for b, length in enumerate(lengths):
        alone = spk.new_state(1, 4, length)
        spk.score_layer_(alone, query[b : b + 1], key[b : b + 1, :, :length], **options)
        assert torch.equal(alone[0], together[b, :, :length]), f"length {length}"
