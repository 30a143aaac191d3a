"""Arguments at the edge of what their types hold: huge sizes, shared memory, odd strides. A crash is a failure."""

from __future__ import annotations

import time

import numpy as np
import processes
import pytest
import torch
from calls import CALLS, KEPT, LENGTH
from grid import Backend, on_backends, same
from scoring import FP32, Case, assert_close, check, draw
from selecting import select, selection_of

import specprefill_kernels as spk

HUGE_WINDOWS = (10**8 + 1, 2**62 + 1, 2**63 - 1)


def call(name: str, backend, **changes):
    """A good call with some of its arguments changed."""
    good = CALLS[name]
    return good.function(**{**good.arguments(backend.device), "backend": backend.name, **changes})


def refused(name: str, argument: str, backend, **changes) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got "):
        call(name, backend, **changes)


def interleaved(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a buffer whose other elements are nonsense."""
    return torch.stack([tensor, torch.full_like(tensor, 99)], dim=-1)[..., 0]


def shared(device: str, count: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors on one array that start 16 bytes behind one another; on the CPU each has a storage of its own."""
    buffer = np.zeros(count, dtype=np.float32)
    whole = torch.zeros(count, device=device)
    flat = [(4 * i, 4 * i + int(np.prod(shape))) for i, shape in enumerate(shapes)]
    parts = [torch.from_numpy(buffer[i:j]) if device == "cpu" else whole[i:j] for i, j in flat]
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


# ---- strides of a selection ----


@on_backends("gather_tokens")
@pytest.mark.parametrize("name", ["gather", "gather packed", "kv", "kv packed", "kv paged", "kv out"])
def test_a_selection_may_have_any_strides(backend, name):
    plain = selection_of(KEPT, device=backend.device)
    flipped = plain._replace(indices=plain.indices.t().contiguous().t())
    stepped = spk.Selection(*(interleaved(part) for part in plain))
    columns = plain._replace(num_kept=torch.stack([plain.num_kept, plain.num_kept + 1], 1)[:, 0])
    expected = call(name, backend, selection=plain)
    for selection in (flipped, stepped, columns):
        for got, wanted in zip(call(name, backend, selection=selection), expected, strict=True):
            if isinstance(wanted, torch.Tensor):
                same(got, wanted)
            else:
                assert got == wanted


# ---- layers that differ ----


@on_backends("score_layers")
@pytest.mark.parametrize("rows", [(8, 2), (2, 8)])
def test_layers_must_have_as_many_query_rows_as_the_first(backend, rows):
    state = spk.new_state(1, 1, LENGTH, device=backend.device)
    queries = [torch.ones(1, n, 2, 8, device=backend.device) for n in rows]
    keys = [torch.ones(1, 2, LENGTH, 8, device=backend.device)] * 2
    with pytest.raises(ValueError, match=r"^queries_per_layer\[1\]: expected .*, got .*"):
        spk.score_layers_(state, queries, keys, backend=backend.name)


@on_backends("score_layers")
def test_a_workspace_for_the_largest_of_each_size_serves_all_layers(backend):
    """Few KV heads make large groups: the workspace is for most query heads over fewest KV heads."""
    shapes = [(8, 8, 32), (4, 1, 64), (8, 2, 32)]
    queries = [torch.randn(2, 3, q, d, generator=torch.Generator().manual_seed(q + d)) for q, _, d in shapes]
    keys = [torch.randn(2, kv, 150, d, generator=torch.Generator().manual_seed(kv + d)) for _, kv, d in shapes]
    queries, keys = ([x.to(backend.device) for x in tensors] for tensors in (queries, keys))
    name = "cpu" if backend.name == "reference" else backend.name
    size = spk.score_workspace_size(3, 8, 1, 64, 150, batch=2, layers=3, backend=name)
    states = [spk.new_state(2, 3, 150, device=backend.device) for _ in range(2)]
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=backend.device)
    spk.score_layers_(states[0], queries, keys, backend=backend.name)
    spk.score_layers_(states[1], queries, keys, backend=backend.name, workspace=workspace)
    same(states[1], states[0])


# ---- sizes ----


