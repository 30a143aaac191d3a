"""The vLLM plugin and prefix caching: what is in the cache at other positions is not what a request asks for."""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("vllm")

from vllm_engine import (
    BLOCK,
    CACHED,
    TIGHT,
    answer_of,
    chosen,
    engine,
    kept,
    kept_ids,
    left_behind,
    loop_answer,
    params,
    run,
    text_ids,
)

pytestmark = [pytest.mark.model, pytest.mark.slow]

TOLERANCE = 1e-3  # as in test_vllm_engine.py, which shows that wrong positions differ by more
TOKENS = 6

# Three parts of a text: START, what is dropped, END. The kept ids are the same whatever is dropped.
START, END = text_ids(0, 2 * BLOCK + 10), text_ids(600, 4 * BLOCK + 5)


def prompt(dropped: int) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """(ids, kept spans) of START and END with as many dropped tokens between them."""
    ids = START + text_ids(200, dropped) + END
    return ids, ((0, len(START)), (len(START) + dropped, len(ids)))


@pytest.fixture
def llm():
    llm = engine(CACHED)
    assert llm.reset_prefix_cache()
    with chosen(llm):
        yield llm
    assert left_behind(llm) == []


def cached_tokens(llm, ids, spans=None, tokens=TOKENS):
    """Run one request; how many tokens came from the cache. Its answer is the loop's, and an engine's without cache."""
    (output,) = run(llm, (ids, params(spans, tokens)))
    answer, everything = answer_of(output), ((0, len(ids)),)
    assert answer.distance(loop_answer(ids, spans or everything, tokens)) < TOLERANCE
    assert answer.distance(without_cache(tuple(ids), spans, tokens)) < TOLERANCE
    return output.num_cached_tokens


@functools.cache
def without_cache(ids, spans, tokens):
    with chosen(engine(TIGHT)) as selector:
        (output,) = run(engine(TIGHT), (ids, params(spans, tokens)))
    assert len(selector.asked) == (spans is not None)
    assert output.num_cached_tokens == 0
    return answer_of(output)


def blocks_in(tokens: int) -> int:
    """The tokens of all whole blocks in front of a prompt's last token, which is always computed."""
    return (tokens - 1) // BLOCK * BLOCK


def test_the_same_request_again_comes_from_the_cache(llm):
    ids, spans = prompt(150)
    assert cached_tokens(llm, ids, spans) == 0
    assert cached_tokens(llm, ids, spans) == blocks_in(kept(spans)) == 6 * BLOCK


def test_the_same_tokens_at_other_positions_do_not(llm):
    """Only the whole blocks in front of the first dropped token, which stand where they stood."""
    cached_tokens(llm, *prompt(150))
    for dropped in (149, 151, 150 + BLOCK):
        assert cached_tokens(llm, *prompt(dropped)) == 2 * BLOCK, dropped
    for dropped in (149, 151, 150 + BLOCK, 150):
        assert cached_tokens(llm, *prompt(dropped)) == 6 * BLOCK, f"{dropped}, again"


def test_the_same_tokens_one_after_the_other_do_not(llm):
    """The kept ids as a prompt of their own, before and after."""
    ids, spans = prompt(150)
    short = START + END
    assert list(short) == kept_ids(ids, spans)
    cached_tokens(llm, short)
    assert cached_tokens(llm, ids, spans) == 2 * BLOCK
    assert llm.reset_prefix_cache()
    cached_tokens(llm, ids, spans)
    assert cached_tokens(llm, short) == 2 * BLOCK


def test_a_dropped_first_token_shares_nothing(llm):
    ids = text_ids(0, 300)
    cached_tokens(llm, ids)
    assert cached_tokens(llm, ids, ((1, 200), (250, 300))) == 0
    assert cached_tokens(llm, ids[1:]) == 0  # the same blocks as the pruned one's, at 0, 1, ...


