"""SpecPrefillConfig: every field checked and named in its error, presets, and an honest budget."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specprefill_kernels import SpecPrefillConfig, select_chunks


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep_ratio", 0.0),
        ("keep_ratio", 1.1),
        ("keep_ratio", None),
        ("keep_ratio", "0.2"),
        ("keep_ratio", float("nan")),
        ("look_ahead", 0),
        ("look_ahead", True),
        ("look_ahead", 8.0),
        ("chunk_size", 0),
        ("keep_tokens", 0),
        ("keep_mass", 0.0),
        ("keep_mass", 2),
        ("pool_kernel_size", 12),
        ("pool_kernel_size", -1),
        ("pool_edge", "same"),
        ("pool_order", "before"),
        ("reduce", "sum"),
        ("rounding", "round"),
        ("queries", "tail"),
        ("normalize_over", "all"),
        ("score_layers", ()),
        ("score_layers", 3),
        ("score_layers", (1, 1)),
        ("score_layers", (1.0,)),
        ("score_layers", "12"),
        ("window", None),
        ("sink", -1),
        ("tail", -1),
        ("min_prompt_tokens", -1),
        ("backend", "gpu"),
        ("observation_rows", 0),
        ("prefill_chunk", 0),
        ("prefill_chunk", "all"),
        ("protect", "system"),
        ("turn_end_tokens", -1),
    ],
)
def test_a_wrong_field_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got "):
        SpecPrefillConfig(**{field: value})


def test_two_budgets_are_refused():
    with pytest.raises(ValueError, match=r"^keep_mass: "):
        SpecPrefillConfig(keep_tokens=100, keep_mass=0.5)


def test_replace_checks_too():
    with pytest.raises(ValueError, match=r"^chunk_size: "):
        SpecPrefillConfig().replace(chunk_size=0)
    with pytest.raises(ValueError, match=r"^chunksize: expected a field"):
        SpecPrefillConfig().replace(chunksize=16)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpecPrefillConfig().keep_ratio = 0.5


def test_presets():
    assert SpecPrefillConfig.preset("paper") == SpecPrefillConfig(protect="none")
    assert SpecPrefillConfig.preset("default").protect == "template"
    assert SpecPrefillConfig.preset("pflash").queries == "observation_window"
    assert SpecPrefillConfig.preset("llama_cpp", keep_ratio=0.5).keep_ratio == 0.5
    with pytest.raises(ValueError, match=r"^name: expected one of"):
        SpecPrefillConfig.preset("papers")


def test_score_layers_becomes_a_tuple():
    assert SpecPrefillConfig(score_layers=[3, -1]).score_layers == (3, -1)


@pytest.mark.parametrize("rounding", ["ceil", "floor"])
@pytest.mark.parametrize(
    "budget", [{"keep_ratio": 0.7}, {"keep_ratio": 0.97}, {"keep_ratio": 1.0}, {"keep_tokens": 70}]
)
def test_keeps_all_agrees_with_the_selection(budget, rounding):
    config = SpecPrefillConfig(chunk_size=8, rounding=rounding, **budget)
    answers = set()
    for seq_len in (1, 7, 8, 9, 63, 64, 65, 70, 71, 72, 73, 80, 81, 400):
        kept = select_chunks(torch.rand(1, seq_len), chunk_size=8, rounding=rounding, **config.budget).num_kept
        assert config.keeps_all(seq_len) == (int(kept) == seq_len), seq_len
        assert config.budget_chunks(seq_len) == -(-int(kept) // 8), seq_len
        answers.add(config.keeps_all(seq_len))
    assert True in answers


def test_keep_mass_is_only_known_after_scoring():
    config = SpecPrefillConfig(keep_mass=1.0)
    assert not config.keeps_all(10)
    assert config.budget_chunks(10) is None