def pooled(backend: Backend, size: int, edge: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A score and an importance through a window wider than the prompt, and the seconds that both took."""
    problem = draw(Case(seq_lens=(64, 40), options={"pool_kernel_size": size, "pool_edge": edge}))
    weights = torch.full((2, 3, 64), 1 / 64, device=backend.device)
    options = {"pool_kernel_size": size, "pool_edge": edge, "backend": backend.name}
    if backend.device != "cpu":  # where kernels are compiled on their first call
        problem.run(backend)
        spk.finalize_importance(weights, **options)
    spk.finalize_importance(weights, backend=backend.name)
    started = time.perf_counter()
    state = problem.run(backend)
    importance = spk.finalize_importance(weights, **options).cpu()
    return state, importance, time.perf_counter() - started


@on_backends("score_layer")
@pytest.mark.parametrize("edge", ["zero", "valid"])
@pytest.mark.parametrize("size", HUGE_WINDOWS)
def test_a_window_wider_than_the_prompt(backend, size, edge):
    """Each position then holds the whole row's sum, which is 1, over the width or over the positions inside."""
    state, importance, seconds = processes.alone(pooled, backend, size, edge)
    for b, length in enumerate((64, 40)):
        share = 1 / size if edge == "zero" else 1 / length
        torch.testing.assert_close(state[b, :, :length], torch.full((3, length), share), rtol=1e-5, atol=0)
    share = 1 / size if edge == "zero" else 1 / 64
    torch.testing.assert_close(importance, torch.full((2, 64), share), rtol=1e-5, atol=0)
    assert seconds < backend.sized(1, 20), "grows with the window"


def score_expanded(head_dim: int) -> str:
    """The error of a score whose query and key repeat one element."""
    query, key = torch.ones(1, 1, 1, 1).expand(1, 1, 1, head_dim), torch.ones(1, 1, 4, 1).expand(1, 1, 4, head_dim)
    try:
        spk.score_layer_(spk.new_state(1, 1, 4), query, key, backend="cpu")
    except (ValueError, MemoryError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("head_dim", [2**60, 2**58 + 1])
def test_a_head_dim_beyond_any_memory_is_an_error(head_dim):
    assert processes.alone(score_expanded, head_dim)


@on_backends("select_chunks")
@pytest.mark.parametrize("tokens", [LENGTH, 10**9, 2**53, 10**18])
def test_more_tokens_than_there_are_keep_everything(backend, tokens):
    lengths = (LENGTH, 11)
    selection = select(backend, torch.ones(2, LENGTH), lengths, keep_tokens=tokens, chunk_size=4)
    assert selection.num_kept.tolist() == list(lengths)
    assert selection.indices[1].tolist() == [*range(11), *[-1] * 9]


# ---- memory that two arguments share ----


@on_backends("score_layer")
def test_state_on_the_memory_of_a_key(backend):
    key, state = shared(backend.device, 700, (2, 2, LENGTH, 8), (2, 3, LENGTH))
    refused("score", "state", backend, state=state, key=key)


@on_backends("score_layer")
def test_state_on_the_memory_of_a_query(backend):
    query, state = shared(backend.device, 400, (2, 3, 4, 8), (2, 3, LENGTH))
    refused("score", "state", backend, state=state, query=query)


@on_backends("gather_kv")
@pytest.mark.parametrize("which", [0, 1])
def test_gather_kv_out_on_the_memory_of_a_cache(backend, which):
    cache, over = shared(backend.device, 700, (2, 2, LENGTH, 8), (2, 2, 3, 8))
    out = [torch.zeros(2, 2, 3, 8, device=backend.device) for _ in range(2)]
    out[which] = over
    refused("kv out", rf"out\[{which}\]", backend, key_cache=cache, out=tuple(out))


@on_backends("score_layer")
def test_workspace_on_the_memory_of_the_state(backend):
    state, floats = shared(backend.device, 10**6, (2, 3, LENGTH), (900_000,))
    refused("score", "workspace", backend, state=state, workspace=floats.view(torch.uint8))


@on_backends("score_layer")
def test_an_empty_workspace_is_too_small(backend):
    refused("score", "workspace", backend, workspace=torch.empty(0, dtype=torch.uint8, device=backend.device))


# ---- numbers that fp32 does not hold ----


@on_backends("score_layer")
@pytest.mark.parametrize("softcap", [1e-50, 1e39])
def test_softcap_must_be_a_number_in_fp32(backend, softcap):
    refused("score", "softcap", backend, softcap=softcap)


@on_backends("score_layer")
def test_key_scale_must_be_a_number_in_fp32(backend):
    refused("score", "key_scale", backend, key_scale=1e39)


@on_backends("score_layer")
@pytest.mark.parametrize("softcap", [1.0, 100.0, 1e4, 1e6])
def test_tanh_of_small_numbers_is_exact_enough(backend, softcap):
    """A score far below the cap passes through almost as it is; the cap multiplies whatever tanh is wrong by."""
    check(Case(seq_lens=(150, 33), options={"softcap": softcap}), backend)


@on_backends("select_chunks")
@pytest.mark.parametrize(("mass", "chunks"), [(0.1, 1), (0.3, 3), (0.6, 6), (0.7, 7), (1.0, 10)])
def test_a_mass_reached_but_for_rounding_is_reached(backend, mass, chunks):
    """Ten equal chunks: sums of 0.1 fall on either side of the wanted part of their total."""
    selection = select(backend, torch.full((1, 10), 0.1), keep_mass=mass, chunk_size=1)
    assert selection.num_kept.tolist() == [chunks]
    selection = select(backend, torch.full((2, 40), 0.1), keep_mass=mass, chunk_size=4)
    assert selection.num_kept.tolist() == [4 * chunks] * 2


# ---- subnormal keys where the caller flushes subnormals ----


def scores_of_subnormals(name: str, bits: str, backend: Backend) -> list[torch.Tensor]:
    """The scores of keys without a leading one: flag off and on, with one and two threads each."""
    dtype = getattr(torch, name)
    stored = torch.int16 if dtype.itemsize == 2 else torch.uint8
    random = torch.Generator().manual_seed(0)
    key = torch.randint(0, 1 << int(bits), (1, 2, 200, 64), generator=random).to(stored).view(dtype)
    largest = float(key.to(FP32).max())
    query = 4 * torch.randn(1, 3, 4, 64, generator=random)
    query[:, :, ::2] = query[:, :, ::2].half().float()
    states = []
    for flush in (False, True):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.set_flush_denormal(flush)
            state = spk.new_state(1, 3, 200, device=backend.device)
            given = query.to(torch.float16).to(backend.device), key.to(backend.device)
            spk.score_layer_(state, *given, key_scale=1 / largest, backend=backend.name)
            torch.set_flush_denormal(False)
            states.append(state.cpu())
    return states


@on_backends("score_layer")
@pytest.mark.parametrize(("name", "bits"), [("float8_e4m3fn", "3"), ("float8_e5m2", "2"), ("float16", "10")])
def test_flushing_subnormals_does_not_change_keys(backend, name, bits):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such flag")
    first, *others = processes.alone(scores_of_subnormals, name, bits, backend)
    assert first.max() > 1.5 * first.min(), "the keys do not differ, so nothing is shown"
    for state in others:
        same(state, first)


# ---- blocks that are not there ----


@on_backends("gather_kv")
@pytest.mark.parametrize("layout", ["paged_nhd", "paged_hnd"])
def test_only_blocks_with_a_kept_token_need_to_be_there(backend, layout):
    shape = (6, 8, 2, 4) if layout == "paged_nhd" else (6, 2, 8, 4)
    caches = [torch.arange(384.0).view(shape) + i for i in range(2)]
    table = torch.tensor([[5, 0, 3], [2, 4, 1]], dtype=torch.int32)
    selection = selection_of([[1, 7, 16], [9, 10]])
    arguments = {"layout": layout, "backend": backend.name}
    caches, table, selection = (
        [cache.to(backend.device) for cache in caches],
        table.to(backend.device),
        spk.Selection(*(part.to(backend.device) for part in selection)),
    )
    expected = spk.gather_kv(*caches, selection, block_table=table, **arguments)
    holes = table.clone()
    holes[0, 1] = holes[1, 0] = holes[1, 2] = -1
    for got, wanted in zip(spk.gather_kv(*caches, selection, block_table=holes, **arguments), expected, strict=True):
        same(got, wanted)
    if not backend.checks_values:
        return
    holes[0, 2] = -1
    with pytest.raises(ValueError, match=r"^block_table\[0, 2\]: expected .*, got -1"):
        spk.gather_kv(*caches, selection, block_table=holes, **arguments)


# ---- what torch must know ----


@on_backends("score_layer")
def test_a_score_counts_as_a_change_of_the_state(backend):
    """Autograd and torch.compile tell by the version whether a tensor was written."""
    state = CALLS["score"].arguments(backend.device)["state"]
    before = state._version
    call("score", backend, state=state)
    assert state._version > before


@on_backends("gather_kv")
@pytest.mark.parametrize("name", ["kv out", "kv paged out"])
def test_a_gather_counts_as_a_change_of_out(backend, name):
    out = CALLS[name].arguments(backend.device)["out"]
    before = [tensor._version for tensor in out]
    call(name, backend, out=out)
    assert all(tensor._version > version for tensor, version in zip(out, before, strict=True))


def test_the_good_case_of_these_tests_agrees_with_the_oracle():
    """Else the refusals above would prove nothing."""
    problem = draw(Case(seq_lens=(64, 40)))
    assert_close(problem.run("reference"), problem.expected())
