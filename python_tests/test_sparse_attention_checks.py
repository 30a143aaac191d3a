"""What block-sparse attention refuses, with a message that names the argument."""

from __future__ import annotations

import pytest
import torch

import specprefill_kernels as spk


def arguments(**changes) -> dict:
    tensors = {"query": torch.zeros(1, 4, 20, 8), "key": torch.zeros(1, 2, 50, 8), "value": torch.zeros(1, 2, 50, 8)}
    return {**tensors, "block_size": 16, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(1, 4, 51, 8)}, "query: expected at most key's 50 positions"),
        ({"query": torch.zeros(1, 3, 20, 8)}, "query: expected a number of heads that is a multiple of key's 2, got 3"),
        ({"query": torch.zeros(4, 20, 8)}, r"query: expected 4 dimensions \[B, Hq, n, D\]"),
        ({"query": torch.zeros(1, 4, 0, 8)}, "query: expected no empty dimension"),
        (
            {"query": torch.zeros(1, 4, 20, 8, dtype=torch.float64)},
            "query: expected dtype float32 or float16 or bfloat16",
        ),
        ({"query": torch.zeros(1, 4, 20, 512)}, "key: expected shape"),
        ({name: torch.zeros(1, 4, 20, 512) for name in ("query", "key", "value")}, "head_dim at most 256, got 512"),
        ({"key": torch.zeros(1, 2, 50, 8, dtype=torch.float16)}, "key: expected dtype float32, got torch.float16"),
        ({"key": torch.zeros(2, 2, 50, 8)}, "key: expected shape"),
        ({"value": torch.zeros(1, 2, 49, 8)}, "value: expected shape"),
        ({"value": torch.zeros(1, 2, 50, 8).half()}, "value: expected dtype float32"),
        ({"block_size": 48}, "block_size: expected a power of two from 16 to 256, got 48"),
        ({"block_size": 8}, "block_size: expected at least 16"),
        ({"block_size": 512}, "block_size: expected a power of two"),
        ({"block_size": 16.0}, "block_size: expected an int"),
        ({"keep_blocks": 2}, r"keep_blocks: expected at least sink_blocks \+ local_blocks = 3, got 2"),
        ({"sink_blocks": -1}, "sink_blocks: expected at least 0"),
        ({"local_blocks": 0}, "local_blocks: expected at least 1"),
        ({"scale": float("nan")}, "scale: expected a finite number"),
        ({"backend": "gpu"}, "backend: expected one of"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        spk.sparse_prefill_attention(**arguments(**changes))


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=r"key: expected a torch\.Tensor, got list"):
        spk.sparse_prefill_attention(**arguments(key=[1.0]))
    with pytest.raises(TypeError, match="blocks: expected AttentionBlocks"):
        spk.block_sparse_attention(**arguments(), blocks=torch.zeros(1))


@pytest.mark.parametrize(
    ("which", "blocks", "message"),
    [
        (0, torch.zeros(1, 4, 3, 2, dtype=torch.int32), r"blocks.indices: expected shape \[1, 4, 2, \*\]"),
        (0, torch.zeros(1, 4, 2, 0, dtype=torch.int32), "blocks.indices: expected room for at least one block"),
        (0, torch.zeros(1, 4, 2, 2), "blocks.indices: expected dtype int32"),
        (1, torch.zeros(1, 4, 3, dtype=torch.int32), r"blocks.counts: expected shape \[1, 4, 2\]"),
        (1, torch.zeros(1, 4, 2, dtype=torch.int64), "blocks.counts: expected dtype int32"),
    ],
)
def test_lists_of_another_shape_are_refused(which, blocks, message):
    good = [torch.zeros(1, 4, 2, 2, dtype=torch.int32), torch.zeros(1, 4, 2, dtype=torch.int32)]
    good[which] = blocks
    changed = arguments(query=torch.zeros(1, 4, 18, 8))  # positions 32 to 49: the blocks 2 and 3
    with pytest.raises(ValueError, match=message):
        spk.block_sparse_attention(**changed, blocks=spk.AttentionBlocks(*good))


def test_a_backend_that_is_not_written_says_so():
    with pytest.raises(spk.BackendUnavailable, match="cuda"):
        spk.sparse_prefill_attention(**arguments(), backend="cuda")
