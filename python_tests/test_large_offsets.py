"""Addresses beyond 2^31 elements, without the memory: the buffers are mapped and hardly touched.

Only the CPU maps memory without filling it; test_gpu_large_offsets.py does the same on a GPU with real memory.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grid import on_backends, same
from layouts import far_apart, lay_out
from scoring import BF16, E4M3, FP32, Case, assert_close, draw
from selecting import selection_of

import specprefill_kernels as spk


@on_backends("score_layer", devices=("cpu",))
@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=str)
@pytest.mark.parametrize("layout", ["bhtd", "bthd", "packed", "paged_nhd", "paged_hnd"])
def test_keys_far_apart(backend, layout, dtype):
    """Batch entries, tokens or blocks beyond the reach of an int32."""
    problem = draw(Case(layout=layout, dtypes=(FP32, dtype), seq_lens=(9, 7), head_dim=16, block_size=4))
    key = problem.arguments()["key"]
    axis, at = {"bhtd": (0, 1), "bthd": (0, 1)}.get(layout, (0, max(1, len(key) // 2)))
    assert_close(problem.run(backend, key=far_apart(key, axis, at)), problem.expected())


@on_backends("score_layer", devices=("cpu",))
@pytest.mark.parametrize("axis", [1, 2, 3], ids=["heads", "tokens", "dims"])
def test_strides_inside_a_sequence(backend, axis):
    problem = draw(Case(dtypes=(FP32, E4M3), seq_lens=(6, 5), head_dim=8))
    key = problem.arguments()["key"]
    assert_close(problem.run(backend, key=far_apart(key, axis, key.shape[axis] - 1)), problem.expected())


@on_backends("gather_tokens", devices=("cpu",))
@pytest.mark.parametrize("axis", [0, 1], ids=["sequences", "tokens"])
def test_gathered_tokens_far_apart(backend, axis):
    x = torch.arange(40, dtype=torch.uint8).view(2, 5, 4)
    selection = selection_of([[0, 4], [1, 2, 4]])
    far = spk.gather_tokens(far_apart(x, axis, x.shape[axis] - 1), selection, backend=backend.name)
    same(far.values, spk.gather_tokens(x, selection, backend=backend.name).values)


@on_backends("gather_kv", devices=("cpu",))
def test_gathered_blocks_far_apart(backend):
    tokens = [torch.randn(9, 2, 16).to(E4M3), torch.randn(7, 2, 16).to(E4M3)]
    cache = lay_out(tokens, "paged_nhd", block_size=4)
    table = cache.arguments["block_table"]
    selection = selection_of([[0, 4, 8], [1, 6]])
    call = {"selection": selection, "layout": "paged_nhd", "block_table": table, "backend": backend.name}
    near, _ = spk.gather_kv(cache.buffer, cache.buffer, **call)
    far_cache = far_apart(cache.buffer, 0, len(cache.buffer) // 2)
    far, _ = spk.gather_kv(far_cache, far_cache, **call)
    same(far, near)


on_the_cpu = on_backends("score_layer", devices=("cpu",))


@on_the_cpu
def test_heads_far_apart(backend):
    problem = draw(Case(dtypes=(FP32, E4M3), heads=(3, 3), seq_lens=(6, 5), head_dim=8))
    assert_close(problem.run(backend, key=far_apart(problem.arguments()["key"], 1, 2)), problem.expected())


@on_the_cpu
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "rows", "heads"])
def test_queries_far_apart(backend, axis):
    problem = draw(Case(dtypes=(BF16, BF16), heads=(3, 3), seq_lens=(6, 5, 4), head_dim=8))
    assert_close(problem.run(backend, query=far_apart(problem.query, axis, 2)), problem.expected())


@on_the_cpu
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "rows", "heads"])
def test_lse_far_apart(backend, axis):
    problem = draw(Case(heads=(3, 3), seq_lens=(6, 5, 4), head_dim=8, lse=True))
    assert_close(problem.run(backend, lse=far_apart(problem.lse, axis, 2)), problem.expected())


@on_the_cpu
@pytest.mark.parametrize("axis", [0, 1], ids=["sequences", "rows"])
def test_a_state_far_apart(backend, axis):
    problem = draw(Case(seq_lens=(6, 5, 4), head_dim=8))
    state, arguments = far_apart(problem.state, axis, 2), problem.arguments()
    spk.score_layer_(state, arguments.pop("query"), arguments.pop("key"), backend=backend.name, **arguments)
    assert_close(state, problem.expected())


@on_backends("gather_tokens", devices=("cpu",))
@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 5, 3, 3)], ids=str)
def test_gathered_words_far_apart(backend, shape):
    x = torch.arange(int(np.prod(shape)), dtype=torch.uint8).view(shape)
    selection = selection_of([[0, 4], [1, 2, 4]])
    far = spk.gather_tokens(far_apart(x, 2, shape[2] - 1), selection, backend=backend.name)
    same(far.values, spk.gather_tokens(x, selection, backend=backend.name).values)


@on_backends("gather_kv", devices=("cpu",))
@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["sequences", "heads", "tokens", "dims"])
def test_gathering_into_caches_far_apart(backend, axis):
    cache = torch.arange(3 * 3 * 9 * 5).to(torch.uint8).view(3, 3, 9, 5)
    selection = selection_of([[0, 4, 8], [1, 6], [2]])
    near, _ = spk.gather_kv(cache, cache, selection, layout="bhtd", backend=backend.name)
    shape = near.shape
    out = far_apart(torch.zeros_like(near), axis, shape[axis] - 1), torch.zeros_like(near)
    spk.gather_kv(cache, cache, selection, layout="bhtd", out=out, backend=backend.name)
    same(out[0], near)
