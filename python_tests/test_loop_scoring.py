"""Scoring what was captured: each layer alone, and many settings on one capture."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loop_models import build, prompt

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop.scoring import NothingToScore, score_captured
from specprefill_kernels.loop.speculator import Speculator

BOTH = SpecPrefillConfig(queries="both", observation_rows=12)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("pool_order", ["before_max", "after_max"])
@pytest.mark.parametrize("queries", ["look_ahead", "observation_window", "both"])
def test_each_layer_alone_and_the_same_total(family, pool_order, queries):
    model, ids = build(family), prompt()
    config = SpecPrefillConfig(queries=queries, pool_order=pool_order)
    captured = Speculator(model, config).capture(ids)
    plain, detailed = score_captured(captured, config), score_captured(captured, config, per_layer=True)
    assert plain.layer_importance is None
    assert torch.equal(detailed.importance, plain.importance)
    assert detailed.layer_importance.shape == (4, ids.shape[1])
    for index, layer in enumerate(detailed.layers):
        alone = Speculator(model, config.replace(score_layers=(layer,))).score(ids)
        assert torch.equal(detailed.layer_importance[index], alone.importance)
    assert detailed.layer_importance.unique(dim=0).shape[0] == 4
    # The total is no maximum of these: the maximum over layers is taken row by row, before the rows are averaged.
    assert (detailed.importance >= detailed.layer_importance.amax(0) - 1e-7).all()


def test_per_layer_through_the_speculator():
    model, ids = build("llama"), prompt()
    speculation = Speculator(model, SpecPrefillConfig(score_layers=(3, 1))).score(ids, per_layer=True)
    assert speculation.layers == (1, 3)
    assert torch.equal(
        speculation.layer_importance[1], Speculator(model, SpecPrefillConfig(score_layers=(-1,))).score(ids).importance
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"queries": "look_ahead"},
        {"queries": "look_ahead", "look_ahead": 3, "reduce": "max"},
        {"queries": "look_ahead", "look_ahead": 3, "normalize_over": "visible"},
        {"queries": "look_ahead", "look_ahead": 1},
        {"queries": "observation_window", "look_ahead": 12, "pool_kernel_size": 5},
        {"queries": "observation_window", "look_ahead": 2, "pool_order": "after_max"},
        {"queries": "both", "observation_rows": 5, "look_ahead": 2},
        {"queries": "both", "score_layers": (1, -1)},
        {"window": "skip"},
    ],
    ids=lambda changes: "-".join(f"{value}" for value in changes.values()),
)
def test_one_capture_serves_many_settings(changes):
    """Exactly what a speculator with these settings gives: the rows of one forward are the rows of another."""
    model, ids = build("gemma2"), prompt()
    captured = Speculator(model, BOTH).capture(ids)
    config = BOTH.replace(**changes)
    ours, fresh = score_captured(captured, config), Speculator(model, config).score(ids)
    torch.testing.assert_close(ours.importance, fresh.importance, atol=1e-7, rtol=1e-5)
    for name in ("num_look_ahead", "layers", "look_ahead_tokens", "backend"):
        assert getattr(ours, name) == getattr(fresh, name)


def test_the_layers_argument_is_before_the_configs():
    captured = Speculator(build("llama"), BOTH).capture(prompt())
    by_argument = score_captured(captured, BOTH.replace(score_layers=(0,)), layers=(2, -1))
    assert by_argument.layers == (2, 3)
    assert torch.equal(by_argument.importance, score_captured(captured, BOTH.replace(score_layers=(2, 3))).importance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation_rows": 13}, "observation_rows: expected at most 12, the prompt rows captured, got 13"),
        ({"queries": "observation_window", "look_ahead": 13}, "look_ahead: expected at most 12"),
        ({"look_ahead": 9}, "look_ahead: expected at most 8, the rows captured, got 9"),
        ({"score_layers": (4,)}, r"score_layers: expected indices in \[-4, 4\), got 4"),
    ],
)
def test_what_was_not_captured_is_refused(changes, message):
    captured = Speculator(build("llama"), BOTH).capture(prompt())
    with pytest.raises(ValueError, match=message):
        score_captured(captured, BOTH.replace(**changes))


def test_layers_that_were_not_captured_are_refused():
    captured = Speculator(build("llama"), BOTH.replace(score_layers=(1, 2))).capture(prompt())
    with pytest.raises(ValueError, match=r"layers: expected some of the captured layers \[1, 2\], got \[3\]"):
        score_captured(captured, BOTH, layers=(2, 3))
    with pytest.raises(ValueError, match="layers: expected some of the captured layers"):
        score_captured(captured, BOTH, layers=())


def test_nothing_captured_says_so():
    captured = Speculator(build("llama"), BOTH).capture(prompt())
    with pytest.raises(NothingToScore, match="never called"):
        score_captured(dataclasses.replace(captured, layers={}), BOTH)
