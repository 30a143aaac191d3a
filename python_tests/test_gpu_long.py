"""On a GPU: prompts of 128K and a million tokens, against the definition in fp64 and sorting in torch; peak memory."""

from __future__ import annotations

import gpu
import numpy as np
import oracle
import pytest
import torch
from grid import on_gpu_backends, same
from scoring import BF16, E4M3, FP16

import specprefill_kernels as spk

K128, MILLION = 131072, 2**20


@pytest.fixture(autouse=True)
def memory_given_back():
    """Other processes test on the same GPU."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def test_the_exact_state_is_the_oracle():
    """What the scores of long prompts are compared with, itself compared on a short one."""
    query, key = gpu.random(3, 4, 16, device="cpu"), gpu.random(2, 50, 16, device="cpu")
    arrays = query[None].double().numpy(), [key.transpose(0, 1).double().numpy()]
    expected = oracle.score_layer(np.zeros((1, 3, 50)), *arrays, [50], [3], oracle.Scoring())
    np.testing.assert_allclose(gpu.exact_state(query, key).numpy(), expected[0], rtol=1e-12)


@pytest.mark.parametrize("chunk", [7, 32])
def test_sorting_is_the_oracle(chunk):
    importance = torch.rand(2, 500, generator=torch.Generator().manual_seed(0))
    lengths = [500, 131]
    expected = oracle.select_chunks(importance.numpy(), lengths, oracle.Budget(keep_ratio=0.3, chunk_size=chunk))
    for kept, wanted in zip(gpu.kept_by_sorting(importance, lengths, 0.3, chunk), expected, strict=True):
        assert kept.tolist() == wanted.tokens


SHAPES = {  # query heads, KV heads, head dim
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3.2-1B": (32, 8, 64),
    "Llama-3.1-8B": (32, 8, 128),
    "Qwen3-0.6B": (16, 8, 128),
}


@pytest.mark.gpu
@on_gpu_backends("score_layer")
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("length", [8192, K128 - 5])
def test_scores_of_long_prompts(backend, model, length):
    """Every position of a prompt beside a short one, in the shapes of real models."""
    heads, kv_heads, dim = SHAPES[model]
    query = gpu.random(2, 8, heads, dim, device="cuda", dtype=BF16) * 2
    key = gpu.random(2, kv_heads, length + 7, dim, device="cuda", dtype=BF16, seed=1)
    state = spk.new_state(2, 8, length, device="cuda")
    lengths = torch.tensor([length, 1000], device="cuda")
    spk.score_layer_(state, query, key, seq_lens=lengths, backend=backend.name)
    for b, n in enumerate(lengths.tolist()):
        exact = gpu.exact_state(query[b], key[b, :, :n])
        torch.testing.assert_close(state[b, :, :n].double(), exact, rtol=1e-4, atol=1e-9)
        assert not state[b, :, n:].any()


@pytest.mark.gpu
@on_gpu_backends("score_layer")
@pytest.mark.parametrize("dtype", [FP16, E4M3], ids=str)
@pytest.mark.parametrize("layout", ["bthd", "packed", "paged_nhd", "paged_hnd"])
def test_long_keys_in_every_layout(backend, layout, dtype):
    """The same as in the dense layout, which is compared above."""
    length, block = K128 - 5, 16
    query = gpu.random(1, 8, 32, 128, device="cuda", dtype=BF16)
    dense = gpu.random(1, 8, K128, 128, device="cuda", dtype=dtype, seed=1)
    scale = 0.7 if dtype == E4M3 else None
    more: dict = {"seq_lens": torch.tensor([length], device="cuda")}
    expected = spk.new_state(1, 8, length, device="cuda")
    spk.score_layer_(expected, query, dense, key_scale=scale, backend=backend.name, **more)
    raw = dense.view(torch.uint8) if dtype == E4M3 else dense
    if layout == "bthd":
        key = raw.transpose(1, 2).contiguous()
    elif layout == "packed":
        key = raw[0].transpose(0, 1).contiguous()
        more["cu_seqlens"] = torch.tensor([0, K128], device="cuda")
    else:
        blocks = raw[0].transpose(0, 1).reshape(K128 // block, block, 8, 128)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).cuda()
        key = blocks[order.argsort()]
        key = key.transpose(1, 2).contiguous() if layout == "paged_hnd" else key
        more["block_table"] = order[None].int()
    state = spk.new_state(1, 8, length, device="cuda")
    spk.score_layer_(state, query, key.view(dtype), layout=layout, key_scale=scale, backend=backend.name, **more)
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-10)


@pytest.mark.gpu
@on_gpu_backends("score_layer")
@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2], ids=str)
def test_fp8_keys_are_the_numbers_their_bits_say(backend, dtype):
    """All finite codes at once, decoded here by the formats' definition, against the same keys as bf16."""
    exponent_bits, mantissa_bits = (4, 3) if dtype == E4M3 else (5, 2)
    bias, codes = 2 ** (exponent_bits - 1) - 1, torch.arange(256)
    exponent, mantissa = codes >> mantissa_bits & (2**exponent_bits - 1), codes & (2**mantissa_bits - 1)
    fraction = mantissa.double() / 2**mantissa_bits
    normal = torch.ldexp(1 + fraction, exponent - bias)
    value = torch.where(exponent == 0, torch.ldexp(fraction, torch.tensor(1 - bias)), normal)
    value = torch.where(codes >= 128, -value, value)
    finite = (codes & 127) < (127 if dtype == E4M3 else 124)
    assert torch.equal(codes.to(torch.uint8).view(dtype).double()[finite], value[finite]), "the decoding of this test"
    random = torch.Generator().manual_seed(0)
    drawn = codes[finite][torch.randint(0, int(finite.sum()), (1, 2, 5000, 128), generator=random)]
    key = drawn.to(torch.uint8).view(dtype).cuda()
    query = gpu.random(1, 8, 8, 128, device="cuda", dtype=BF16)
    options = {"scale": 1e-3 if dtype == E4M3 else 1e-5, "backend": backend.name}
    states = [spk.new_state(1, 8, 5000, device="cuda") for _ in range(2)]
    spk.score_layer_(states[0], query, key, **options)
    spk.score_layer_(states[1], query, value[drawn].to(BF16).cuda(), **options)
    assert states[1].max() > 3 * states[1].min(), "the keys do not differ, so nothing is shown"
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-10)


