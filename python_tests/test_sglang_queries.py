"""The query rows of SGLang's attention layers, and its section of docs/integrations.md as it stands."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pages
import pytest
import torch
from grid import same
from sglang_pools import fill

import specprefill_kernels as spk
from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.integrations import sglang
from specprefill_kernels.integrations.sglang import QueryRecorder

PAGE, HEADING = "docs/integrations.md", "## SGLang"
HEADS, KV_HEADS, DIM = 4, 2, 16
Mode = Enum("Mode", ["EXTEND", "DECODE", "MIXED"])


class LikeRadixAttention(torch.nn.Module):
    """What the recorder reads of SGLang 0.5.23's."""

    def __init__(self, layer_id: int, **changes: object) -> None:
        super().__init__()
        self.layer_id, self.tp_q_head_num, self.qk_head_dim = layer_id, HEADS, DIM
        self.scaling, self.logit_cap, self.logit_capping_method = DIM**-0.5, 0.0, "tanh"
        self.sliding_window_size, self.k_scale_float, self.is_cross_attention = -1, None, False
        self.xai_temperature_len = -1
        for name, value in changes.items():
            setattr(self, name, value)

    def forward(self, q, k, v, forward_batch, **kwargs):
        return q


def real_layer(layer_id: int) -> torch.nn.Module:
    """SGLang's own, with a backend that does nothing; or a skip."""
    try:
        from sglang.srt.layers import radix_attention
    except Exception as error:  # its imports fail in many ways where parts of it are missing
        pytest.skip(f"sglang's attention cannot be imported: {type(error).__name__}: {error}")
    radix_attention.get_attn_backend = lambda: SimpleNamespace(forward=lambda q, *rest, **more: q)
    radix_attention.padded_extend_real_tokens = lambda q, batch: None
    radix_attention.is_in_breakable_cuda_graph = radix_attention.is_in_full_prefill_graph = lambda: False
    radix_attention.is_in_prefill_graph_scope = lambda: False
    return radix_attention.RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, layer_id)


class Model(torch.nn.Module):
    """Layers that are handed queries made beforehand."""

    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def run(self, queries: list[torch.Tensor], batch: SimpleNamespace) -> None:
        for layer, query in zip(self.layers, queries, strict=True):
            own = query.clone()
            layer(own.flatten(1), None, None, batch)
            own.fill_(float("nan"))  # the next layer's memory


def forward_batch(mode: str, count: int, lengths: list[int] | None = None, *, on_cpu: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        forward_mode=Mode[mode],
        batch_size=count,
        extend_seq_lens=None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        extend_seq_lens_cpu=lengths if on_cpu else None,
        seq_lens=torch.tensor(lengths or [9] * count),
    )


def rows(count: int, seed: int, layers: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, HEADS, DIM, generator=generator) for _ in range(layers)]


@pytest.mark.parametrize("layer", [LikeRadixAttention, real_layer])
def test_look_ahead_rows(layer):
    """The last row of each prompt, then one for each step; padding behind the tokens is left out."""
    model = Model(layer(3), layer(4))
    prefill, steps = rows(5 + 7 + 3 + 1, 0), [rows(4, 1), rows(4, 2)]
    with QueryRecorder(model) as recorder:
        model.run(prefill, forward_batch("EXTEND", 3, [5, 7, 3]))
        for step in steps:
            model.run(step, forward_batch("DECODE", 3))
    model.run(steps[0], forward_batch("DECODE", 3))  # behind the end
    assert recorder.layers == (3, 4)
    for index, query in enumerate(recorder.queries):
        expected = torch.stack([prefill[index][[4, 11, 14]], *(step[index][:3] for step in steps)], 1)
        same(query, expected)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_last_rows_of_each_prompt(on_cpu):
    model, prefill = Model(LikeRadixAttention(0), LikeRadixAttention(1)), rows(15, 0)
    with QueryRecorder(model, rows=3, layers=[1]) as recorder:
        model.run(rows(6, 1), forward_batch("EXTEND", 2, [3, 3], on_cpu=on_cpu))  # a chunk before the last one
        model.run(prefill, forward_batch("EXTEND", 3, [5, 7, 3], on_cpu=on_cpu))
    (query,) = recorder.queries
    same(query, prefill[1][torch.tensor([[2, 3, 4], [9, 10, 11], [12, 13, 14]])])


