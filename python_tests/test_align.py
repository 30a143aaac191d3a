"""Importance crosses from one tokenizer to another through characters."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specprefill_kernels.loop.align import project_importance

# Characters of one to four UTF-8 bytes, a combining mark, a joined emoji, CRLF and runs of spaces.
TEXT = st.text(
    alphabet=st.sampled_from(list("ab .,\n\r\t") + list("éßçñ") + list("語本の€") + list("😀🧑‍🚀\u0301")),
    min_size=0,
    max_size=60,
)


def oracle(importance: list[float], spec: list[tuple[int, int]], base: list[tuple[int, int]]) -> list[float]:
    """Token by token, character by character; shares no idea with the code under test."""
    out = []
    for start, end in base:
        best = []
        for value, (s, e) in zip(importance, spec, strict=True):
            covered = any(s <= char < e for char in range(start, end))
            touched = start == end and s <= start <= e
            if covered or touched:
                best.append(value)
        out.append(max(best, default=0.0))
    return out


def check(importance: list[float], spec: list[tuple[int, int]], base: list[tuple[int, int]]) -> torch.Tensor:
    tensor = torch.tensor(importance, dtype=torch.float32)
    got = project_importance(tensor, spec, base)
    assert got.shape == (len(base),)
    assert got.dtype == tensor.dtype
    assert got.tolist() == oracle(tensor.tolist(), spec, base)
    return got


spans = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=25
)


@settings(max_examples=300, deadline=None)
@given(spec=spans, base=spans, seed=st.integers(0, 2**31))
def test_any_spans_match_the_oracle(spec: list[tuple[int, int]], base: list[tuple[int, int]], seed: int) -> None:
    rng = random.Random(seed)
    check([rng.choice([0.0, rng.random(), -rng.random()]) for _ in spec], spec, base)


def segment(text: str, rng: random.Random) -> list[tuple[int, int]]:
    """Cuts the UTF-8 bytes at random; reports characters as byte-level tokenizers do: pieces of one share its span."""
    byte_to_char = [index for index, char in enumerate(text) for _ in char.encode()]
    cuts = sorted({0, len(byte_to_char), *(rng.randrange(len(byte_to_char) + 1) for _ in range(len(text)))})
    return [(byte_to_char[a], byte_to_char[b - 1] + 1) for a, b in itertools.pairwise(cuts)]


@settings(max_examples=300, deadline=None)
@given(text=TEXT, seed=st.integers(0, 2**31))
def test_random_byte_segmentations_of_multi_byte_text(text: str, seed: int) -> None:
    rng = random.Random(seed)
    spec, base = segment(text, rng), segment(text, rng)
    importance = [rng.random() for _ in spec]
    got = check(importance, spec, base)
    if spec:
        # Both cover the whole text, so the most important token is always seen and no base token is left at 0.
        assert got.max().item() == torch.tensor(importance).max().item()
        assert bool((got > 0).all())


def train_tokenizer(corpus: list[str], size: int, kind: str):
    tokenizers = pytest.importorskip("tokenizers")
    if kind == "byte":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
        )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers_pair():
    corpus = ["the quick brown fox jumps over the lazy dog, and the naïve café owner says 日本語 の本"] * 20
    return train_tokenizer(corpus, 300, "byte"), train_tokenizer(corpus, 330, "fallback")


@settings(max_examples=150, deadline=None)
@given(text=TEXT, seed=st.integers(0, 2**31), swap=st.booleans())
def test_real_tokenizers_on_multi_byte_text(tokenizers_pair, text: str, seed: int, swap: bool) -> None:
    spec, base = (tokenizer.encode(text).offsets for tokenizer in (reversed if swap else iter)(tokenizers_pair))
    rng = random.Random(seed)
    check([rng.random() for _ in spec], spec, base)


def test_same_tokenizer_is_the_identity() -> None:
    offsets = [(0, 3), (3, 4), (4, 9)]
    assert check([0.3, 0.1, 0.2], offsets, offsets).tolist() == pytest.approx([0.3, 0.1, 0.2])


def test_the_largest_wins_and_never_the_mean() -> None:
    assert check([0.0, 0.75, 0.25], [(0, 5), (5, 6), (6, 12)], [(0, 12)]).tolist() == [0.75]


def test_pieces_of_one_emoji_all_reach_the_token_that_holds_it() -> None:
    spec = [(0, 1)] * 4 + [(1, 3)]
    assert check([0.0, 0.0, 0.5, 0.25, 0.125], spec, [(0, 1), (1, 3), (0, 3)]).tolist() == [0.5, 0.125, 0.5]


def test_characters_no_speculator_token_covers_score_zero() -> None:
    assert check([0.5, 0.25], [(1, 3), (5, 6)], [(0, 1), (3, 5), (2, 4), (7, 9)]).tolist() == [0.0, 0.0, 0.5, 0.0]


def test_special_tokens_with_empty_spans_take_their_neighbours_importance() -> None:
    spec = [(0, 0), (0, 4), (4, 8)]
    assert check([0.875, 0.25, 0.5], spec, [(0, 0), (0, 4), (4, 4), (8, 8), (8, 9)]).tolist() == [
        0.875,
        0.25,
        0.5,
        0.5,
        0.0,
    ]


def test_nothing_in_nothing_out() -> None:
    assert project_importance(torch.zeros(0), [], []).tolist() == []
    assert project_importance(torch.zeros(0), [], [(0, 2), (2, 2)]).tolist() == [0.0, 0.0]
    assert project_importance(torch.ones(1), [(0, 2)], []).tolist() == []


def test_offsets_may_be_tensors_and_dtype_is_kept() -> None:
    importance = torch.tensor([0.5, 0.25], dtype=torch.float64)
    got = project_importance(
        importance, torch.tensor([[0, 2], [2, 4]]), torch.tensor([[0, 1], [1, 4]], dtype=torch.int32)
    )
    assert got.dtype == torch.float64
    assert got.tolist() == [0.5, 0.5]


def test_a_long_document_is_fast_enough_to_be_vectorised() -> None:
    rng = random.Random(0)
    text = "ab cé 語" * 20_000
    spec, base = segment(text, rng), segment(text, rng)
    got = project_importance(torch.rand(len(spec)), spec, base)  # an O(Ts * Tb) form would take about an hour
    assert got.numel() == len(base) > 50_000


@pytest.mark.parametrize(
    ("importance", "spec", "base", "message"),
    [
        (torch.zeros(2), [(0, 1)], [(0, 1)], r"spec_offsets: expected one span for each of the 2 .* got 1"),
        (torch.zeros(1, 1), [(0, 1)], [(0, 1)], r"importance_spec: .* got .* shape \[1, 1\]"),
        (torch.zeros(1, dtype=torch.int64), [(0, 1)], [(0, 1)], r"importance_spec: .* got torch.int64"),
        (torch.zeros(1), [(0, 1)], [(2, 1)], r"base_offsets: expected 0 <= start <= end, got \(2, 1\) at token 0"),
        (torch.zeros(1), [(-1, 1)], [(0, 1)], r"spec_offsets: .* got \(-1, 1\)"),
        (torch.zeros(1), [(0, 1, 2)], [(0, 1)], r"spec_offsets: expected pairs"),
        (torch.zeros(1), [(0, 1)], [(0, 1), (1,)], r"base_offsets: expected pairs"),
    ],
)
def test_bad_input_names_the_argument(importance: torch.Tensor, spec, base, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project_importance(importance, spec, base)


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match="importance_spec: expected a tensor, got list"):
        project_importance([0.0], [(0, 1)], [(0, 1)])  # type: ignore[arg-type]


def test_file_stands_alone() -> None:
    """No model, no compiled module: anyone with offsets can use this file by itself."""
    path = Path(sys.modules[project_importance.__module__].__file__ or "")
    spec = importlib.util.spec_from_file_location("align_alone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.project_importance(torch.ones(1), [(0, 1)], [(0, 1)]).tolist() == [1.0]
