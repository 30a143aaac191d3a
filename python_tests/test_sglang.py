"""SGLang's pools are scored where they lie, and what is kept is named in its terms."""

from __future__ import annotations

import pytest
import torch
from grid import on_backends, same
from sglang_pools import CONTEXT, LikeKVPool, fill, new_pools

import specprefill_kernels as spk
from bench import memory
from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.integrations import sglang

PAPER = SpecPrefillConfig.preset("paper", chunk_size=8, keep_ratio=0.3)
E4M3 = torch.float8_e4m3fn


def queries_for(filled, rows=4, group=2, device="cpu"):
    kv_heads, dim = filled.keys[0][0].shape[1:]
    generator = torch.Generator().manual_seed(1)
    shape = (len(filled.lengths), rows, group * kv_heads, dim)
    return [torch.randn(shape, generator=generator).to(device) for _ in filled.keys]


def pool_of(filled, device="cpu", **options):
    """`pool_keys`, with everything on a device."""
    requests, pool = filled.requests, filled.pool
    if device != "cpu":
        requests.req_to_token = requests.req_to_token.to(device)
        pool.k_buffer = [buffer.to(device) for buffer in pool.k_buffer]
    return sglang.pool_keys(requests, pool, filled.rows.to(device), filled.lengths.to(device), **options)


def dense_state(filled, queries, config, behind=0, **options):
    """The same by the reference from dense keys [B, T, Hkv, D]."""
    max_len = int(filled.lengths.max())
    keys = []
    for layer in filled.keys:
        dense = torch.zeros(len(layer), max_len + behind, *layer[0].shape[1:]).to(layer[0].dtype)
        for b, key in enumerate(layer):
            dense[b, : len(key)] = key[: max_len + behind]
        keys.append(dense)
    state = spk.new_state(len(filled.lengths), queries[0].shape[1], max_len)
    return spk.score_layers_(
        state,
        [query.cpu() for query in queries],
        keys,
        layout="bthd",
        seq_lens=filled.lengths,
        queries=config.queries,
        normalize_over=config.normalize_over,
        pool_kernel_size=config.pool_kernel_size,
        pool_edge=config.pool_edge,
        pool_order=config.pool_order,
        **options,
    )


