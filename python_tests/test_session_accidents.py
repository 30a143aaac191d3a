"""A session whose turn fails, is interrupted, abandoned or overtaken: the next call is right all the same."""

from __future__ import annotations

import pytest
import torch
from conversations import Accident, assert_as_from_scratch, fail, follow
from loop_models import pipeline, prompt

from specprefill_kernels.loop.session import Session


def fail_in_the_base(session, ids):
    """In the middle of a forward: some layers have the new tokens and some have not."""
    with session.loop.base.model.layers[2].register_forward_pre_hook(fail):
        session.generate(ids, 4)


def fail_at_the_second_token(session, ids):
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 2:
            fail()

    with session.loop.base.model.layers[2].register_forward_pre_hook(hook):
        session.generate(ids, 4)


def fail_in_the_speculator(session, ids):
    with session.loop.selector._speculator.model.model.layers[2].register_forward_pre_hook(fail):
        session.generate(ids, 4)


def fail_in_the_look_ahead(session, ids):
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 4:
            fail()

    with session.loop.selector._speculator.model.model.layers[2].register_forward_pre_hook(hook):
        session.generate(ids, 4)


def interrupt_a_stream(session, ids):
    stream = session.stream(ids, 4)
    next(stream)
    with session.loop.base.model.layers[1].register_forward_pre_hook(raise_interrupt):
        next(stream)


def raise_interrupt(*_):
    raise KeyboardInterrupt


ACCIDENTS = (
    fail_in_the_base,
    fail_at_the_second_token,
    fail_in_the_speculator,
    fail_in_the_look_ahead,
    interrupt_a_stream,
)


@pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda accident: accident.__name__)
@pytest.mark.parametrize("first", [False, True], ids=["second_turn", "first_turn"])
def test_after_an_accident_the_next_call_is_right(accident, first):
    sp = pipeline("gemma3")
    session, ids = Session(sp), prompt()
    if not first:
        ids = follow(ids, session.generate(ids, 4))
    with pytest.raises((Accident, KeyboardInterrupt)):
        accident(session, ids)
    result = assert_as_from_scratch(session, ids)
    torch.testing.assert_close(result.selection.importance, sp.select(ids).importance, atol=1e-6, rtol=1e-4)
    assert_as_from_scratch(session, follow(ids, result))


@pytest.mark.parametrize("read", [1, 3])
def test_an_abandoned_stream_leaves_what_it_computed(read):
    session, ids = Session(pipeline()), prompt()
    stream = session.stream(ids, 10)
    tokens = [next(stream) for _ in range(read)]
    kept = session.cached_tokens
    ids = torch.cat([ids, torch.tensor([tokens]), prompt(20, seed=4)], dim=1)
    result = assert_as_from_scratch(session, ids)
    assert result.kept_tokens - result.prefilled_tokens <= kept
    with pytest.raises(RuntimeError, match="started another generation"):
        next(stream)
    with pytest.raises(RuntimeError, match="read to its end"):
        _ = stream.result
    assert_as_from_scratch(session, follow(ids, result))


def test_streams_of_one_session_must_not_interleave():
    session, ids = Session(pipeline()), prompt()
    first, second = session.stream(ids, 6), session.stream(ids, 6)
    next(first)
    expected = session.loop.generate(ids, 6).tokens
    tokens = [next(second)]
    with pytest.raises(RuntimeError, match="started another generation"):
        next(first)
    assert (*tokens, *second) == expected
    third = session.stream(ids, 6)
    next(third)
    session.reset()
    with pytest.raises(RuntimeError, match="or was reset"):
        next(third)
