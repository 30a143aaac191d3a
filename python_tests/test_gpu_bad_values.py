"""On a GPU contents are not looked at. Bad ones then crash nothing and write nothing outside, and NaN stays NaN.

A failure here may leave the process without a usable GPU, so bench/gpu_check.sh gives this file a process of its own.
"""

from __future__ import annotations

import gpu
import pytest
import torch
from bad_selections import GATHERS, WILD_COUNTS, gather_anything
from calls import CALLS, LENGTH, score
from grid import on_gpu_backends
from test_checks import TABLE, apply, placed_all

import specprefill_kernels as spk

pytestmark = pytest.mark.gpu

NAN = float("nan")
BAD = [bad for bad in TABLE if bad.values]


@on_gpu_backends("select_tokens")
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.call}: {bad.fault}")
def test_bad_contents_write_nothing_outside(backend, bad):
    """The outputs that a caller gives stand amid sentinels; the inputs keep every byte."""
    call = CALLS[bad.call]
    arguments = placed_all(apply(bad.changes, call.arguments()), "cuda")
    guards = []
    if bad.call.startswith("score"):
        arguments["state"], guard = gpu.guarded(arguments["state"])
        guards.append(guard)
    if "out" in arguments:
        pairs = [gpu.guarded(tensor) for tensor in arguments["out"]]
        arguments["out"] = tuple(view for view, _ in pairs)
        guards += [guard for _, guard in pairs]
    inputs = [t for name, value in arguments.items() if name not in ("state", "out") for t in gpu.tensors_in(value)]
    before = [tensor.clone() for tensor in inputs]
    call.function(**arguments, backend=backend.name)
    torch.cuda.synchronize()
    assert all(guard() for guard in guards)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor.cpu().nan_to_num(7.5), copy.cpu().nan_to_num(7.5)), "an input changed"
    if bad.call == "score" and bad.fault.startswith("nan"):  # planted in a query or key
        assert arguments["state"].isnan().any(), "NaN was lost"


@on_gpu_backends("score_layer")
@pytest.mark.parametrize("layout", ["bhtd", "packed", "paged_nhd", "paged_hnd"])
@pytest.mark.parametrize("lengths", [(0, LENGTH + 9), (-5, 2**31 - 1), (2**31 - 1, -(2**31))], ids=str)
@pytest.mark.parametrize("visible", [False, True])
def test_any_lengths_and_tables(backend, layout, lengths, visible):
    """Nonsense in every table at once."""
    arguments = placed_all(score(layout), "cuda")
    arguments["seq_lens"] = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    arguments["num_look_ahead"] = arguments["seq_lens"].flip(0).contiguous()
    for name in ("cu_seqlens", "block_table"):
        if name in arguments:
            wild = torch.tensor([-(2**31), 2**31 - 1, -1, 12345, 5], dtype=torch.int32, device="cuda")
            shape = arguments[name].shape
            arguments[name] = wild.repeat(shape.numel())[: shape.numel()].view(shape).contiguous()
    arguments["state"], untouched = gpu.guarded(arguments["state"])
    how = "visible" if visible else "prompt"
    spk.score_layer_(**arguments, normalize_over=how, backend=backend.name)
    torch.cuda.synchronize()
    assert untouched()


@on_gpu_backends("select_tokens")
@pytest.mark.parametrize("lengths", [(0, LENGTH + 9), (-5, 2**31 - 1), (2**31 - 1, -(2**31))], ids=str)
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.4}, {"keep_mass": 0.4}, {"keep_tokens": 8, "sink": 3, "tail": 9}])
def test_the_tail_with_any_lengths(backend, lengths, budget):
    """What comes out is a selection still: positions inside the buffer, ascending, counts that fit."""
    state, x = gpu.random(2, 3, LENGTH, device="cuda").abs(), torch.arange(2 * LENGTH, device="cuda").view(2, LENGTH)
    wild = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    packed, selection, _ = spk.select_tokens(
        state, x, wild, wild.flip(0).contiguous(), chunk_size=4, backend=backend.name, **budget
    )
    torch.cuda.synchronize()
    for b in range(2):
        count = int(selection.num_kept[b])
        assert 0 <= count <= selection.indices.shape[1]
        kept = selection.indices[b, :count].tolist()
        assert kept == sorted(set(kept))
        assert all(0 <= t < LENGTH for t in kept)
    starts = packed.cu_seqlens.tolist()
    assert starts == sorted(starts)
    assert starts[-1] <= packed.values.shape[0]


@on_gpu_backends("gather_kv")
@pytest.mark.parametrize("name", GATHERS)
@pytest.mark.parametrize("kept", WILD_COUNTS, ids=str)
def test_any_selection(backend, name, kept):
    guards = gather_anything(name, kept, backend.name, "cuda")
    torch.cuda.synchronize()
    assert all(guard() for guard in guards)


@on_gpu_backends("finalize_importance")
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("pool", [None, 3])
def test_nan_in_the_state_stays_nan_in_the_importance(backend, reduce, pool):
    """There, and within the pooling window around it; nowhere else."""
    state = gpu.random(2, 3, 5000, device="cuda").abs()
    state[1, 2, 4321] = NAN
    state[0, 2, 10] = NAN  # in a row that is not valid
    rows = torch.tensor([2, 3], dtype=torch.int32, device="cuda")
    importance = spk.finalize_importance(state, None, rows, reduce=reduce, pool_kernel_size=pool, backend=backend.name)
    half = (pool or 1) // 2
    wanted = [[1, t] for t in range(4321 - half, 4321 + half + 1)]
    assert importance.isnan().nonzero().tolist() == wanted


@on_gpu_backends("score_layers")
@pytest.mark.parametrize("later", [False, True], ids=["first layer", "second layer"])
@pytest.mark.parametrize("one_row", [False, True], ids=["all rows", "one row"])
def test_nan_in_a_layer_stays_in_the_state(backend, later, one_row):
    """Whatever comes before or after it in the maximum."""
    queries = [gpu.random(1, 3, 4, 16, device="cuda", seed=i) for i in range(2)]
    keys = [gpu.random(1, 2, 300, 16, device="cuda", seed=i) for i in range(2)]
    queries[int(later)][0, 1, 2, 3] = NAN
    state = spk.new_state(1, 1 if one_row else 3, 300, device="cuda")
    spk.score_layers_(state, queries, keys, backend=backend.name)
    assert state[0, 0 if one_row else 1].isnan().all()
    assert one_row or not state[0, ::2].isnan().any()


@on_gpu_backends("select_chunks")
def test_nan_ranks_above_everything(backend):
    """As in torch.topk: what is not a number is kept, so that it is seen."""
    importance = gpu.random(2, 1000, device="cuda").abs() * 1e30
    importance[0, 707] = NAN
    importance[1, 3] = float("inf")
    selection = spk.select_chunks(importance, keep_tokens=10, chunk_size=10, backend=backend.name)
    assert selection.spans(0) == [(700, 710)]
    assert selection.spans(1) == [(0, 10)]