@on_backends("score_layers")
@pytest.mark.parametrize(("layout", "page_size"), [("nhd", 1), ("nhd", 16), ("nhd", 3), ("hnd", 16)])
@pytest.mark.parametrize("kind", ["like", "sglang"])
def test_scores_are_those_of_dense_keys(backend, kind, layout, page_size):
    if kind == "sglang" and backend.device != "cpu":
        pytest.skip("SGLang's classes are tested on CPU tensors")
    filled = fill(kind, page_size=page_size, kv_cache_layout=layout, layers=backend.sized(3, 2, 1))
    queries = queries_for(filled, device=backend.device)
    pool = pool_of(filled, backend.device)
    assert pool.layout == f"paged_{layout}"
    assert pool.block_table.shape == (3, -(-128 // page_size))
    config = PAPER.replace(backend=backend.name)
    state = sglang.score(pool, queries, config=config)
    torch.testing.assert_close(state.cpu(), dense_state(filled, queries, config, backend="reference"))
    if backend.name == "cpu":
        same(state, dense_state(filled, queries, config, backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, E4M3], ids=str)
@pytest.mark.parametrize("kind", ["like", "sglang"])
def test_key_types(kind, dtype):
    filled = fill(kind, dtype=dtype)
    queries = queries_for(filled)
    scales = [0.5, 1.0, 2.0] if dtype == E4M3 else None
    state = sglang.score(pool_of(filled), queries, config=PAPER, key_scale=scales)
    same(state, dense_state(filled, queries, PAPER, key_scale=scales))


@pytest.mark.parametrize("kind", ["like", "sglang"])
def test_a_checkpoints_key_scales_count_in_fp8_alone(kind):
    """SGLang gives layers their scales whatever the pool's dtype is, and divides only what it stores in fp8."""
    scales = [0.5, 1.0, 8.0]
    filled = fill(kind, dtype=torch.bfloat16)
    queries = queries_for(filled)
    state = sglang.score(pool_of(filled), queries, config=PAPER, key_scale=scales)
    same(state, dense_state(filled, queries, PAPER))
    assert not torch.equal(state, dense_state(filled, queries, PAPER, key_scale=scales))
    with pytest.raises(ValueError, match="key_scale"):
        sglang.score(pool_of(filled), queries, config=PAPER, key_scale=scales[:2])


@pytest.mark.parametrize("page_size", [1, 16])
def test_options_reach_the_op(page_size):
    filled = fill(page_size=page_size)
    queries = queries_for(filled)
    config = PAPER.replace(queries="observation_window", pool_order="after_max", pool_kernel_size=5)
    options = {"scale": 0.3, "softcap": 5.0, "window": [None, 9, 40]}
    state = sglang.score(pool_of(filled), queries, config=config, **options)
    same(state, dense_state(filled, queries, config, **options))


@pytest.mark.parametrize("page_size", [1, 16])
def test_keys_behind_the_prompt_are_read_where_the_softmax_counts_them(page_size):
    filled = fill(page_size=page_size, behind=3)
    queries, config = queries_for(filled), PAPER.replace(normalize_over="visible")
    state = sglang.score(pool_of(filled, look_ahead_keys=3), queries, config=config)
    same(state, dense_state(filled, queries, config, behind=3))
    assert not torch.equal(state, dense_state(filled, queries, PAPER))
    with pytest.raises(ValueError, match="pool: expected look_ahead_keys of 3"):
        sglang.score(pool_of(filled), queries, config=config)


@pytest.mark.parametrize("kind", ["like", "sglang"])
@pytest.mark.parametrize(("layout", "page_size"), [("nhd", 1), ("nhd", 16), ("hnd", 16)])
def test_keys_are_the_pools_own_memory(kind, layout, page_size):
    filled = fill(kind, page_size=page_size, kv_cache_layout=layout)
    for layer, key in zip(range(3), pool_of(filled).keys, strict=True):
        buffer = filled.pool.get_key_buffer(layer)
        assert key.data_ptr() == buffer.data_ptr()
        assert key.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert key.shape[1 if layout == "nhd" else 2] == page_size


@pytest.mark.parametrize("page_size", [1, 16])
def test_scoring_allocates_a_fraction_of_the_keys(page_size):
    """Views could still be copied further down: 64 MiB of keys per layer, which nobody may hold twice."""
    tokens, heads, dim = 2**15, 8, 64
    requests, pool = new_pools("like", size=tokens, page_size=page_size, dtype=torch.float32, head_num=heads,
                               head_dim=dim, layer_num=2)  # fmt: skip
    requests.req_to_token = torch.zeros(2, tokens, dtype=torch.int32)
    pages = torch.randperm(tokens // page_size, dtype=torch.int32)
    requests.req_to_token[1] = (pages[:, None] * page_size + torch.arange(page_size, dtype=torch.int32)).reshape(-1)
    for buffer in pool.k_buffer:
        buffer.normal_()
    queries = [torch.randn(1, 2, heads, dim) for _ in range(2)]
    state = spk.new_state(1, 2, tokens)

    def call():
        own = sglang.pool_keys(requests, pool, torch.tensor([1]), torch.tensor([tokens]))
        sglang.score(own, queries, config=PAPER.replace(backend="cpu"), state=state)

    peak = memory.peak_bytes(call, "cpu")
    if peak is None:
        pytest.skip("this system does not tell its peak memory")
    assert peak < tokens * heads * dim * 4 // 4
    assert float(state.max()) > 0


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("page_size", [1, 16])
def test_what_is_kept_in_sglangs_terms(flat, page_size):
    filled = fill(page_size=page_size)
    pool, queries = pool_of(filled), queries_for(filled)
    ids = torch.randint(1, 1000, (3, 128))
    given = torch.cat([ids[b, :length] for b, length in enumerate(filled.lengths)]) if flat else ids
    protect = torch.zeros(3, 128, dtype=torch.bool)
    protect[:, 17] = True
    num_look_ahead = torch.tensor([4, 2, 3])
    state = sglang.score(pool, queries, config=PAPER, num_look_ahead=num_look_ahead)
    options = {"config": PAPER, "num_look_ahead": num_look_ahead, "protect": protect}
    kept = sglang.select(pool, state, input_ids=given, **options)
    importance = spk.finalize_importance(state, filled.lengths, num_look_ahead)
    same(kept.importance, importance)
    expected = spk.select_chunks(importance, filled.lengths, keep_ratio=0.3, chunk_size=8, protect=protect)
    assert kept.positions.dtype == torch.int64
    starts = kept.cu_seqlens.tolist()
    for b, row in enumerate(filled.rows.tolist()):
        positions = expected.indices[b, : int(expected.num_kept[b])].long()
        assert 17 in positions
        part = slice(starts[b], starts[b + 1])
        same(kept.positions[part], positions)
        same(kept.slots[part], filled.requests.req_to_token[row, positions])
        same(kept.input_ids[part], ids[b, positions])
        # what is in these slots are the keys of the kept tokens: a row of them is a request of its own
        if page_size == 1:
            same(filled.pool.get_key_buffer(1)[kept.slots[part].long()], filled.keys[1][b][positions])
    for padded in (kept.positions, kept.slots, kept.input_ids):
        assert len(padded) > starts[-1]
        assert not padded[starts[-1] :].any()
    assert sglang.select(pool, state, **options).input_ids is None


@pytest.mark.parametrize("pool_order", ["before_max", "after_max"])
def test_rows_are_folded_only_where_their_maximum_is_enough(pool_order):
    filled = fill()
    pool, queries, config = pool_of(filled), queries_for(filled), PAPER.replace(reduce="max", pool_order=pool_order)
    state = sglang.score(pool, queries, config=config)
    assert state.shape[1] == (1 if pool_order == "before_max" else 4)
    rows = dense_state(filled, queries, config)
    late = {"pool_kernel_size": 13} if pool_order == "after_max" else {}
    kept = sglang.select(pool, state, config=config, num_look_ahead=torch.tensor([4, 4, 4]))
    same(kept.importance, spk.finalize_importance(rows, filled.lengths, reduce="max", **late))


def test_defaults_are_the_preset():
    filled = fill()
    pool, queries = pool_of(filled), queries_for(filled)
    default = SpecPrefillConfig.preset("default")
    state = sglang.score(pool, queries)
    same(state, sglang.score(pool, queries, config=default))
    same(sglang.select(pool, state).positions, sglang.select(pool, state, config=default).positions)


def test_the_budgets_options_reach_the_selection():
    filled = fill()
    pool, queries = pool_of(filled), queries_for(filled)
    state = sglang.score(pool, queries, config=PAPER)
    importance = spk.finalize_importance(state, filled.lengths)
    for changes in ({"sink": 20}, {"tail": 20}, {"rounding": "floor"}, {"keep_tokens": 50}, {"keep_mass": 0.5}):
        config = PAPER.replace(**changes)
        kept = sglang.select(pool, state, config=config)
        options = {"keep_ratio": 0.3} if "keep_tokens" not in changes and "keep_mass" not in changes else {}
        expected = spk.select_chunks(importance, filled.lengths, chunk_size=8, **options, **changes)
        same(kept.selection.indices, expected.indices)
        assert kept.selection.indices.tolist() != sglang.select(pool, state, config=PAPER).selection.indices.tolist()


def test_layers_of_a_pipeline_stage():
    filled = fill(start_layer=6)
    assert pool_of(filled).layers == (6, 7, 8)
    pool, queries = pool_of(filled, layers=[8, 6]), queries_for(filled)
    state = sglang.score(pool, [queries[2], queries[0]], config=PAPER)
    state = sglang.score(pool_of(filled, layers=(7,)), [queries[1]], config=PAPER, state=state)
    same(state, dense_state(filled, queries, PAPER))
    with pytest.raises(ValueError, match=r"layers: expected layers of this pool, \[6, 7, 8\], got 5"):
        pool_of(filled, layers=[5])
    for layers in ([], [6, 6]):
        with pytest.raises(ValueError, match="layers: expected at least one layer, each once"):
            pool_of(filled, layers=layers)


def test_ranks_of_tensor_parallelism_join_by_their_maximum():
    filled = fill(kv_heads=4)
    queries = queries_for(filled)
    whole = sglang.score(pool_of(filled), queries, config=PAPER)
    ranks = []
    for half in (slice(0, 2), slice(2, 4)):
        part = fill(kv_heads=4)
        part.pool.k_buffer = [buffer[:, half] for buffer in part.pool.k_buffer]
        own = [query[:, :, 2 * half.start : 2 * half.stop] for query in queries]
        ranks.append(sglang.score(pool_of(part), own, config=PAPER))
    same(torch.maximum(*ranks), whole)


def wrapped(pool, **attributes):
    for name, value in attributes.items():
        setattr(pool, name, value)
    return pool


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"kv_lora_rank": 512}, r"holds latent keys \(MLA\)"),
        ({"is_quantized_kv_cache": True}, "scales of their own"),
        ({"k_scale_buffer": [1]}, "scales of their own"),
        ({"requires_physical_write_loc": True}, "counts in virtual slots"),
        ({"kv_cache_layout": "vectorized_5d"}, "in order 'vectorized_5d'"),
        ({"kv_cache_layout": "hnd"}, r"expected \[slots, Hkv, D\]"),
    ],
)
@pytest.mark.parametrize("inner", [False, True])
def test_pools_that_cannot_be_read_in_place(attributes, message, inner):
    filled = fill()
    wrapped(filled.pool, **attributes)
    if inner:
        outer = LikeKVPool(8, 1, torch.float32, 2, 16, 3)
        outer.full_kv_pool = filled.pool
        outer.get_key_buffer = filled.pool.get_key_buffer
        filled.pool = outer
    with pytest.raises(sglang.UnsupportedPool, match=message):
        pool_of(filled)


