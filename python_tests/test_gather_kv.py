"""gather_kv: every kept token's key and value, in every layout, into new caches and into given ones."""

from __future__ import annotations

import pytest
import torch
from grid import on_backends, same
from layouts import LAYOUTS, STRIDES, Cache, lay_out, place, read_token, restride
from selecting import random_rows, selection_of

import specprefill_kernels as spk

pytestmark = on_backends("gather_kv")

SEQ_LENS = (45, 20, 1)
ROWS = random_rows(SEQ_LENS, seed=4)
PAGED = ("paged_nhd", "paged_hnd")


def sequences(heads=2, dim=16, dtype=torch.float32, seed=0, seq_lens=SEQ_LENS) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(length, heads, dim, generator=random).to(dtype) for length in seq_lens]


def caches(layout, keys, values, **how) -> tuple[Cache, Cache]:
    """Key and value cache; both lie under one table."""
    return lay_out(keys, layout, **how), lay_out(values, layout, **how)


def run(backend, layout, key, value, selection, **more):
    tables = {name: place(tensor, backend.device) for name, tensor in key.arguments.items()}
    buffers = (place(cache.buffer, backend.device) for cache in (key, value))
    return spk.gather_kv(*buffers, selection, layout=layout, backend=backend.name, **tables, **more)


def check_output(out, layout, sequence_tokens, rows, *, table=None) -> None:
    """Token i of sequence b is its i-th kept one, wherever the layout puts it."""
    starts = [sum(map(len, rows[:b])) for b in range(len(rows))]
    if table is None and layout in PAGED:
        table = torch.arange(out.shape[0]).view(len(rows), -1)
    for b, row in enumerate(rows):
        for i, token in enumerate(row):
            actual = read_token(out.cpu(), layout, b, i, starts=starts, table=table)
            same(actual.contiguous(), sequence_tokens[b][token], f"sequence {b}, kept token {i}")


