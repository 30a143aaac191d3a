"""The tool that compares selections by sparse and dense speculator attention."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from loop_models import build, byte_tokenizer, config
from quality_samples import sample

from specprefill_kernels.loop import SpecPrefill

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the bench is not part of the package

from bench.attention_overlap import Reading, markdown, parse_blocks, rank_correlation, read, rows


def reading(kept: set[int], importance: list[float], *, attention: str = "dense", **changes) -> Reading:
    fields = {"evidence": {0.5: 1.0}, "seconds": 2.0, **changes}
    return Reading(attention, torch.tensor(importance), {0.5: kept}, **fields)


def test_rows_are_means_over_prompts():
    dense = reading({0, 1, 2, 3}, [1.0, 2, 3, 4])
    same = reading({0, 1, 2, 3}, [1.0, 2, 3, 4], attention="sparse", seconds=1.0)
    other = reading({2, 3, 4, 5}, [4.0, 3, 2, 1], attention="sparse", seconds=1.0, evidence={0.5: 0.5})
    (row,) = rows([(dense, same), (dense, other)], 100, (16, 4), [0.5], 1)
    assert row.jaccard == pytest.approx((1 + 2 / 6) / 2)
    assert row.jaccard_least == pytest.approx(1 / 3)
    assert (row.evidence_dense, row.evidence_sparse) == (1.0, 0.75)
    assert row.chunk_rank_correlation == pytest.approx(0.0)
    assert (row.dense_seconds, row.sparse_seconds, row.sparse_prompts) == (2.0, 1.0, 2)
    assert "| 100 | 4 x 16 | 64% | 50% | 0.67 | 1.00 | 0.75 | 2.00 | 1.00 |" in markdown([row])


def test_ranks_are_of_chunks():
    assert rank_correlation(torch.tensor([9.0, 0, 1, 1]), torch.tensor([5.0, 5, 0, 0]), 2) == pytest.approx(1.0)


def test_blocks_are_size_and_count():
    assert parse_blocks("64x8") == (64, 8)


def test_a_prompt_is_read_dense_and_sparse():
    model = build("llama", seed=7)
    loop = SpecPrefill(model, model, config(protect="none"), tokenizer=byte_tokenizer())
    dense = read(loop, sample(), [0.25, 0.5], None)
    some, all_of_it = (read(loop, sample(), [0.25, 0.5], blocks) for blocks in ((16, 4), (16, 400)))
    assert (dense.attention, some.attention, all_of_it.attention) == ("dense", "sparse", "dense")
    assert all_of_it.kept == dense.kept
    assert not torch.equal(some.importance, dense.importance)
    assert len(some.kept[0.5]) > len(some.kept[0.25]) > 0
    assert 0.0 <= some.evidence[0.25] <= some.evidence[0.5] <= 1.0
