"""score_layer_ against the oracle: shapes, dtypes, layouts, strides."""

from __future__ import annotations

import pytest
import torch
from grid import on_backends, same
from layouts import LAYOUTS, STRIDES, lay_out, place, poison, restride
from properties import given, st
from scoring import BF16, E4M3, E5M2, FP16, FP32, Case, assert_close, check, draw

import specprefill_kernels as spk

pytestmark = on_backends("score_layer")


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_strides(backend, layout, strides):
    check(Case(layout=layout, strides=strides, spare=5, seq_lens=(45, 20, 1)), backend)


@pytest.mark.parametrize("strides", STRIDES)
def test_query_strides(backend, strides):
    check(Case(query_strides=strides, dtypes=(BF16, BF16)), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expanded_heads_are_read_through_a_zero_stride(backend, layout):
    problem = draw(Case(layout=layout, heads=(4, 1), seq_lens=(33, 18)))
    key = problem.arguments(backend.device)["key"]
    head_axis = {"bhtd": 1, "packed": 1, "paged_hnd": 1}.get(layout, 2)
    sizes = list(key.shape)
    sizes[head_axis] = 2
    assert_close(problem.run(backend, key=key.expand(sizes)), problem.expected())


def test_expanded_queries(backend):
    problem = draw(Case(look_ahead=1, seq_lens=(40,)))
    problem.query = problem.query.expand(1, 3, 4, 64)
    problem.state, problem.rows = torch.zeros(1, 3, 40), (3,)
    assert_close(problem.run(backend, query=place(problem.query, backend.device)), problem.expected())


@pytest.mark.parametrize("key_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("query_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 40])
def test_dtype_mixes(backend, query_dtype, key_dtype, head_dim):
    check(Case(dtypes=(query_dtype, key_dtype), head_dim=head_dim, seq_lens=(70, 33)), backend)


@pytest.mark.parametrize("key_scale", [None, 0.5, "per_head", "tensor"])
@pytest.mark.parametrize("query_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("key_dtype", [E4M3, E5M2], ids=str)
def test_fp8_keys(backend, query_dtype, key_dtype, key_scale):
    if key_scale == "tensor":
        problem = draw(Case(dtypes=(query_dtype, key_dtype), key_scale=0.75))
        scale = torch.tensor(0.75, device=backend.device)
        assert_close(problem.run(backend, key_scale=scale), problem.expected())
    else:
        check(Case(dtypes=(query_dtype, key_dtype), key_scale=key_scale, seq_lens=(66, 31)), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP16, BF16, E4M3], ids=str)
def test_narrow_keys_in_every_layout(backend, layout, dtype):
    check(Case(layout=layout, dtypes=(BF16, dtype), key_scale="per_head", heads=(6, 3), spare=3), backend)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 2, 7, 16, 40, 64, 65, 80, 96, 128, 192, 256])
def test_head_dims(backend, head_dim, dtype):
    check(Case(head_dim=head_dim, dtypes=(dtype, dtype), seq_lens=(37, 12)), backend)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, E4M3], ids=str)
@pytest.mark.parametrize("head_dim", [5, 7, 13, 31, 37])
def test_rows_of_keys_and_queries_padded_to_whole_words(backend, head_dim, dtype):
    """What lies between the head dimension and the next row is no number, and nothing of it counts."""
    problem = draw(Case(head_dim=head_dim, dtypes=(BF16, dtype)))
    padded = {}
    for name in ("query", "key"):
        tensor = problem.arguments()[name]
        view = poison(*tensor.shape[:-1], 64, dtype=tensor.dtype)[..., :head_dim]
        padded[name] = place(view.copy_(tensor), backend.device)
    assert_close(problem.run(backend, **padded), problem.expected())


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (3, 3), (6, 2), (8, 2), (8, 1), (9, 3), (14, 2), (16, 16)], ids=str)
def test_head_groups(backend, heads):
    check(Case(heads=heads, seq_lens=(29, 40), head_dim=16), backend)


@pytest.mark.parametrize("look_ahead", range(1, 17))
def test_look_ahead_rows(backend, look_ahead):
    check(Case(look_ahead=look_ahead, head_dim=16, seq_lens=(35, 9)), backend)


