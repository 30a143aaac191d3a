"""Bad input: every public call names the argument, what it expected and what came. Nothing crashes."""

from __future__ import annotations

import re
from typing import Any

import bad_scores
import bad_selections
import pytest
import torch
from bad_input import ints
from calls import BATCH, CALLS, DIM, KEPT, LENGTH, ROWS, placed
from grid import backends
from selecting import selection_of

import specprefill_kernels as spk

TABLE = [
    *bad_scores.SCORE,
    *bad_scores.PACKED,
    *bad_scores.PAGED,
    *bad_scores.LAYERS,
    *bad_selections.FINALIZE,
    *bad_selections.SELECT,
    *bad_selections.GATHER,
    *bad_selections.KV,
    *bad_selections.TOKENS,
]
# On a GPU contents are not looked at: what a kernel then makes of bad ones is in test_gpu_bad_values.py.
GRID = [
    pytest.param(backend, bad, id=f"{backend.id}-{bad.call}: {bad.fault}", marks=backend.marks)
    for bad in TABLE
    for backend in backends(CALLS[bad.call].op)
    if backend.checks_values or not bad.values
]


def placed_all(arguments: dict, device: str) -> dict:
    return {name: placed(value, device) for name, value in arguments.items()}


def apply(changes: dict[str, Any], arguments: dict) -> dict:
    changed = dict(arguments)
    for name, change in changes.items():
        if not callable(change):
            changed[name] = change
        elif change.__code__.co_argcount == 2:
            changed[name] = change(arguments[name], arguments)
        else:
            changed[name] = change(arguments[name])
    return changed


@pytest.mark.parametrize(("backend", "bad"), GRID, indirect=["backend"])
def test_bad_input_is_named(backend, bad):
    call = CALLS[bad.call]
    arguments = {"backend": backend.name, **call.arguments(backend.device)}
    with pytest.raises(bad.error) as caught:
        call.function(**placed_all(apply(bad.changes, arguments), backend.device))
    message = str(caught.value)
    assert type(caught.value) is bad.error, message
    assert message.startswith(bad.names), f"names another argument: {message}"
    assert re.search(f", got .*{bad.words}", message), f"does not say what came: {message}"
    assert ": expected " in message


@pytest.mark.parametrize("name", CALLS)
def test_the_unchanged_calls_are_good(name):
    """Else the table above would prove nothing."""
    CALLS[name].function(**CALLS[name].arguments(), backend="reference")


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1), (1, 2.0, 1), (1, 1, "4"), (True, 1, 1)])
def test_new_state_wants_positive_sizes(sizes):
    with pytest.raises(ValueError, match=r"^(batch|look_ahead|max_len): expected .*, got "):
        spk.new_state(*sizes)


def test_new_state_is_zero():
    state = spk.new_state(2, 3, 5)
    assert state.shape == (2, 3, 5)
    assert state.dtype == torch.float32
    assert not state.any()


@pytest.mark.parametrize("max_len", [0, -1, 2.5])
def test_mask_wants_a_positive_length(max_len):
    with pytest.raises(ValueError, match=r"^max_len: expected .*, got "):
        selection_of(KEPT).mask(max_len)


def test_a_wrong_length_does_not_touch_the_state():
    """All is checked before anything is written."""
    arguments = CALLS["score"].arguments()
    arguments["seq_lens"] = ints(20, 21)
    with pytest.raises(ValueError, match=r"seq_lens\[1\]"):
        spk.score_layer_(**arguments, backend="reference")
    assert not arguments["state"].any()
    assert arguments["state"].shape == (BATCH, ROWS, LENGTH)
    assert arguments["query"].shape[-1] == DIM
