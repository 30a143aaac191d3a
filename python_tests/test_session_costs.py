"""What a session's turns cost is not what single prompts cost."""

from __future__ import annotations

from loop_models import PROMPT, build, config, prompt

from specprefill_kernels.loop import Session, SpecPrefill
from specprefill_kernels.loop.costs import CostModel, PrefillCost, identity_of

BASE = build("llama", seed=7)


def continuing_loop(keep_ratio=None, **changes):
    settings = config(keep_ratio=keep_ratio, **changes)
    costs = CostModel(
        base=PrefillCost(per_token=1.0),
        lower=PrefillCost(per_token=0.4),
        upper=PrefillCost(per_token=0.6),
        identity=identity_of(BASE, None, settings.replace(queries="observation_window"), (0, 1)),
    )
    return SpecPrefill(BASE, None, settings, self_layers=(0, 1), costs=costs)


def test_a_session_with_self_layers_starts_the_base_again_and_predicts_that():
    sp = continuing_loop(0.7)  # 0.4 + 0.7 * 0.6 of a full prefill where the base goes on, 0.4 + 0.7 where it does not
    alone = sp.generate(prompt(), 1)
    assert alone.mode == "sparse"
    turn = Session(sp).generate(prompt(), 1)
    assert turn.mode == "dense"
    assert "would not pay" in turn.reason
    kept = alone.selection.prediction.kept_tokens
    assert turn.selection.prediction.stages["base_prefill"] == kept
    assert turn.selection.prediction.sparse > PROMPT


def test_it_is_sparse_where_even_so_it_pays():
    turn = Session(continuing_loop(0.3)).generate(prompt(), 1)
    assert turn.mode == "sparse"
    assert not turn.selection.prediction.continues


def test_a_sessions_prediction_after_scoring_is_of_a_base_that_starts_again():
    """What keep_mass keeps is known after scoring: the prediction is made again, for the same way to go on."""
    turn = Session(continuing_loop(keep_mass=0.3)).generate(prompt(), 1)
    prediction = turn.selection.prediction
    assert turn.mode == "sparse"
    assert prediction.kept_tokens == turn.kept_tokens > 16  # more than the one chunk that it began with
    assert not prediction.continues
    assert prediction.stages["base_prefill"] == turn.kept_tokens


def test_the_seconds_of_a_turns_selection_hold_the_look_at_the_cache():
    turn = Session(SpecPrefill(BASE, build("llama", seed=3), config())).generate(prompt(), 1)
    assert turn.selection.seconds["select"] == turn.seconds["select"] > 0