@pytest.mark.parametrize("rows", [(1, 2, 3), (8, 1, 5), (8, 8, 8), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("one_row", [False, True], ids=["all_rows", "one_row"])
def test_unequal_look_ahead(backend, rows, one_row):
    check(Case(look_ahead=8, rows=rows, seq_lens=(30, 41, 6), head_dim=16, one_row=one_row), backend)


# Powers of two, and the CPU kernels' tile of 384 with the halo of the pooling window on both sides.
LENGTHS = [1, 2, 3, 5, 6, 7, 12, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1031]
LENGTHS += [378, 383, 384, 385, 389, 390, 391, 767, 768, 769, 775]


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_around_tile_boundaries(backend, length):
    check(Case(seq_lens=(length,), head_dim=16, look_ahead=2, heads=(2, 1)), backend)


@pytest.mark.parametrize("edge", ["zero", "valid"])
@pytest.mark.parametrize("size", [63, 255, 401, 801, 1601])
def test_windows_wider_than_a_tile(backend, size, edge):
    options = {"pool_kernel_size": size, "pool_edge": edge}
    check(Case(seq_lens=(800, 385), head_dim=16, look_ahead=2, heads=(2, 1), options=options), backend)


@pytest.mark.parametrize("layout", ["bhtd", "paged_nhd"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_long_prompt(backend, dtype, layout):
    check(Case(seq_lens=(1500, 1025), dtypes=(dtype, dtype), layout=layout, look_ahead=4, spare=9), backend)


@pytest.mark.parametrize("block_size", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("layout", ["paged_nhd", "paged_hnd"])
def test_block_sizes(backend, layout, block_size):
    check(Case(layout=layout, block_size=block_size, seq_lens=(70, 33, 64), head_dim=16), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_sequence_does_not_own_is_neither_read_nor_written(backend, layout):
    """Poison follows each sequence's keys, and the state keeps what stood beyond each length and each valid row."""
    case = Case(layout=layout, seq_lens=(19, 50, 1), rows=(2, 4, 1), look_ahead=4, spare=7, wider_state=6)
    check(case, backend)
    problem = draw(case)
    fill = problem.state == problem.state.min()
    problem.state[fill] = float("nan")
    assert torch.equal(problem.run(backend).isnan(), fill)


@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("layout", ["packed", "paged_nhd"])
def test_index_dtypes(backend, layout, table_dtype):
    problem = draw(Case(layout=layout, spare=2, seq_lens=(19, 33)))
    cache = lay_out(problem.keys, layout, spare=2, table_dtype=table_dtype)
    placed = {name: tensor.to(backend.device) for name, tensor in cache.arguments.items()}
    seq_lens = torch.tensor([19, 33], dtype=table_dtype, device=backend.device)
    actual = problem.run(backend, key=cache.buffer.to(backend.device), seq_lens=seq_lens, **placed)
    same(actual, problem.run(backend))


@pytest.mark.parametrize("layout", ["bhtd", "bthd", "packed"])
def test_seq_lens_may_be_left_out(backend, layout):
    """Dense: the width of the state; packed: the differences of cu_seqlens."""
    problem = draw(Case(layout=layout, seq_lens=(21, 21) if layout != "packed" else (5, 7, 3)))
    assert_close(problem.run(backend, seq_lens=None), problem.expected())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_with_gaps_between_rows(backend, layout):
    """A slice of a larger state; the memory around it keeps what it held."""
    problem = draw(Case(layout=layout, seq_lens=(45, 20), rows=(3, 2)))
    state = place(restride(problem.state, "gaps"), backend.device)
    arguments = problem.arguments(backend.device)
    spk.score_layer_(state, arguments.pop("query"), arguments.pop("key"), backend=backend.name, **arguments)
    same(state.cpu().contiguous(), problem.run(backend))
    around = torch.as_strided(state, (4, 5, 47), (5 * 47, 47, 1), 0).cpu().clone()
    around[1:3, 1:4, 1:46] = float("nan")
    assert around.isnan().all()


@given(data=st.data())
def test_random_problems(backend, data):
    batch = data.draw(st.integers(1, 3), "batch")
    look_ahead = data.draw(st.integers(1, 9), "look_ahead")
    seq_lens = tuple(data.draw(st.lists(st.integers(1, 150), min_size=batch, max_size=batch), "seq_lens"))
    rows = st.integers(1, min(look_ahead, min(seq_lens)))
    kv_heads = data.draw(st.integers(1, 4), "kv_heads")
    queries = data.draw(st.sampled_from(["look_ahead", "observation_window"]), "queries")
    options = {
        "queries": queries,
        "normalize_over": data.draw(st.sampled_from(["prompt", "visible"]), "normalize_over"),
        "scale": data.draw(st.sampled_from([None, 0.05, 0.3]), "scale"),
        "softcap": data.draw(st.sampled_from([None, 2.0, 30.0]), "softcap"),
        "window": data.draw(st.sampled_from([None, 1, 4, 37]), "window"),
        "pool_kernel_size": data.draw(st.sampled_from([1, 3, 13, 31, 101]), "pool_kernel_size"),
        "pool_edge": data.draw(st.sampled_from(["zero", "valid"]), "pool_edge"),
        "pool_order": data.draw(st.sampled_from(["before_max", "after_max"]), "pool_order"),
    }
    case = Case(
        seq_lens=seq_lens,
        rows=tuple(data.draw(st.lists(rows, min_size=batch, max_size=batch), "rows")),
        look_ahead=look_ahead,
        heads=(kv_heads * data.draw(st.integers(1, 4), "group"), kv_heads),
        head_dim=data.draw(st.integers(1, 70), "head_dim"),
        dtypes=(
            data.draw(st.sampled_from([FP32, FP16, BF16]), "query dtype"),
            data.draw(st.sampled_from([FP32, FP16, BF16]), "key dtype"),
        ),
        layout=data.draw(st.sampled_from(LAYOUTS), "layout"),
        strides=data.draw(st.sampled_from(STRIDES), "strides"),
        query_strides=data.draw(st.sampled_from(STRIDES), "query strides"),
        spare=data.draw(st.integers(0, 9), "spare"),
        block_size=data.draw(st.sampled_from([1, 4, 16, 33]), "block_size"),
        wider_state=data.draw(st.integers(0, 5), "wider_state"),
        one_row=data.draw(st.booleans(), "one_row"),
        key_scale=data.draw(st.sampled_from([None, 0.5, "per_head"]), "key_scale"),
        lse=data.draw(st.booleans(), "lse"),
        options=options,
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    check(case, backend)


@pytest.mark.parametrize("layout", ["paged_nhd", "paged_hnd"])
def test_a_block_table_may_be_a_slice_of_a_wider_one(backend, layout):
    problem = draw(Case(layout=layout, seq_lens=(45, 20)))
    table = problem.arguments(backend.device)["block_table"]
    wider = torch.full((len(table), table.shape[1] + 5), -1, dtype=table.dtype, device=table.device)
    wider[:, : table.shape[1]] = table
    assert_close(problem.run(backend, block_table=wider[:, : table.shape[1]]), problem.expected())


def test_a_key_scale_with_steps(backend):
    problem = draw(Case(heads=(6, 3), key_scale="per_head"))
    assert_close(
        problem.run(backend, key_scale=place(restride(problem.key_scale, "stepped"), backend.device)),
        problem.expected(),
    )


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_of_e4m3_is_seen(backend, code):
    problem = draw(Case(dtypes=(BF16, E4M3)))
    key = problem.arguments(backend.device)["key"]
    key.view(torch.uint8)[0, 1, 3, 5] = code
    if backend.checks_values:
        with pytest.raises(ValueError, match=r"^query or key of sequence 0: expected .*, got "):
            problem.run(backend, key=key)
    else:
        assert problem.run(backend, key=key)[0].isnan().any()


def test_nan_in_a_look_ahead_key_is_seen(backend):
    problem = draw(Case(look_ahead=3, options={"normalize_over": "visible"}))
    problem.keys[1][-1] = float("nan")
    if backend.checks_values:
        with pytest.raises(ValueError, match=r"^query or key of sequence 1: expected .*, got "):
            problem.run(backend)
    else:
        assert problem.run(backend)[1].isnan().any()