@pytest.mark.gpu
@on_gpu_backends("select_chunks")
@pytest.mark.parametrize("values", ["random", "few"])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("length", [K128, K128 + 31, MILLION, MILLION - 1])
def test_selections_of_long_prompts(backend, length, ratio, values):
    """Against a stable sort: many ties where there are few values."""
    importance = gpu.random(2, length, device="cuda").abs()
    if values == "few":
        importance = (importance.view(-1) * 3).floor().view(2, length)
    lengths = [length, length // 3]
    wanted = gpu.kept_by_sorting(importance, lengths, ratio, 32)
    given = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    selection = spk.select_chunks(importance, given, keep_ratio=ratio, backend=backend.name)
    for b, kept in enumerate(wanted):
        count = int(selection.num_kept[b])
        assert count == len(kept)
        assert torch.equal(selection.indices[b, :count].long(), kept)
        assert bool((selection.indices[b, count:] == -1).all())
    assert not selection.overflow.any()


@pytest.mark.gpu
@on_gpu_backends("select_chunks")
@pytest.mark.parametrize("values", ["random", "few"])
def test_selections_of_many_prompts(backend, values):
    """256 prompts of up to 4K tokens in one call, many blocks for each processor."""
    importance = gpu.random(256, 4096, device="cuda").abs()
    if values == "few":
        importance = (importance * 3).floor()
    lengths = [1 + (b * 997) % 4096 for b in range(256)]
    wanted = gpu.kept_by_sorting(importance, lengths, 0.2, 32)
    given = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    selection = spk.select_chunks(importance, given, keep_ratio=0.2, backend=backend.name)
    counts = selection.num_kept.tolist()
    for b, kept in enumerate(wanted):
        assert counts[b] == len(kept), b
        assert torch.equal(selection.indices[b, : counts[b]].long(), kept), b
        assert bool((selection.indices[b, counts[b] :] == -1).all()), b


@pytest.mark.gpu
@on_gpu_backends("select_chunks")
@pytest.mark.parametrize("chunk", [1, 32])
@pytest.mark.parametrize("options", [{"keep_mass": 0.3}, {"keep_ratio": 0.2, "sink": 100, "tail": 3000}], ids=str)
def test_other_budgets_of_a_long_prompt(backend, options, chunk):
    importance = gpu.random(1, K128, device="cuda").abs() ** 3
    options = {**options, "chunk_size": chunk}
    selection = spk.select_chunks(importance, backend=backend.name, **options)
    reference = spk.select_chunks(importance.cpu(), backend="reference", **options)
    for got, wanted in zip(selection, reference, strict=True):
        same(got.cpu(), wanted)


@pytest.mark.gpu
@on_gpu_backends("select_tokens")
@pytest.mark.parametrize("length", [K128, MILLION])
def test_the_tail_of_a_long_prompt(backend, length):
    """The three ops in one call, against torch at every step."""
    state = gpu.random(1, 8, length, device="cuda").abs()
    x = gpu.random(1, length, 16, device="cuda", dtype=BF16)
    packed, selection, importance = spk.select_tokens(state, x, keep_ratio=0.1, backend=backend.name)
    torch.testing.assert_close(importance, state.mean(1), rtol=1e-6, atol=0)
    (kept,) = gpu.kept_by_sorting(importance, [length], 0.1, 32)
    count = len(kept)
    assert int(selection.num_kept[0]) == count == int(packed.cu_seqlens[1])
    assert torch.equal(packed.position_ids[:count], kept)
    assert torch.equal(packed.values[:count], x[0, kept])
    assert not packed.values[count:].any()


@pytest.mark.gpu
@on_gpu_backends("score_layers")
def test_peak_memory_of_scoring_grows_with_rows_times_tokens(backend):
    """16 layers of Llama-3.2-1B at 128K: the state's 4 MiB, not the 2 GiB of all attention weights."""
    query = gpu.random(1, 8, 32, 64, device="cuda", dtype=BF16)
    key = gpu.random(1, 8, K128, 64, device="cuda", dtype=BF16)
    state = spk.new_state(1, 8, K128, device="cuda")
    held = gpu.peak(lambda: spk.score_layers_(state, [query] * 16, [key] * 16, backend=backend.name))
    assert held <= 8 * 4 * 8 * K128, f"{held / gpu.MIB:.1f} MiB"


@pytest.mark.gpu
@on_gpu_backends("select_tokens")
def test_peak_memory_of_the_tail(backend):
    """Importance, indices, ids and positions: 24 bytes a token, and room for as much again."""
    state = gpu.random(1, 8, MILLION, device="cuda").abs()
    ids = torch.arange(MILLION, device="cuda")[None]
    held = gpu.peak(lambda: spk.select_tokens(state, ids, keep_ratio=0.5, backend=backend.name))
    assert held <= 48 * MILLION, f"{held / gpu.MIB:.1f} MiB"


LENGTHS = (K128, 50001, 8191, 7)


@pytest.mark.gpu
@on_gpu_backends("score_layers")
@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
@pytest.mark.parametrize("options", [{}, {"queries": "observation_window", "softcap": 20.0}], ids=str)
def test_the_same_bits_from_run_to_run_and_alone(backend, dtype, options):
    query = gpu.random(4, 8, 32, 64, device="cuda", dtype=BF16) * 2
    key = gpu.random(4, 8, K128, 64, device="cuda", dtype=dtype, seed=1)
    lengths = torch.tensor(LENGTHS, device="cuda", dtype=torch.int32)
    rows = torch.tensor((8, 8, 3, 7), device="cuda", dtype=torch.int32)

    def run(some: slice, width: int) -> torch.Tensor:
        state = spk.new_state(len(lengths[some]), 8, width, device="cuda")
        more = {"seq_lens": lengths[some], "num_look_ahead": rows[some], "backend": backend.name, **options}
        return spk.score_layers_(state, [query[some], query[some].flip(2)], [key[some]] * 2, **more)

    together = run(slice(None), K128)
    for _ in range(4):
        same(run(slice(None), K128), together)
    for b, length in enumerate(LENGTHS):
        same(run(slice(b, b + 1), length)[0], together[b, :, :length].contiguous(), f"sequence {b}")


@pytest.mark.gpu
@on_gpu_backends("select_tokens")
def test_the_tail_gives_the_same_bits_from_run_to_run_and_alone(backend):
    state = gpu.random(4, 8, K128, device="cuda").abs()
    x = gpu.random(4, K128, 8, device="cuda", dtype=BF16)
    lengths = torch.tensor(LENGTHS, device="cuda", dtype=torch.int32)

    def run(some: slice):
        return spk.select_tokens(
            state[some], x[some], lengths[some], keep_ratio=0.2, pool_kernel_size=13, backend=backend.name
        )

    together = run(slice(None))
    for _ in range(4):
        again = run(slice(None))
        for left, right in zip(
            [again.importance, *again.selection, again.packed.values],
            [together.importance, *together.selection, together.packed.values],
            strict=True,
        ):
            same(left, right)
    starts = together.packed.cu_seqlens.tolist()
    for b in range(len(LENGTHS)):
        alone = run(slice(b, b + 1))
        same(alone.importance[0], together.importance[b])
        same(alone.selection.indices[0], together.selection.indices[b])
        count = int(alone.selection.num_kept[0])
        same(alone.packed.values[:count], together.packed.values[starts[b] : starts[b + 1]])
