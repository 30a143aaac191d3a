"""Block-sparse attention: which blocks are chosen, and attention over them, against loops in fp64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from attending import Case, as_lists, assert_close, check, expected_lists, expected_output
from grid import on_backends, same
from layouts import place, poison
from properties import given, st
from torch.nn.functional import scaled_dot_product_attention

import specprefill_kernels as spk

pytestmark = on_backends("block_sparse_attention")
FP16, BF16 = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(rows=1, total=1),
        Case(rows=1, total=77),
        Case(rows=16, total=96),
        Case(rows=33, total=90),
        Case(rows=15, total=15, keep=3),
        Case(rows=17, total=17, keep=3),
        Case(keep=1, sink=0, local=1),
        Case(keep=4, sink=3, local=1),
        Case(keep=4, sink=0, local=4),
        Case(keep=99),
        Case(total=120, rows=60, block_size=32, keep=3),
    ],
    ids=lambda case: f"{case.rows}of{case.total}x{case.block_size}k{case.keep}s{case.sink}l{case.local}",
)
def test_lengths_and_budgets(backend, case):
    check(case, backend)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16], ids=str)
def test_head_dims_and_dtypes(backend, head_dim, dtype):
    if backend.interpreted and dtype != BF16 and head_dim not in (80, 256):
        pytest.skip("the interpreter computes all of them in fp32; what differs is tested with two")
    check(Case(24, 48, heads=(1, 1), head_dim=head_dim, dtype=dtype, keep=2, local=1, seed=head_dim), backend)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (3, 1)])
def test_groups_of_heads_and_batches(backend, heads):
    check(Case(rows=20, total=50, heads=heads, batch=backend.sized(3, 2), keep=3), backend)


@given(
    total=st.integers(1, 90),
    part=st.floats(0, 1),
    sink=st.integers(0, 2),
    local=st.integers(1, 3),
    more=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, total, part, sink, local, more, seed):
    rows = max(1, round(part * total))
    check(
        Case(rows, total, heads=(1, 1), head_dim=4, keep=sink + local + more, sink=sink, local=local, seed=seed),
        backend,
    )


def test_equal_scores_go_to_the_earlier_block(backend):
    key = torch.ones(1, 1, 160, 8)
    blocks = spk.select_attention_blocks(
        *(place(x, backend.device) for x in (torch.ones(1, 1, 160, 8), key)),
        block_size=16,
        keep_blocks=5,
        backend=backend.name,
    )
    assert as_lists(blocks)[0][0][9] == [0, 1, 2, 8]


def test_zeros_of_both_signs_are_equal(backend):
    query, key = torch.ones(1, 1, 16, 8), torch.zeros(1, 1, 96, 8)
    key[:, :, 16:48] = -0.0
    tensors = [place(x, backend.device) for x in (query, key)]
    blocks = spk.select_attention_blocks(
        *tensors, block_size=16, keep_blocks=3, sink_blocks=0, local_blocks=1, backend=backend.name
    )
    assert as_lists(blocks) == [[[[0, 1]]]]


def test_a_mean_that_is_no_number_is_the_largest_and_stays_visible(backend):
    query, key, value = Case(rows=100, total=100, keep=3, sink=0, local=1).tensors()
    key[0, 0, 40, 3] = float("nan")
    tensors = [place(x, backend.device) for x in (query, key, value)]
    blocks = spk.select_attention_blocks(
        *tensors[:2], block_size=16, keep_blocks=2, sink_blocks=0, local_blocks=1, backend=backend.name
    )
    lists = as_lists(blocks)[0]
    assert all(head[row] == [2] for head in lists for row in range(3, 7))
    output = spk.block_sparse_attention(*tensors, blocks, block_size=16, backend=backend.name).cpu()
    assert bool(output[:, :, 48:].isnan().all())
    assert bool(output[:, :, :32].isfinite().all())  # what follows may see the mask's -Inf plus NaN


def test_all_blocks_are_dense_attention(backend):
    generator = torch.Generator().manual_seed(3)
    rows, total = 60, 90
    query = torch.randn(1, 4, rows, 16, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(1, 2, total, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(rows, total, dtype=torch.bool).tril(total - rows)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, scale=0.4)
    tensors = [place(x.float(), backend.device) for x in (query, key, value)]
    output = spk.sparse_prefill_attention(*tensors, block_size=16, keep_blocks=6, scale=0.4, backend=backend.name)
    assert_close(output, expected)
    assert output.transpose(1, 2).is_contiguous()


def test_a_prompt_in_chunks_is_the_prompt_at_once(backend):
    query, key, value = (place(x, backend.device) for x in Case(rows=112, total=112, heads=(1, 1)).tensors())
    options = {"block_size": 16, "keep_blocks": 4, "backend": backend.name}
    whole = spk.sparse_prefill_attention(query, key, value, **options)
    bounds = [0, 64, 112]
    parts = [
        spk.sparse_prefill_attention(query[:, :, a:b], key[:, :, :b], value[:, :, :b], **options)
        for a, b in pairwise(bounds)
    ]
    if backend.name == "triton":  # the same tiles in the same order
        same(torch.cat(parts, 2), whole)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)


def test_a_batch_is_its_sequences_alone(backend):
    query, key, value = (place(x, backend.device) for x in Case(rows=20, total=50, heads=(1, 1), batch=2).tensors())
    options = {"block_size": 16, "keep_blocks": 4, "backend": backend.name}
    both = spk.sparse_prefill_attention(query, key, value, **options)
    alone = [spk.sparse_prefill_attention(*(x[b : b + 1] for x in (query, key, value)), **options) for b in (0, 1)]
    torch.testing.assert_close(torch.cat(alone), both, rtol=1e-6, atol=1e-6)


def test_two_runs_agree_bit_for_bit(backend):
    tensors = [place(x, backend.device) for x in Case(rows=20, total=50, heads=(1, 1)).tensors()]
    options = {"block_size": 16, "keep_blocks": 4, "backend": backend.name}
    same(spk.sparse_prefill_attention(*tensors, **options), spk.sparse_prefill_attention(*tensors, **options))


@pytest.mark.parametrize("strides", ["bthd", "gaps", "last", "room"])
def test_strided_tensors(backend, strides):
    case = Case(rows=40, total=64, heads=(4, 2), keep=3)
    query, key, value = case.tensors()

    def poison_like(x):
        return place(poison(*x.shape, dtype=x.dtype), backend.device)

    def restrided(x):
        x = place(x, backend.device)
        if strides == "bthd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if strides == "gaps":
            return torch.stack([x, poison_like(x)], 3).flatten(2, 3)[:, :, ::2]
        if strides == "last":
            return torch.stack([x, poison_like(x)], 4).flatten(3)[..., ::2]
        return torch.cat([x, poison_like(x)], 2)[:, :, : x.shape[2]]  # a cache with room behind the prompt

    tensors = [restrided(x) for x in (query, key, value)]
    blocks = spk.select_attention_blocks(*tensors[:2], **case.budget, backend=backend.name)
    assert as_lists(blocks) == expected_lists(case, query, key)
    output = spk.block_sparse_attention(*tensors, blocks, block_size=16, backend=backend.name)
    assert_close(output, expected_output(case, as_lists(blocks), query, key, value))


def test_keys_beyond_a_row_do_not_matter(backend):
    """What is later than a row, or in no block of its list, may be anything."""
    case = Case(rows=90, total=90, heads=(1, 1), keep=3)
    query, key, value = case.tensors()
    lists = expected_lists(case, query, key)
    blocks = spk.select_attention_blocks(query, key, **case.budget, backend="reference")
    options = {"block_size": 16, "backend": backend.name}
    tensors = [place(x, backend.device) for x in (query, key, value)]
    placed = spk.AttentionBlocks(*(place(x, backend.device) for x in blocks))
    before = spk.block_sparse_attention(*tensors, placed, **options)
    seen = {*lists[0][0][5], 5}
    for j in set(range(6)) - seen:
        tensors[1][:, :, j * 16 : j * 16 + 16] = float("nan")
    tensors[1][:, :, 85:] = 1000.0
    after = spk.block_sparse_attention(*tensors, placed, **options)
    same(after[:, :, 80:85], before[:, :, 80:85])


def test_lists_of_unequal_length(backend):
    case = Case(rows=64, total=64, heads=(2, 1))
    query, key, value = case.tensors()
    lists = [[[[], [0], [], [0, 2]], [[], [], [0, 1], [1]]]]
    indices = torch.full((1, 2, 4, 3), 7, dtype=torch.int32)  # behind the end of a list anything may stand
    counts = torch.zeros(1, 2, 4, dtype=torch.int32)
    for h, head in enumerate(lists[0]):
        for row, listed in enumerate(head):
            indices[0, h, row, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
            counts[0, h, row] = len(listed)
    tensors = [place(x, backend.device) for x in (query, key, value)]
    blocks = spk.AttentionBlocks(place(indices, backend.device), place(counts, backend.device))
    output = spk.block_sparse_attention(*tensors, blocks, block_size=16, scale=0.3, backend=backend.name)
    assert_close(output, expected_output(case, lists, query, key, value, scale=0.3))


@pytest.mark.parametrize(
    ("listed", "count", "message"),
    [
        ([0, 1, 3], 3, r"blocks.indices\[0, 0, 3, 2\]: expected an ascending list of blocks in \[0, 3\)"),
        ([1, 0, 2], 3, r"blocks.indices\[0, 0, 3, 1\]"),
        ([1, 1, 2], 3, r"blocks.indices\[0, 0, 3, 1\]"),
        ([-1, 1, 2], 3, r"blocks.indices\[0, 0, 3, 0\]"),
        ([0, 1, 2], 4, r"blocks.counts\[0, 0, 3\]: expected a count in \[0, 3\], got 4"),
        ([0, 1, 2], -1, r"blocks.counts\[0, 0, 3\]"),
    ],
)
def test_bad_lists_are_named(backend, listed, count, message):
    if not backend.checks_values:
        pytest.skip("nothing is read on the host")
    query, key, value = Case(rows=64, total=64, heads=(1, 1)).tensors()
    indices, counts = torch.zeros(1, 1, 4, 3, dtype=torch.int32), torch.zeros(1, 1, 4, dtype=torch.int32)
    indices[0, 0, 3], counts[0, 0, 3] = torch.tensor(listed), count
    with pytest.raises(ValueError, match=message):
        spk.block_sparse_attention(
            query, key, value, spk.AttentionBlocks(indices, counts), block_size=16, backend=backend.name
        )


@pytest.mark.parametrize("head_dim", [64, 80])
def test_tiles_smaller_than_a_block(backend, head_dim, monkeypatch):
    """Several programs for a query block, several tiles for a key block, and above 64 dimensions queries in parts."""
    if backend.name != "triton":
        pytest.skip("a matter of Triton's launches")
    from specprefill_kernels.ops.sparse_attention import triton_config

    monkeypatch.setattr(triton_config, "_INTERPRETED", triton_config._HEAVY[128])
    check(Case(rows=37, total=69, heads=(1, 1), head_dim=head_dim, block_size=32, keep=2, local=1), backend)


def test_more_rows_than_are_ranked_at_once(backend, monkeypatch):
    from specprefill_kernels.ops.sparse_attention import reference

    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 1)
    if backend.name == "triton":
        from specprefill_kernels.ops.sparse_attention import triton_config

        monkeypatch.setattr(triton_config, "SCORES_AT_ONCE", 40)
    check(Case(), backend)


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_a_graph_replays(backend):
    from gpu import captured, no_host_sync

    if backend.name != "triton" or backend.device != "cuda":
        pytest.skip("a GPU backend's own")
    query, key, value = (
        place(x, "cuda") for x in Case(rows=512, total=1500, heads=(8, 2), head_dim=128, dtype=BF16).tensors()
    )

    def call():
        return spk.sparse_prefill_attention(query, key, value, keep_blocks=6, backend="triton")

    eager = call()
    with no_host_sync():
        call()
    graph, output = captured(call)
    output.zero_()
    graph.replay()
    same(output, eager)


@pytest.mark.gpu
def test_on_a_gpu_a_long_prompt_is_the_reference(backend):
    if backend.name != "triton" or backend.device != "cuda":
        pytest.skip("a GPU backend's own")
    case = Case(rows=4096, total=20000, heads=(8, 2), head_dim=128, dtype=BF16, block_size=128, keep=16)
    tensors = [place(x, "cuda") for x in case.tensors()]
    blocks = spk.select_attention_blocks(*tensors[:2], **case.budget, backend="triton")
    assert as_lists(blocks) == as_lists(spk.select_attention_blocks(*tensors[:2], **case.budget, backend="reference"))
    output = spk.block_sparse_attention(*tensors, blocks, backend="triton")
    assert_close(output, spk.block_sparse_attention(*tensors, blocks, backend="reference").cpu().double())
    assert math.isfinite(float(output.float().sum()))