def test_an_ordinary_request_leaves_its_start_to_a_pruned_one(llm):
    ids, spans = prompt(150)
    cached_tokens(llm, ids)
    assert cached_tokens(llm, ids, spans) == 2 * BLOCK


def test_a_pruned_request_leaves_its_start_to_an_ordinary_one(llm):
    ids, spans = prompt(150)
    cached_tokens(llm, ids, spans)
    assert cached_tokens(llm, ids) == 2 * BLOCK
    assert cached_tokens(llm, ids) == blocks_in(len(ids))


def test_where_nothing_is_dropped_all_is_shared(llm):
    ids = text_ids(0, 200)
    cached_tokens(llm, ids)
    assert cached_tokens(llm, ids, ((0, 200),)) == blocks_in(200)


def test_a_conversation_goes_on_behind_a_pruned_answer(llm):
    """Decoded blocks stand at positions T, T + 1, ..., where the next prompt has the answer."""
    ids, spans = prompt(150)
    decoded = 2 * BLOCK
    (first,) = run(llm, (ids, params(spans, decoded)))
    answer = tuple(first.outputs[0].token_ids)
    assert answer_of(first).distance(loop_answer(ids, spans, decoded)) < TOLERANCE
    longer = ids + answer + text_ids(900, 21)
    same = (*spans[:-1], (spans[-1][0], len(longer)))
    # The last decoded token was never read.
    assert cached_tokens(llm, longer, same) == (kept(spans) + decoded - 1) // BLOCK * BLOCK
    assert llm.reset_prefix_cache()
    run(llm, (ids, params(spans, decoded)))
    other = (spans[0], (spans[1][0] - 1, len(longer)))
    assert cached_tokens(llm, longer, other) == 2 * BLOCK
    # As a prompt that is read whole, and as the same kept tokens with the answer at K, K + 1, ...
    assert cached_tokens(llm, longer) == 2 * BLOCK
    ids_of_the_cache = tuple(kept_ids(ids, spans)) + answer
    assert cached_tokens(llm, ids_of_the_cache, ((0, len(ids_of_the_cache)),)) == 2 * BLOCK


def test_an_ordinary_answer_is_not_a_pruned_one(llm):
    """START and END in a row, and the answer behind them: indices are the same, positions are not."""
    ids, spans = prompt(150)
    (first,) = run(llm, (START + END, params(None, BLOCK)))
    answer = tuple(first.outputs[0].token_ids)
    longer = ids + answer
    assert cached_tokens(llm, longer, (spans[0], (spans[1][0], len(longer)))) == 2 * BLOCK


def test_requests_of_one_batch_do_not_mix_up_their_blocks(llm):
    """Equal kept ids at five sets of positions and in an ordinary request, all at once, twice."""
    requests = [prompt(dropped) for dropped in (100, 101, 132, 68, 100)] + [(START + END, None)]
    for _ in range(2):
        outputs = run(llm, *((ids, params(spans, TOKENS)) for ids, spans in requests))
        for (ids, spans), output in zip(requests, outputs):
            right = loop_answer(ids, spans or ((0, len(ids)),), TOKENS)
            assert answer_of(output).distance(right) < TOLERANCE


def test_samples_of_one_request_read_the_same_selection(llm):
    """With a seed the samples of n = 3 are those of three requests with seeds of their own."""
    ids, spans = prompt(150)
    hot = {"temperature": 1.0, "logprobs": None}
    (three,) = run(llm, (ids, params(spans, seed=7, n=3, **hot)))
    single = run(llm, *((ids, params(spans, seed=7 + i, **hot)) for i in range(3)))
    samples = [list(completion.token_ids) for completion in three.outputs]
    assert samples == [list(output.outputs[0].token_ids) for output in single]
    assert len(set(map(tuple, samples))) == 3
    assert (three.specprefill.mode, three.specprefill.kept_tokens) == ("sparse", kept(spans))
