"""The vLLM plugin in real engines: what comes out of a pruned prompt is what the loop makes of the same selection."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm")

from vllm_engine import (
    BLOCK,
    CONTEXT,
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
    runner,
    scheduler,
    text_ids,
)

from specprefill_kernels.integrations.vllm.worker import tracked

pytestmark = [pytest.mark.model, pytest.mark.slow]

# Engine and loop round differently; a wrong position changes log probabilities by a hundred times this, or the tokens.
TOLERANCE = 1e-3


def random_spans(seed: int, prompt: int, chunk: int, ratio: float) -> tuple[tuple[int, int], ...]:
    """Chunks drawn at random, and the last one; neighbours stay apart, as two spans that touch."""
    draw = random.Random(seed)
    starts = range(0, prompt, chunk)
    return tuple((s, min(s + chunk, prompt)) for s in starts if draw.random() < ratio or s + chunk >= prompt)


def merged(spans):
    out: list[tuple[int, int]] = []
    for start, end in spans:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return tuple(out)


# name -> (where the prompt begins in the text, its tokens, the kept spans)
SELECTIONS = {
    "one span, the first token dropped": (0, 500, ((5, 500),)),
    "a start and an end": (100, 700, ((0, 70), (600, 700))),
    "many spans": (0, 611, merged(random_spans(1, 611, 16, 0.3))),
    "many spans, another text": (700, 900, merged(random_spans(2, 900, 32, 0.2))),
    "single tokens": (300, 300, (*((i, i + 1) for i in range(3, 290, 9)), (298, 300))),
    "only the last chunk": (50, 480, ((448, 480),)),
    "one token": (200, 333, ((332, 333),)),
    "a whole number of blocks": (400, 400, ((32, 96), (300, 332), (368, 400))),
    "nothing dropped": (0, 160, ((0, 160),)),
}


@pytest.fixture(scope="module")
def llm():
    return engine(TIGHT)


@pytest.fixture(autouse=True)
def nothing_left(llm):
    yield
    assert left_behind(llm) == []


@pytest.fixture(scope="module")
def together(llm):
    """All selections in one batch with ordinary requests among them; every prompt takes many steps of 48 tokens."""
    requests = {}
    for i, (name, (skip, count, spans)) in enumerate(SELECTIONS.items()):
        requests[name] = (text_ids(skip, count), params(spans))
        if i % 3 == 0:
            requests[f"ordinary {i}"] = (text_ids(skip + 7, 100 + i), params())
    with chosen(llm):
        outputs = run(llm, *requests.values())
    return dict(zip(requests, outputs))


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_pruned_prompt_gives_what_the_loop_gives(together, name):
    skip, count, spans = SELECTIONS[name]
    output = together[name]
    assert answer_of(output).distance(loop_answer(text_ids(skip, count), spans)) < TOLERANCE
    assert (output.specprefill.mode, output.specprefill.kept_tokens) == ("sparse", kept(spans))
    # The client sees its own prompt.
    assert output.prompt_token_ids == list(text_ids(skip, count))


@pytest.mark.parametrize("name", [name for name, (_, _, spans) in SELECTIONS.items() if 1 < kept(spans) < 160])
def test_wrong_positions_would_show(name):
    """The comparison above can fail: positions that start at 0, and decoding at K or T + 1, differ by more."""
    skip, count, spans = SELECTIONS[name]
    ids, right = text_ids(skip, count), loop_answer(text_ids(skip, count), spans)
    wrong = [
        {"positions": tuple(range(kept(spans)))},
        {"decode_from": kept(spans)},
        {"decode_from": count + 1},
    ]
    for mistake in wrong:
        assert right.distance(loop_answer(ids, spans, **mistake)) > 10 * TOLERANCE, mistake


def test_ordinary_requests_in_a_batch_with_pruned_ones_do_not_change(together):
    ordinary = {name: output for name, output in together.items() if name.startswith("ordinary")}
    assert len(ordinary) == 3
    for output in ordinary.values():
        ids = output.prompt_token_ids
        assert answer_of(output).distance(loop_answer(ids, ((0, len(ids)),))) < TOLERANCE
        assert not hasattr(output, "specprefill")


def test_a_pruned_request_alone_equals_itself_in_a_batch(llm, together):
    skip, count, spans = SELECTIONS["many spans"]
    with chosen(llm):
        (alone,) = run(llm, (text_ids(skip, count), params(spans)))
    assert answer_of(alone).distance(answer_of(together["many spans"])) < TOLERANCE


def test_the_model_reads_kept_tokens_at_their_positions_and_decodes_from_the_end_of_the_prompt(llm, monkeypatch):
    ids, spans = text_ids(0, 500), ((0, 40), (100, 133), (470, 500))
    seen, steps = [], []

    def note(module, args, kwargs):
        steps.append(kwargs["positions"].numel())
        seen.extend(zip(kwargs["input_ids"].tolist(), kwargs["positions"].tolist()))

    hook = runner(llm).model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with chosen(llm):
            (output,) = run(llm, (ids, params(spans, 6)))
    finally:
        hook.remove()
    positions = [position for start, end in spans for position in range(start, end)]
    answer = answer_of(output).tokens
    assert seen == [*((ids[position], position) for position in positions), *zip(answer, range(500, 505))]
    assert steps == [48, 48, 7, 1, 1, 1, 1, 1]


def test_the_scheduler_counts_kept_tokens_only(llm):
    ids, spans = text_ids(0, 900), ((0, 40), (880, 900))
    scheduled, manager = scheduler(llm), scheduler(llm).kv_cache_manager
    with chosen(llm):
        name = llm.llm_engine.add_request("one", {"prompt_token_ids": list(ids)}, params(spans, 8))
    (request,) = scheduled.requests.values()
    assert (request.num_prompt_tokens, list(request.prompt_token_ids)) == (60, kept_ids(ids, spans))
    while request.num_output_tokens < 6:
        llm.llm_engine.step()
    # 60 kept and 6 decoded tokens lie in three blocks of 32.
    assert [len(blocks) for blocks in manager.get_block_ids(name)] == [3]
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def test_a_preempted_request_comes_back_with_its_positions(llm, monkeypatch):
    """Four prompts of eight blocks each, in a cache of 33: it has no room for what they decode."""
    spans = ((0, 30), (200, 376), (464, 500))
    requests = [(text_ids(i * 100, 500), params(spans, 24)) for i in range(4)]
    assert kept(spans) == 8 * BLOCK - 14
    preempt, preempted = scheduler(llm)._preempt_request, []

    def noting(request, *args, **kwargs):
        preempted.append((request.request_id, request.num_output_tokens))
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler(llm), "_preempt_request", noting)
    with chosen(llm):
        outputs = run(llm, *requests)
    assert any(decoded > 0 for _, decoded in preempted), f"nobody was preempted while decoding: {preempted}"
    for (ids, _), output in zip(requests, outputs):
        assert answer_of(output).distance(loop_answer(ids, spans, 24)) < TOLERANCE


def test_aborted_requests_leave_nothing_behind(llm):
    front = llm.llm_engine
    long, short = ((5, 400),), ((0, 20), (380, 400))
    with chosen(llm):
        while_reading = front.add_request("reading", {"prompt_token_ids": list(text_ids(0, 400))}, params(long, 30))
        front.step()
        assert set(tracked(runner(llm))) == {while_reading}
        front.abort_request([while_reading], internal=True)
        while_decoding = front.add_request("decoding", {"prompt_token_ids": list(text_ids(9, 400))}, params(short, 30))
        decoded = 0
        while decoded < 3:
            decoded = sum(len(output.outputs[0].token_ids) for output in front.step())
        assert set(tracked(runner(llm))) == {while_decoding}
        front.abort_request(["decoding"])  # by the client's name for it
        waiting = front.add_request("waiting", {"prompt_token_ids": list(text_ids(9, 400))}, params(short, 30))
        front.abort_request([waiting], internal=True)
    assert not front.has_unfinished_requests()
    run(llm, (text_ids(0, 40), params(None, 2)))  # workers hear of it with the next step
    assert tracked(runner(llm)) == {}


def test_a_request_that_is_refused_leaves_nothing_behind(llm):
    from vllm.exceptions import VLLMValidationError

    ids = text_ids(0, 100)
    for arguments, named in (
        ({"specprefill_positions": [100, 0, 50]}, "specprefill_positions"),
        ({"specprefill": "perhaps"}, "specprefill"),
        ({"specprefill": True, "keep_ratio": 2}, "keep_ratio"),
        ({"specprefill": True, "protect_spans": [0, 101]}, "protect_spans"),
    ):
        with pytest.raises(VLLMValidationError, match=named):
            run(llm, (ids, params(None, 2, extra_args=arguments)))
        assert left_behind(llm) == []
        assert not llm.llm_engine.has_unfinished_requests()


def test_an_answer_ends_where_positions_reach_the_context_length(llm):
    """The engine counts indices and would go on; positions beyond max_model_len have no rotation in many models."""
    ids, spans = text_ids(0, CONTEXT - 6), ((0, 20), (CONTEXT - 40, CONTEXT - 6))
    with chosen(llm):
        sparse, ordinary = run(llm, (ids, params(spans, 50)), (text_ids(0, CONTEXT - 6), params(None, 50)))
    for output in (sparse, ordinary):
        assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (6, "length")
    assert answer_of(sparse).distance(loop_answer(ids, spans, 6)) < TOLERANCE


def test_a_prompt_longer_than_the_context_is_refused_however_little_would_be_kept(llm):
    from vllm.exceptions import VLLMValidationError

    with chosen(llm) as selector:
        for count in (CONTEXT, CONTEXT + 100):
            with pytest.raises(VLLMValidationError, match=r"(?i)maximum (model|context) length"):
                run(llm, (text_ids(0, count), params(((0, 10), (20, 30)), 2)))
    assert selector.asked == []


def test_prompt_logprobs_run_dense_and_say_so(llm):
    ids = text_ids(0, 90)
    with chosen(llm) as selector:
        output, same = run(llm, (ids, params(((0, 9), (80, 90)), prompt_logprobs=0)), (ids, params(prompt_logprobs=0)))
    assert (output.specprefill.mode, output.specprefill.kept_tokens) == ("dense", 90)
    assert output.specprefill.reason == "prompt_logprobs asks for every prompt token"
    assert selector.asked == []
    assert len(output.prompt_logprobs) == 90
    assert answer_of(output).distance(answer_of(same)) < TOLERANCE


def test_a_request_says_no_for_itself(llm, monkeypatch):
    ids = text_ids(0, 90)
    monkeypatch.setattr(llm.llm_engine.specprefill, "_settings", _by_default(llm))
    with chosen(llm) as selector:
        asked_off, default = run(
            llm, (ids, params(None, 2, extra_args={"specprefill": False})), (ids, params(None, 2, prompt_logprobs=0))
        )
    assert selector.asked == []
    assert not hasattr(asked_off, "specprefill")
    assert default.specprefill.mode == "dense"


def _by_default(llm):
    import dataclasses

    return dataclasses.replace(llm.llm_engine.specprefill._settings, by_default=True)