def test_what_cannot_be_kept_is_said():
    model = Model(LikeRadixAttention(0), LikeRadixAttention(1))
    with QueryRecorder(model, rows=4) as recorder:
        with pytest.raises(ValueError, match=r"queries: expected a prefill inside `with`, got none in layers \[0, 1\]"):
            _ = recorder.queries
        with pytest.raises(ValueError, match="rows: expected at most 3, the new tokens of the shortest prompt, got 4"):
            model.run(rows(8, 0), forward_batch("EXTEND", 2, [5, 3]))
        with pytest.raises(ValueError, match="forward: expected a prefill of these 2 requests first, got none"):
            model.run(rows(2, 0), forward_batch("DECODE", 2))
        model.run(rows(8, 0), forward_batch("EXTEND", 2, [4, 4]))
        with pytest.raises(ValueError, match="requests first, got one of 2 requests"):
            model.run(rows(3, 0), forward_batch("DECODE", 3))
        with pytest.raises(ValueError, match="forward_mode: expected EXTEND or DECODE, got MIXED"):
            model.run(rows(3, 0), forward_batch("MIXED", 3))
        with pytest.raises(ValueError, match="got latent attention"):
            model.layers[0](rows(8, 0)[0], None, None, forward_batch("EXTEND", 2, [4, 4]), k_rope=1)
        with pytest.raises(ValueError, match="softmax over keys alone, got attention sinks in layer 0"):
            model.layers[0](rows(8, 0)[0], None, None, forward_batch("EXTEND", 2, [4, 4]), sinks=torch.zeros(HEADS))
        model.layers[0](rows(8, 0)[0].flatten(1), None, None, forward_batch("EXTEND", 2, [4, 4]), sinks=None)
    with pytest.raises(ValueError, match=r"layers: expected layer ids of this model's RadixAttention, \[0, 1\], got"):
        QueryRecorder(model, layers=[1, 2])
    shared = Model(LikeRadixAttention(0), LikeRadixAttention(1), LikeRadixAttention(1))
    with pytest.raises(
        ValueError, match="layer 1: expected one RadixAttention of this id, got 2, which share its keys"
    ):
        QueryRecorder(shared)
    assert QueryRecorder(shared, layers=[0]).layers == (0,)
    with pytest.raises(ValueError, match=r"RadixAttention, \[\], got \[\]"):
        QueryRecorder(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        QueryRecorder(3)
    for changes, message in (
        ({"is_cross_attention": True}, "layer 0: expected self-attention"),
        ({"logit_cap": 5.0, "logit_capping_method": "sigmoid"}, "a soft cap by tanh, got sigmoid"),
        ({"xai_temperature_len": 1024}, "one scale for all positions"),
    ):
        with pytest.raises(ValueError, match=message):
            QueryRecorder(Model(LikeRadixAttention(0, **changes)))


@pytest.mark.parametrize("queries", ["observation_window", "look_ahead"])
def test_rows_of_an_earlier_chunk_are_not_scored(queries):
    """The prompts' last chunk was replayed by a CUDA graph: no hook ran, and what is there are the rows before it."""
    filled = fill(lengths=(30, 20), layers=2)
    model, config = Model(LikeRadixAttention(0), LikeRadixAttention(1)), SpecPrefillConfig(queries=queries)
    pool = sglang.pool_keys(filled.requests, filled.pool, filled.rows, filled.lengths)
    with QueryRecorder(model, rows=4) as recorder:
        model.run(rows(26, 0), forward_batch("EXTEND", 2, [16, 10]))
        wanted = r"rows of these prompts' ends, \[30, 20\] tokens, got \[\[16, 10\], \[16, 10\]\]; the last prefill was"
        with pytest.raises(ValueError, match=f"recorded_lens: expected {wanted} perhaps replayed"):
            sglang.score(pool, recorder.queries, config=config, **recorder.options)
        last = forward_batch("EXTEND", 2, [14, 10])
        last.seq_lens = torch.tensor([30, 20])
        model.run(rows(24, 0), last)
        last.seq_lens += 1  # as decoding counts
        sglang.score(pool, recorder.queries, config=config, **recorder.options)
        with pytest.raises(ValueError, match=r"recorded_lens: .* got \[\[30\]\]"):
            sglang.score(pool, recorder.queries, config=config, recorded_lens=torch.tensor([[30]]))


def test_hooks_are_gone_after_an_error():
    model = Model(LikeRadixAttention(0))
    with pytest.raises(RuntimeError), QueryRecorder(model):
        raise RuntimeError
    assert not model.layers[0]._forward_pre_hooks


def test_options_of_the_layers():
    plain = QueryRecorder(Model(LikeRadixAttention(0), LikeRadixAttention(1))).options
    assert plain == {
        "scale": DIM**-0.5,
        "softcap": None,
        "window": [None, None],
        "key_scale": None,
        "recorded_lens": None,
    }
    more = Model(
        LikeRadixAttention(0, logit_cap=30.0, sliding_window_size=511),
        LikeRadixAttention(1, logit_cap=30.0, k_scale_float=0.5),
    )
    options = QueryRecorder(more).options
    assert options == {"scale": DIM**-0.5, "softcap": 30.0, "window": [512, None], "key_scale": [1.0, 0.5],
                       "recorded_lens": None}  # fmt: skip
    with pytest.raises(ValueError, match="layers: expected layers of one scaling"):
        _ = QueryRecorder(Model(LikeRadixAttention(0), LikeRadixAttention(1, scaling=1.0))).options


@pytest.mark.parametrize("kind", ["like", "sglang"])
def test_the_block_of_the_page(kind, capsys):
    """As it stands; `runner` and `batch` are what SGLang would hand over: pools with prompts, a model that is run."""
    assert pages.languages(PAGE, HEADING) == ["python"]
    (block,) = pages.blocks(PAGE, heading=HEADING, language="python")
    assert len([line for line in block.splitlines() if line]) <= 12
    filled = fill(kind, lengths=(300, 200), layers=2)
    layer = LikeRadixAttention if kind == "like" else real_layer
    model, prefill, ids = Model(layer(0), layer(1)), rows(500, 0), torch.arange(500)
    batch = forward_batch("EXTEND", 2, [300, 200])
    batch.req_pool_indices, batch.seq_lens, batch.input_ids = filled.rows, filled.lengths, ids
    runner = SimpleNamespace(model=model, req_to_token_pool=filled.requests, token_to_kv_pool=filled.pool)
    runner.forward = lambda one: model.run(prefill, one)
    values: dict = {"runner": runner, "batch": batch}
    exec(block, values)
    assert capsys.readouterr().out
    kept = values["kept"]
    dense = [torch.zeros(2, 300, KV_HEADS, DIM) for _ in range(2)]
    for layer_keys, own in zip(dense, filled.keys):
        for b, key in enumerate(own):
            layer_keys[b, : len(key)] = key
    queries = [torch.stack([query[292:300], query[492:500]]) for query in prefill]
    config = SpecPrefillConfig.preset("default")
    state = spk.new_state(2, 8, 300)
    spk.score_layers_(state, queries, dense, layout="bthd", seq_lens=filled.lengths, queries="observation_window",
                      pool_order="after_max")  # fmt: skip
    importance = spk.finalize_importance(state, filled.lengths, reduce="max", pool_kernel_size=config.pool_kernel_size)
    same(kept.importance, importance)
    wanted = spk.select_chunks(importance, filled.lengths, keep_ratio=0.2, chunk_size=8)
    first, second = (wanted.indices[b, : int(wanted.num_kept[b])].long() for b in range(2))
    count = len(first) + len(second)
    same(kept.positions[:count], torch.cat([first, second]))
    same(kept.input_ids[:count], torch.cat([first, 300 + second]))
    table = filled.requests.req_to_token
    same(kept.slots[:count], torch.cat([table[filled.rows[0], first], table[filled.rows[1], second]]))
    assert (
        sglang.pool_keys(runner.req_to_token_pool, runner.token_to_kv_pool, filled.rows, filled.lengths).max_len == 300
    )
