"""On a GPU: addresses beyond 2^31 elements, in real memory that is not filled. Each test holds up to about 9 GB."""

from __future__ import annotations

import gpu
import pytest
import torch
from grid import on_gpu_backends, same, untouched_memory
from layouts import BEYOND, far_apart, place
from scoring import BF16, E4M3, FP32, Case, assert_close, draw
from selecting import selection_of

import specprefill_kernels as spk

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def memory_given_back():
    """Other processes test on the same GPU."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def on_gpu(arguments: dict) -> dict:
    return {k: place(v, "cuda") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@on_gpu_backends("score_layer")
@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=str)
@pytest.mark.parametrize("layout", ["bhtd", "bthd", "packed", "paged_nhd", "paged_hnd"])
def test_keys_far_apart(backend, layout, dtype):
    """Batch entries, tokens or blocks beyond the reach of an int32."""
    problem = draw(Case(layout=layout, dtypes=(FP32, dtype), seq_lens=(9, 7), head_dim=16, block_size=4))
    key = place(problem.arguments()["key"], "cuda")
    axis, at = {"bhtd": (0, 1), "bthd": (0, 1)}.get(layout, (0, max(1, len(key) // 2)))
    assert_close(problem.run(backend, key=far_apart(key, axis, at)), problem.expected())


@on_gpu_backends("score_layer")
@pytest.mark.parametrize("axis", [1, 2, 3], ids=["heads", "tokens", "dims"])
def test_strides_inside_a_sequence(backend, axis):
    problem = draw(Case(dtypes=(FP32, E4M3), seq_lens=(6, 5), head_dim=8))
    key = place(problem.arguments()["key"], "cuda")
    assert_close(problem.run(backend, key=far_apart(key, axis, key.shape[axis] - 1)), problem.expected())


def big_cache(blocks: torch.Tensor, order: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A pool of more than 2^31 elements that holds the blocks at the ids of `order`; the rest is not filled."""
    pool = BEYOND // blocks[0].numel() + 1
    try:
        with untouched_memory():
            buffer = torch.empty(pool, *blocks.shape[1:], dtype=dtype, device="cuda")
    except RuntimeError as error:
        pytest.skip(f"no room for the pool: {error}")
    raw = buffer.view(torch.uint8)
    for i, block in enumerate(order.tolist()):
        raw[block] = blocks[i].view(torch.uint8)
    return buffer


@on_gpu_backends("score_layer")
@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=str)
@pytest.mark.parametrize("layout", ["paged_nhd", "paged_hnd"])
def test_a_paged_cache_beyond_2_31_elements(backend, layout, dtype):
    """An engine's pool: 16 tokens of 8 heads of 128 a block, used at both of its ends. Same bits as in a small pool."""
    count, length = 24, 24 * 16 - 3
    shape = (count, 16, 8, 128) if layout == "paged_nhd" else (count, 8, 16, 128)
    blocks = gpu.random(*shape, device="cuda").to(dtype)
    pool = BEYOND // blocks[0].numel() + 1
    order = torch.cat([torch.arange(5), pool - 1 - torch.arange(count - 5)])
    query = gpu.random(1, 8, 32, 128, device="cuda", dtype=BF16)
    lengths = torch.tensor([length], device="cuda", dtype=torch.int32)
    states = []
    for key, table in ((blocks, torch.arange(count)), (big_cache(blocks, order, dtype), order)):
        state = spk.new_state(1, 8, length, device="cuda")
        given = {"layout": layout, "block_table": table[None].int().cuda(), "seq_lens": lengths}
        spk.score_layer_(state, query, key, backend=backend.name, **given)
        states.append(state)
    assert states[0].min() > 0
    same(states[1], states[0])


@on_gpu_backends("gather_kv")
@pytest.mark.parametrize("layout", ["paged_nhd", "paged_hnd"])
def test_gathering_from_a_paged_cache_beyond_2_31_elements(backend, layout):
    count = 8
    shape = (count, 16, 8, 128) if layout == "paged_nhd" else (count, 8, 16, 128)
    blocks = gpu.random(*shape, device="cuda").to(E4M3)
    pool = BEYOND // blocks[0].numel() + 1
    order = torch.cat([torch.arange(3), pool - 1 - torch.arange(count - 3)])
    selection = selection_of([[0, 5, 40, 41, 100, 127]], device="cuda")
    outs = []
    for cache, table in ((blocks, torch.arange(count)), (big_cache(blocks, order, E4M3), order)):
        given = {"layout": layout, "block_table": table[None].int().cuda(), "backend": backend.name}
        outs.append(spk.gather_kv(cache, cache, selection, **given)[0])
    same(outs[1], outs[0])


@on_gpu_backends("gather_tokens")
@pytest.mark.parametrize("axis", [0, 1], ids=["sequences", "tokens"])
def test_gathered_tokens_far_apart(backend, axis):
    x = torch.arange(40, dtype=torch.uint8, device="cuda").view(2, 5, 4)
    selection = selection_of([[0, 4], [1, 2, 4]], device="cuda")
    far = spk.gather_tokens(far_apart(x, axis, x.shape[axis] - 1), selection, backend=backend.name)
    same(far.values, spk.gather_tokens(x, selection, backend=backend.name).values)


@on_gpu_backends("gather_tokens")
def test_packed_tokens_beyond_2_31_elements(backend):
    """The output too: all of a million tokens of 2 KiB, and one more."""
    tokens, hidden = 2**20 + 1, 2048
    x = torch.randint(0, 255, (1, tokens, hidden), dtype=torch.uint8, device="cuda")
    indices = torch.arange(tokens, dtype=torch.int32, device="cuda")[None]
    counts = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    selection = spk.Selection(indices, counts, counts > tokens)
    packed = spk.gather_tokens(x, selection, backend=backend.name)
    assert torch.equal(packed.values, x[0])


@on_gpu_backends("finalize_importance")
@pytest.mark.parametrize("axis", [0, 1], ids=["sequences", "rows"])
def test_a_state_far_apart(backend, axis):
    """Written by the score, read by what follows; 8.6 GB."""
    lengths = torch.tensor([30, 21], device="cuda", dtype=torch.int32)
    query, key = gpu.random(2, 3, 4, 16, device="cuda"), gpu.random(2, 2, 30, 16, device="cuda")
    near = spk.new_state(2, 3, 30, device="cuda")
    far = far_apart(near, axis, near.shape[axis] - 1)
    results = []
    for state in (near, far):
        spk.score_layer_(state, query, key, seq_lens=lengths, backend=backend.name)
        results.append(spk.finalize_importance(state, lengths, pool_kernel_size=3, backend=backend.name))
    torch.testing.assert_close(far.contiguous(), near, rtol=1e-6, atol=0)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=0)
