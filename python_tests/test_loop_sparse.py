"""The speculator's block-sparse attention: what it computes, where it stays dense, and that results say which ran."""

from __future__ import annotations

import pytest
import torch
from loop_models import build, prompt
from transformers import AttentionInterface

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.attention import attention_configs
from specprefill_kernels.loop.chunks import chunk_lengths, lower_right_attention
from specprefill_kernels.loop.memory import SpeculatorMemory
from specprefill_kernels.loop.speculator import Speculator

LENGTH = 500
# 5 of at most 32 blocks
SPARSE = {
    "speculator_attention": "sparse",
    "attention_block_size": 16,
    "attention_keep_blocks": 5,
    "keep_ratio": 0.2,
    "min_prompt_tokens": 1,
    "look_ahead": 4,
}


def score(model, *, length: int = LENGTH, memory: SpeculatorMemory | None = None, **changes):
    return Speculator(model, SpecPrefillConfig(**{**SPARSE, **changes})).score(prompt(length), memory=memory)


@pytest.fixture(scope="module")
def llama():
    return build("llama", attn="sdpa")


@pytest.mark.parametrize("chunk", [None, 128, 100])
@pytest.mark.parametrize("queries", ["look_ahead", "observation_window"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_budget_that_only_the_scored_block_exceeds_is_dense_attention(attn, queries, chunk):
    """With one block less than there are, only the prompt's last block would lose one, which is scored and so dense."""
    model = build("llama", attn=attn)
    count = -(-LENGTH // 16)
    sparse = score(model, queries=queries, prefill_chunk=chunk, attention_keep_blocks=count - 1)
    dense = score(model, queries=queries, prefill_chunk=chunk, speculator_attention="dense")
    assert sparse.attention[0] == "sparse"
    assert dense.attention == ("dense", "")
    torch.testing.assert_close(sparse.importance, dense.importance, rtol=1e-4, atol=1e-7)
    assert sparse.look_ahead_tokens == dense.look_ahead_tokens


def test_a_budget_of_every_block_runs_dense_and_says_so(llama):
    sparse, dense = score(llama, attention_keep_blocks=32), score(llama, speculator_attention="dense")
    assert torch.equal(sparse.importance, dense.importance)
    assert sparse.attention == ("dense", "500 tokens, and each block of sparse attention reads up to 512")


def masked_importance(model, ids: torch.Tensor) -> torch.Tensor:
    """Importance by the model under masks [Hq, T, T] made here: the definition of what sparse attention sees."""
    from specprefill_kernels import select_attention_blocks
    from specprefill_kernels.loop.attention import attention_handler
    from specprefill_kernels.loop.capture import LayerCapture
    from specprefill_kernels.loop.scoring import Captured, score_captured

    size, keep = SPARSE["attention_block_size"], SPARSE["attention_keep_blocks"]
    length = ids.shape[1]
    layers = {}

    def handler(ordinary, module, query, key, value, mask, **kwargs):
        chosen = select_attention_blocks(query, key, block_size=size, keep_blocks=keep, backend="reference")
        block = torch.arange(length) // size
        seen = torch.zeros(query.shape[1], length, length, dtype=torch.bool)
        for head in range(query.shape[1]):
            for row in range(chosen.counts.shape[2]):
                listed = chosen.indices[0, head, row, : chosen.counts[0, head, row]]
                seen[head, block == row] = torch.isin(block, torch.cat([listed, torch.tensor([row])]))
        seen[:, block == block[-1]] = True  # the row that is scored, and the rest of its block
        seen &= torch.ones(length, length, dtype=torch.bool).tril()
        layers[module.layer_idx] = LayerCapture(key, kwargs["scaling"], None, None, [query[:, :, -1:].transpose(1, 2)])
        logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * kwargs["scaling"]
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2).contiguous(), None

    with torch.no_grad(), attention_handler(attention_configs(model), handler):
        model.base_model(input_ids=ids)
    config = SpecPrefillConfig(look_ahead=1)
    return score_captured(Captured(layers, length, 4, 1, 1), config).importance


def test_it_sees_the_blocks_that_the_op_chooses_and_no_others(llama):
    sparse = score(llama, look_ahead=1, prefill_chunk=None)
    expected = masked_importance(llama, prompt(LENGTH))
    torch.testing.assert_close(sparse.importance, expected, rtol=1e-4, atol=1e-7)
    dense = score(llama, look_ahead=1, speculator_attention="dense")
    assert (dense.importance - expected).abs().max() > 1e-3


def test_a_prompt_in_chunks_is_read_as_one_at_once(llama):
    whole = score(llama, prefill_chunk=None)
    for chunk in (100, 128, 250):
        chunked = score(llama, prefill_chunk=chunk)
        torch.testing.assert_close(chunked.importance, whole.importance, rtol=1e-4, atol=1e-7)


def test_a_conversation_goes_on_from_its_memory(llama):
    memory = SpeculatorMemory()
    score(llama, length=320, memory=memory)  # ends at the end of a block
    told = Speculator(llama, SpecPrefillConfig(**SPARSE)).score(prompt(LENGTH), memory=memory)
    assert told.attention[0] == "sparse"


@pytest.mark.parametrize("chunk", [None, 128])
@pytest.mark.parametrize("queries", ["look_ahead", "observation_window"])
def test_a_continued_conversation_scores_as_a_fresh_one(llama, queries, chunk):
    """Earlier turns ran their scored rows, and the rest of their block, dense: those keys must not come back."""
    changes = {"attention_keep_blocks": 4, "look_ahead": 3, "queries": queries, "prefill_chunk": chunk}
    for turns in [(64, 300), (150, 320), (160, 300), (161, 300), (161, 320), (64, 150, 160, 161, 300, 320, 200, 60)]:
        memory = SpeculatorMemory()
        for turn, length in enumerate(turns):
            ours, fresh = (score(llama, length=length, memory=used, **changes) for used in (memory, None))
            torch.testing.assert_close(ours.importance, fresh.importance, rtol=1e-5, atol=1e-6)
            assert ours.look_ahead_tokens == fresh.look_ahead_tokens
            assert fresh.attention[0] == ("sparse" if length > 64 else "dense")
            assert turn == 0 or ours.reused_tokens > min(length, turns[turn - 1]) - 48


def test_an_edit_within_a_block_takes_the_whole_block_back(llama):
    memory, speculator = SpeculatorMemory(), Speculator(llama, SpecPrefillConfig(**SPARSE))
    text = prompt(LENGTH)
    speculator.score(text[:, :300], memory=memory)
    edited = text.clone()
    edited[0, 201] = (edited[0, 201] + 1) % 300
    ours = speculator.score(edited, memory=memory)
    assert ours.reused_tokens == 192
    torch.testing.assert_close(ours.importance, speculator.score(edited).importance, rtol=1e-5, atol=1e-6)


def test_a_window_that_a_later_turn_outgrows_is_dense_from_the_first():
    model, memory = build("qwen2_sliding", sliding_window=200), SpeculatorMemory()
    for length in (190, 320):
        ours = score(model, length=length, memory=memory)
        torch.testing.assert_close(ours.importance, score(model, length=length).importance, rtol=1e-5, atol=1e-6)
    assert "layers 0, 2 dense: a sliding window of 200 tokens" in ours.attention[1]


def test_a_window_of_the_whole_context_cuts_nothing():
    kind, why = score(build("qwen2_sliding", sliding_window=2048)).attention
    assert (kind, why) == ("sparse", "5 blocks of 16 tokens in 4 layers")


@pytest.fixture
def registered():
    """A llama with attention of another name, as flash attention and flex attention are; removed afterwards."""
    names = []

    def register(name, function):
        AttentionInterface.register(name, function)
        names.append(name)
        model = build("llama")
        for config in attention_configs(model):
            config._attn_implementation_internal = name  # the setter would look for a package of this name
        return model

    yield register
    for name in names:
        AttentionInterface._global_mapping.pop(name)


@pytest.mark.parametrize("chunk", [None, 128])
@pytest.mark.parametrize("queries", ["look_ahead", "observation_window"])
def test_flash_attention_gets_no_mask_and_reads_the_scored_rows(registered, llama, queries, chunk):
    shapes = set()

    def flash(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
        assert attention_mask is None
        assert position_ids is None or position_ids.shape[1] == query.shape[2]
        shapes.add((query.shape[2], key.shape[2]))
        return lower_right_attention(query, key, value, scaling), None

    changes = {"queries": queries, "prefill_chunk": chunk}
    model = registered("stand_in_flash", flash)
    ours, expected = score(model, **changes), score(llama, **changes)
    assert ours.attention == expected.attention
    assert ours.attention[0] == "sparse"
    torch.testing.assert_close(ours.importance, expected.importance, rtol=1e-4, atol=1e-7)
    assert (LENGTH % 16 if queries == "look_ahead" else LENGTH - (LENGTH - 4) // 16 * 16, LENGTH) in shapes


def test_other_implementations_stay_dense_and_are_named(registered, llama):
    def flex(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert query.shape[2] in (1, key.shape[2])  # never a stretch of rows, which it would misplace
        return lower_right_attention(query, key, value, scaling), None

    ours = score(registered("stand_in_flex", flex), prefill_chunk=None)
    assert ours.attention == ("dense", "layers 0, 1, 2, 3 dense: its attention implementation stand_in_flex")
    dense = score(llama, speculator_attention="dense", prefill_chunk=None)
    torch.testing.assert_close(ours.importance, dense.importance, rtol=1e-4, atol=1e-7)


def test_a_memory_of_dense_attention_is_not_continued_by_sparse_attention(llama):
    memory = SpeculatorMemory()
    config = SpecPrefillConfig(**SPARSE)
    Speculator(llama, config.replace(speculator_attention="dense")).score(prompt(), memory=memory)
    assert Speculator(llama, config).score(prompt(), memory=memory).reused_tokens == 0
    again = Speculator(llama, config).score(prompt(), memory=memory)
    assert again.reused_tokens > 0
    assert Speculator(llama, config.replace(attention_keep_blocks=6)).score(prompt(), memory=memory).reused_tokens == 0


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "layers 1, 3 dense: softcap=5.0"),
        ("mistral", "layers 0, 1, 2, 3 dense: a sliding window of 24 tokens"),
    ],
)
def test_layers_that_cannot_stay_dense_and_are_named(family, reason):
    model = build(family)
    sparse, dense = score(model), score(model, speculator_attention="dense")
    kind, why = sparse.attention
    assert kind == "dense"
    assert reason in why
    torch.testing.assert_close(sparse.importance, dense.importance, rtol=1e-4, atol=1e-7)


def test_layers_that_can_run_sparse_beside_those_that_cannot():
    kind, why = score(build("qwen2_sliding")).attention
    assert kind == "sparse"
    assert why == "5 blocks of 16 tokens in 2 layers; layers 0, 2 dense: a sliding window of 24 tokens"


def test_results_say_which_attention_ran(llama):
    def loop(**changes):
        return SpecPrefill(llama, llama, SpecPrefillConfig(**{**SPARSE, **changes}))

    selection = loop().select(prompt(LENGTH))
    assert selection.speculator_attention == "sparse"
    assert "speculator attention sparse: 5 blocks of 16 tokens in 4 layers" in selection.reason
    assert loop(speculator_attention="dense").select(prompt(LENGTH)).speculator_attention == "dense"
    assert "speculator attention" not in loop(speculator_attention="dense").select(prompt(LENGTH)).reason
    short = loop().select(prompt(60))
    assert (short.speculator_attention, short.mode) == ("dense", "sparse")
    assert "60 tokens" in short.attention_reason
    assert loop(min_prompt_tokens=100).select(prompt(60)).speculator_attention == "none"


def test_answers_come_from_the_selection(llama):
    loop = SpecPrefill(llama, llama, SpecPrefillConfig(**SPARSE))
    result = loop.generate(prompt(LENGTH), max_new_tokens=3)
    assert result.mode == "sparse"
    assert result.selection.speculator_attention == "sparse"
    assert len(result.tokens) == 3


def test_the_bases_own_layers_are_refused(llama):
    with pytest.raises(ValueError, match="speculator_attention: expected"):
        SpecPrefill(llama, config=SpecPrefillConfig(**SPARSE), self_layers=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculator_attention": "auto"}, "speculator_attention: expected one of"),
        ({"attention_block_size": 48}, "attention_block_size: expected a power of two"),
        ({"attention_block_size": 8}, "attention_block_size: expected an int of at least 16"),
        ({"attention_block_size": 512}, "attention_block_size: expected a power of two"),
        ({"attention_keep_blocks": 2}, "attention_keep_blocks: expected at least"),
        ({"attention_local_blocks": 0}, "attention_local_blocks: expected an int of at least 1"),
        ({"attention_sink_blocks": -1}, "attention_sink_blocks: expected an int of at least 0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SpecPrefillConfig(**changes)


@pytest.mark.parametrize("total", [1, 40, 97, 100, 1000, 1001])
@pytest.mark.parametrize("start", [0, 5, 32])
@pytest.mark.parametrize("last", [1, 40])
def test_chunks_begin_at_whole_blocks(total, start, last):
    lengths = chunk_lengths(total, 96, last, start=start, block_size=16)
    assert sum(lengths) == total
    assert min(lengths) > 0
    assert all((start + sum(lengths[:i])) % 16 == 0 for i in range(1, len(lengths)))
    assert lengths[-1] >= min(total, last)
    assert max(lengths[:-1], default=0) <= 96