def zero_elsewhere(out: torch.Tensor, layout: str, rows) -> None:
    """As many non-zero tokens as are kept: random keys have no zeros."""
    tokens = out.movedim({"bhtd": 1, "packed": 1, "paged_hnd": 1}.get(layout, 2), -2)
    filled = (tokens.float() != 0).flatten(-2).all(-1)
    empty = (tokens.float() == 0).flatten(-2).all(-1)
    assert int(filled.sum()) == sum(map(len, rows))
    assert bool((filled | empty).all())


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_strides(backend, layout, strides):
    keys, values = sequences(seed=1), sequences(seed=2)
    key, value = caches(layout, keys, values, strides=strides, spare=5, block_size=8)
    out = run(backend, layout, key, value, selection_of(ROWS, 30, backend.device))
    for buffer, tokens in zip(out, (keys, values), strict=True):
        check_output(buffer, layout, tokens, ROWS)
        zero_elsewhere(buffer, layout, ROWS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8],
    ids=str,
)
def test_dtypes(backend, layout, dtype):
    make = (lambda seed: [t.abs().add(1).to(dtype) for t in sequences(seed=seed)]) if dtype == torch.uint8 else None
    keys, values = (make(seed) if make else sequences(seed=seed, dtype=dtype) for seed in (1, 2))
    key, value = caches(layout, keys, values)
    out = run(backend, layout, key, value, selection_of(ROWS, device=backend.device))
    for buffer, tokens in zip(out, (keys, values), strict=True):
        assert buffer.dtype == dtype
        check_output(buffer, layout, tokens, ROWS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_and_values_may_differ_in_dim_and_dtype(backend, layout):
    keys, values = sequences(dim=24), sequences(dim=7, dtype=torch.bfloat16)
    key, value = caches(layout, keys, values)
    out = run(backend, layout, key, value, selection_of(ROWS, device=backend.device))
    for buffer, tokens in zip(out, (keys, values), strict=True):
        check_output(buffer, layout, tokens, ROWS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_of_new_caches(backend, layout):
    """K slots a sequence; paged: ceil(K / block_size) blocks of its own."""
    key, value = caches(layout, sequences(), sequences(), block_size=8)
    width = 29
    out, _ = run(backend, layout, key, value, selection_of(ROWS, width, backend.device))
    wanted = {
        "bhtd": (3, 2, width, 16),
        "bthd": (3, width, 2, 16),
        "packed": (3 * width, 2, 16),
        "paged_nhd": (3 * 4, 8, 2, 16),
        "paged_hnd": (3 * 4, 2, 8, 16),
    }
    assert tuple(out.shape) == wanted[layout]


def given_out(layout, width, dtype=torch.float32, block_size=8, seed=0):
    """Caches full of 55 and, where paged, a shuffled table into a pool with blocks to spare."""
    if layout not in PAGED:
        shape = {"bhtd": (3, 2, width, 16), "bthd": (3, width, 2, 16), "packed": (3 * width, 2, 16)}[layout]
        return torch.full(shape, 55.0, dtype=dtype), None
    per_sequence = -(-width // block_size)
    shape = (3 * per_sequence + 4, block_size, 2, 16)
    out = torch.full(shape if layout == "paged_nhd" else (shape[0], 2, block_size, 16), 55.0, dtype=dtype)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    return out, order[: 3 * per_sequence].view(3, per_sequence).to(torch.int32)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_is_written_in_place_and_only_where_tokens_go(backend, layout, strides):
    keys, values = sequences(seed=1), sequences(seed=2)
    key, value = caches(layout, keys, values)
    first, table = given_out(layout, 30)
    out = tuple(place(restride(buffer, strides), backend.device) for buffer in (first, first.clone()))
    more = {} if table is None else {"out_block_table": table.to(backend.device)}
    returned = run(backend, layout, key, value, selection_of(ROWS, 30, backend.device), out=out, **more)
    for buffer, given, tokens in zip(returned, out, (keys, values), strict=True):
        assert buffer.data_ptr() == given.data_ptr()
        check_output(given, layout, tokens, ROWS, table=table)
        changed = int((given != 55).sum())
        assert changed == sum(map(len, ROWS)) * 2 * 16


@pytest.mark.parametrize("layout", PAGED)
def test_out_may_have_another_block_size(backend, layout):
    keys, values = sequences(seed=1), sequences(seed=2)
    key, value = caches(layout, keys, values, block_size=16)
    first, table = given_out(layout, 30, block_size=5)
    out = tuple(buffer.to(backend.device) for buffer in (first, first.clone()))
    selection = selection_of(ROWS, 30, backend.device)
    run(backend, layout, key, value, selection, out=out, out_block_table=table.to(backend.device))
    check_output(out[0], layout, keys, ROWS, table=table)
    check_output(out[1], layout, values, ROWS, table=table)


@pytest.mark.parametrize("layout", PAGED)
def test_sequences_may_share_blocks(backend, layout):
    """A common prefix lies in one block; both sequences read it."""
    prefix, tails = sequences(seq_lens=(8,))[0], sequences(seq_lens=(8, 8), seed=3)
    cache = lay_out([prefix, *tails], layout, block_size=8)
    table = cache.arguments["block_table"]
    cache.arguments["block_table"] = torch.stack([table[[0, 1], 0], table[[0, 2], 0]])
    rows = [[0, 3, 7, 8, 15], [1, 7, 9]]
    out, _ = run(backend, layout, cache, cache, selection_of(rows, device=backend.device))
    check_output(out, layout, [torch.cat([prefix, tail]) for tail in tails], rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeping_everything_is_a_copy(backend, layout):
    keys = sequences(seq_lens=(12, 12))
    key, value = caches(layout, keys, keys, block_size=4)
    rows = [range(12), range(12)]
    out, _ = run(backend, layout, key, value, selection_of(rows, device=backend.device))
    check_output(out, layout, keys, rows)


@pytest.mark.parametrize("layout", PAGED)
def test_block_tables_may_be_slices_of_wider_ones(backend, layout):
    tokens = sequences()
    selection = selection_of(ROWS, device=backend.device)
    key, value = caches(layout, tokens, sequences(seed=1))
    expected = run(backend, layout, key, value, selection)
    table = key.arguments["block_table"]
    wider = torch.full((len(table), table.shape[1] + 5), -1, dtype=torch.int32, device=backend.device)
    wider[:, : table.shape[1]] = table.to(wider)
    narrow = wider[:, : table.shape[1]]
    key.arguments["block_table"] = narrow
    out = tuple(torch.zeros_like(cache) for cache in expected)
    blocks = torch.arange(len(out[0]), dtype=torch.int32, device=backend.device).view(len(table), -1)
    out_table = torch.cat([blocks, blocks], 1)[:, : blocks.shape[1]]
    buffers = (place(cache.buffer, backend.device) for cache in (key, value))
    how = {"layout": layout, "block_table": narrow, "out": out, "out_block_table": out_table, "backend": backend.name}
    for actual, wanted in zip(spk.gather_kv(*buffers, selection, **how), expected, strict=True):
        same(actual, wanted)


@pytest.mark.parametrize("layout", ["bhtd", "bthd", "packed", "paged_nhd", "paged_hnd"])
@pytest.mark.parametrize("lengths", [(1500, 700), (5,) * 140], ids=["long", "many"])
def test_more_than_one_tile(backend, layout, lengths):
    tokens = sequences(seq_lens=lengths)
    rows = random_rows(lengths)
    key, value = caches(layout, tokens, tokens)
    out, _ = run(backend, layout, key, value, selection_of(rows, device=backend.device))
    check_output(out, layout, tokens, rows)


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_wide_heads(backend, layout):
    tokens = sequences(seq_lens=(7, 5), dim=3000)
    key, value = caches(layout, tokens, tokens)
    rows = [[0, 6], [2]]
    out, _ = run(backend, layout, key, value, selection_of(rows, device=backend.device))
    check_output(out, layout, tokens, rows)


def test_a_selection_may_be_the_first_columns_of_a_wider_one(backend):
    keys, values = sequences(seed=1), sequences(seed=2)
    key, value = caches("bhtd", keys, values)
    out = run(backend, "bhtd", key, value, selection_of(ROWS, device=backend.device, room=20))
    for buffer, tokens in zip(out, (keys, values), strict=True):
        check_output(buffer, "bhtd", tokens, ROWS)