def test_layers_with_a_pool_of_their_own():
    filled = fill()
    wrapped(filled.pool, layers_mapping={0: (0, False), 1: (0, True), 2: (1, False)})
    assert pool_of(filled).layers == (0, 2)
    with pytest.raises(sglang.UnsupportedPool, match=r"layer 1 has a sliding window .* take from \[0, 2\]"):
        pool_of(filled, layers=[0, 1])
    filled = fill()
    wrapped(filled.pool, full_attention_layer_id_mapping={1: 0, 2: 1})
    assert pool_of(filled).layers == (1, 2)


def test_wrong_arguments_are_named():
    filled = fill(page_size=16)
    requests, kv, rows, lengths = filled.requests, filled.pool, filled.rows, filled.lengths
    with pytest.raises(TypeError, match="req_to_token_pool: expected SGLang's pool with `req_to_token`, got int"):
        sglang.pool_keys(3, kv, rows, lengths)
    with pytest.raises(TypeError, match="token_to_kv_pool: expected SGLang's pool with `page_size`"):
        sglang.pool_keys(requests, requests, rows, lengths)
    with pytest.raises(ValueError, match=r"req_pool_indices\[1\]: expected a row of req_to_token in \[0, 7\), got 7"):
        sglang.pool_keys(requests, kv, torch.tensor([1, 7, 2]), lengths)
    with pytest.raises(ValueError, match=r"seq_lens\[1\]: expected 1 <= length <= 128, got 0"):
        sglang.pool_keys(requests, kv, rows, torch.tensor([70, 0, 128]))
    with pytest.raises(ValueError, match=r"seq_lens\[2\]: expected 1 <= length <= 100, got 128"):
        sglang.pool_keys(requests, kv, rows, lengths, max_len=100)
    with pytest.raises(ValueError, match=f"max_len: expected at most {CONTEXT} tokens"):
        sglang.pool_keys(requests, kv, rows, lengths, max_len=CONTEXT, look_ahead_keys=1)
    with pytest.raises(ValueError, match="req_pool_indices: expected at least one request"):
        sglang.pool_keys(requests, kv, rows[:0], lengths[:0])
    pool, queries = pool_of(filled), queries_for(filled)
    with pytest.raises(ValueError, match=r"queries_per_layer: expected 3 tensors, one for each of pool\.layers, got 2"):
        sglang.score(pool, queries[:2])
    with pytest.raises(ValueError, match=r"config\.queries: expected 'look_ahead' or 'observation_window', got 'both'"):
        sglang.score(pool, queries, config=PAPER.replace(queries="both"))
    with pytest.raises(TypeError, match="config: expected a SpecPrefillConfig, got str"):
        sglang.score(pool, queries, config="paper")
    with pytest.raises(TypeError, match="pool: expected a PoolKeys, got tuple"):
        sglang.select((1,), spk.new_state(1, 1, 1))
    with pytest.raises(ValueError, match=r"state: expected shape \[3, \*, 128\], as pool has, got shape \[3, 4, 127\]"):
        sglang.select(pool, spk.new_state(3, 4, 127))
    with pytest.raises(ValueError, match="input_ids: expected the ids of whole prompts, 231, got 230"):
        sglang.select(pool, spk.new_state(3, 4, 128), input_ids=torch.arange(230))
    # token 17 of the second request lies elsewhere than behind token 16
    requests.req_to_token[rows[1], 17] = 5
    with pytest.raises(ValueError, match=r"slot of token 17 of request 1: expected \d+, as pages of 16 tokens lie"):
        pool_of(filled)
    # or, where keys behind the prompt are read, one of those
    filled = fill(page_size=16, behind=3)
    filled.requests.req_to_token[rows[1], 34] = 5
    pool_of(filled)
    with pytest.raises(ValueError, match="slot of token 34 of request 1"):
        pool_of(filled, look_ahead_keys=3)
    # and a first one in the middle of a page
    filled = fill(page_size=16)
    filled.requests.req_to_token[rows[0], :70] += 1
    with pytest.raises(ValueError, match="slot of token 0 of request 0"):
        pool_of(filled)
