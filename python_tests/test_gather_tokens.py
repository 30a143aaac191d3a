"""gather_tokens: kept ids, embeddings, M-RoPE positions and slot mappings, packed sequence behind sequence."""

from __future__ import annotations

import pytest
import torch
from grid import on_backends, same
from layouts import STRIDES, place, poison, restride
from properties import given, st
from selecting import random_rows, selection_of

import specprefill_kernels as spk

pytestmark = on_backends("gather_tokens")

DTYPES = [
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def values_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits of a type, so that nothing but a copy gives them back."""
    random = torch.Generator().manual_seed(len(shape))
    if dtype == torch.bool:
        return torch.rand(shape, generator=random) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=random).to(dtype)
    low, high = (0, 255) if dtype == torch.uint8 else (-30000, 30000)
    return torch.randint(low, high, shape, generator=random).to(dtype)


def expected_rows(x: torch.Tensor, rows, token_dim: int, starts=None) -> torch.Tensor:
    """The kept tokens one by one, in a tensor whose axis ``token_dim - 1`` they share."""
    axis = token_dim - 1
    parts = []
    for b, row in enumerate(rows):
        sequence = x.select(axis, b) if starts is None else x.narrow(axis, starts[b], starts[b + 1] - starts[b])
        parts += [sequence.select(axis, t).unsqueeze(axis) for t in row]
    return torch.cat(parts, dim=axis)


def check(backend, x, rows, *, token_dim=1, starts=None, width=None, room=0) -> spk.Packed:
    """Values, positions and offsets against copying token by token; zeros behind."""
    selection = selection_of(rows, width, backend.device, room)
    cu_seqlens = None if starts is None else torch.tensor(starts, dtype=torch.int32, device=backend.device)
    given = place(x, backend.device)
    packed = spk.gather_tokens(given, selection, token_dim=token_dim, cu_seqlens=cu_seqlens, backend=backend.name)
    count, room = sum(map(len, rows)), selection.indices.numel()
    axis = token_dim - 1
    assert packed.values.shape[axis] == room
    assert packed.position_ids.dtype == torch.int64
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_len == selection.indices.shape[1]
    same(packed.values.narrow(axis, 0, count).contiguous(), expected_rows(x, rows, token_dim, starts), "values")
    behind = packed.values.narrow(axis, count, room - count)
    same(behind.contiguous(), torch.zeros_like(behind).contiguous(), "padding")
    positions = [t for row in rows for t in row] + [0] * (room - count)
    assert packed.position_ids.tolist() == positions
    assert packed.cu_seqlens.tolist() == [sum(map(len, rows[:b])) for b in range(len(rows) + 1)]
    return packed


ROWS = [[0, 1, 5, 39], [7], [10, 11, 12, 13, 14, 15]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_ids_of_every_dtype(backend, dtype, strides):
    check(backend, restride(values_of(dtype, 3, 40), strides), ROWS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("hidden", [1, 7, 64])
def test_embeddings(backend, dtype, strides, hidden):
    check(backend, restride(values_of(dtype, 3, 40, hidden), strides), ROWS, width=9)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_mrope_positions(backend, dtype, strides):
    """[3, B, T], the tokens on axis 2."""
    check(backend, restride(values_of(dtype, 3, 3, 40), strides), ROWS, token_dim=2, width=8)


@pytest.mark.parametrize("strides", STRIDES)
def test_tokens_between_other_axes(backend, strides):
    x = restride(values_of(torch.float32, 2, 3, 3, 40, 4, 5), strides)
    check(backend, x, ROWS, token_dim=3, width=8)


def test_slot_mappings(backend):
    """int64 slots with -1 where a token has none: values, not indices."""
    slots = torch.arange(120).view(3, 40) * 3_000_000_000
    slots[:, 5] = -1
    check(backend, slots, ROWS)


def test_expanded_values(backend):
    """Stride 0 along the batch, along the tokens, and along what follows them."""
    check(backend, values_of(torch.int64, 1, 40).expand(3, 40), ROWS)
    check(backend, values_of(torch.float32, 3, 1, 4).expand(3, 40, 4), ROWS)
    check(backend, values_of(torch.bfloat16, 3, 40, 1).expand(3, 40, 6), ROWS)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16], ids=str)
def test_packed_sequences(backend, dtype):
    """Lengths 5, 7, 3: position 4 of the second sequence is row 9, not row 4."""
    starts, rows = [0, 5, 12, 15], [[0, 4], [4, 6], [2]]
    check(backend, values_of(dtype, 15), rows, starts=starts)
    check(backend, values_of(dtype, 15, 6), rows, starts=starts, width=4)
    check(backend, values_of(dtype, 3, 15), rows, token_dim=2, starts=starts)


def test_packed_sequences_in_the_middle_of_a_buffer(backend):
    x = values_of(torch.int64, 30)
    check(backend, x, [[0, 4], [4, 6], [2]], starts=[4, 9, 16, 19])


def test_nothing_but_kept_tokens_is_read(backend):
    """NaN payloads around kept tokens stay where they are."""
    x = poison(3, 40, 8, dtype=torch.float32)
    for b, row in enumerate(ROWS):
        x[b, row] = 1.5
    assert not check(backend, x, ROWS, width=12).values.isnan().any()


def test_all_and_one(backend):
    x = values_of(torch.float16, 2, 17, 3)
    packed = check(backend, x, [range(17), range(17)])
    same(packed.values.cpu(), x.flatten(0, 1), "keeping everything is a copy")
    check(backend, x, [[16], [0]])


@pytest.mark.parametrize("token_dim", [1, 2])
def test_trim_drops_the_padding(backend, token_dim):
    x = values_of(torch.int64, *(3, 40) if token_dim == 1 else (3, 3, 40))
    packed = check(backend, x, ROWS, token_dim=token_dim, width=20)
    short = packed.trim()
    count = sum(map(len, ROWS))
    assert short.values.shape[token_dim - 1] == short.position_ids.shape[0] == count
    assert short.max_len == max(map(len, ROWS))
    same(short.values, packed.values.narrow(token_dim - 1, 0, count))
    same(short.position_ids, packed.position_ids[:count])
    same(short.cu_seqlens, packed.cu_seqlens)


def test_what_select_chunks_keeps(backend):
    """The two ops together: unequal lengths, a short last chunk, padding."""
    importance = torch.rand(3, 100, generator=torch.Generator().manual_seed(5)).to(backend.device)
    seq_lens = torch.tensor([100, 65, 3], device=backend.device)
    selection = spk.select_chunks(importance, seq_lens, keep_ratio=0.5, chunk_size=16)
    rows = [selection.indices[b, : int(selection.num_kept[b])].tolist() for b in range(3)]
    check(backend, values_of(torch.int64, 3, 100), rows, width=selection.indices.shape[1])


@given(data=st.data())
def test_random_gathers(backend, data):
    seq_lens = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=5), "seq_lens")
    rows = random_rows(seq_lens, data.draw(st.integers(0, 99), "seed"))
    before = data.draw(st.lists(st.integers(1, 3), max_size=2), "before")
    after = data.draw(st.lists(st.integers(1, 9), max_size=2), "after")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    starts = None
    if data.draw(st.booleans(), "packed"):
        starts = [sum(seq_lens[:b]) for b in range(len(seq_lens) + 1)]
        shape = [*before, sum(seq_lens), *after]
    else:
        shape = [*before, len(seq_lens), max(seq_lens), *after]
    x = restride(values_of(dtype, *shape), data.draw(st.sampled_from(STRIDES), "strides"))
    width = max(map(len, rows)) + data.draw(st.integers(0, 5), "wider")
    check(backend, x, rows, token_dim=len(before) + 1, starts=starts, width=width)


def test_a_large_batch(backend):
    check(backend, values_of(torch.int64, 300, 9), random_rows([9] * 300))


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize(("shape", "token_dim"), [((2, 3, 2, 3, 40), 4), ((3, 40, 2, 3, 2), 1)], ids=str)
def test_three_axes_on_a_side(backend, shape, token_dim, strides):
    rows = [[0, 1, 5, 39], [7], [10, 11, 12]]
    check(backend, restride(values_of(torch.float32, *shape), strides), rows, token_dim=token_dim, width=8)


def test_rows_wider_and_longer_than_a_tile(backend):
    check(backend, values_of(torch.float64, 2, 20, 3000), [[0, 3, 19], [4]])
    check(backend, values_of(torch.int64, 2, 20_000), random_rows((20_000, 19_000)))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_values(backend, dtype):
    x = torch.randn(2, 9, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(backend.device).conj()
    packed = spk.gather_tokens(x, selection_of([[0, 8], [3]], device=backend.device), backend=backend.name)
    assert torch.equal(packed.values[:3].cpu(), torch.stack([x[0, 0], x[0, 8], x[1, 3]]).cpu())


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["slices", "sequences", "tokens"])
def test_the_widest_word_divides_every_stride(backend, axis):
    """All but one of them are multiples of 16 bytes, as the row and its address are."""
    strides = [4096, 1024, 16, 1]
    strides[axis] += 1
    check(backend, values_of(torch.int32, 16384).as_strided((2, 3, 40, 4), strides), ROWS, token_dim=2)


@pytest.mark.parametrize("shape", [(3, 40), (3, 40, 6)], ids=str)
def test_a_selection_may_be_the_first_columns_of_a_wider_one(backend, shape):
    check(backend, values_of(torch.int32, *shape), ROWS, room=20)


@pytest.mark.parametrize(("shape", "token_dim"), [((0, 3, 40), 2), ((3, 40, 0), 1), ((3, 40, 3, 0), 1)], ids=str)
def test_no_values_have_positions_all_the_same(backend, shape, token_dim):
    check(backend, torch.zeros(shape), ROWS, token_dim=token_dim)
