"""Metrics against values worked out by hand, LongBench's oddities included."""

from __future__ import annotations

import sys

import pytest

from specprefill_kernels.quality import metrics
from specprefill_kernels.quality.metrics import METRICS, normalize, score


def test_contains_all_needs_each_and_contains_any_one() -> None:
    assert score("contains_all", "They are 10, 20 and 30.", ["10", "20", "30"]) == 1
    assert score("contains_all", "They are 10 and 30.", ["10", "20", "30"]) == 0
    assert score("contains_any", "It is 20.", ["10", "20"]) == 1
    assert score("contains_any", "It is 40.", ["10", "20"]) == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("29574", 1),
        ("29574.", 1),
        ("code:29574,", 1),
        ("129574", 0),
        ("295741", 0),
        ("2957", 0),
        ("29574a", 0),
        ("", 0),
    ],
)
def test_contains_takes_whole_words_only(answer: str, expected: int) -> None:
    assert score("contains_all", answer, ["29574"]) == expected


def test_contains_ignores_case_and_takes_the_text_literally() -> None:
    assert score("contains_any", "in Lower Case", ["lower case"]) == 1
    assert score("contains_any", "a+b", ["a+b"]) == 1
    assert score("contains_any", "aab", ["a+b"]) == 0


def test_normalization_is_squads() -> None:
    assert normalize("The  quick, an Apple's\tA-b!") == "quick apples ab"
    assert score("exact", "The Cat.", ["cat"]) == 1
    assert score("exact", "The Cats.", ["cat"]) == 0


def test_f1_of_tokens() -> None:
    # Normalized: "cat sat on mat" and "cat on red mat": 3 shared of 4 and 4.
    assert score("qa_f1", "The cat sat on the mat.", ["a cat on a red mat"]) == pytest.approx(0.75)
    # Bags: "red red" against "red": precision 1/2, recall 1.
    assert score("f1", "red red", ["red"]) == pytest.approx(2 / 3)
    assert score("f1", "blue", ["red"]) == 0
    assert score("f1", "", ["red"]) == 0
    assert score("qa_f1", "red", ["blue", "red"]) == 1  # the best answer counts


def test_rouge_l_is_that_of_the_package() -> None:
    pytest.importorskip("rouge")
    # LCS "police the gunman": 3 of 4 words on either side.
    assert score("rouge_l", "police kill the gunman", ["police killed the gunman"]) == pytest.approx(0.75, abs=1e-6)
    # Words count once each: "a a a b" are two words, the LCS with "a b" is both of them.
    assert score("rouge_l", "a a a b", ["a b"]) == pytest.approx(1, abs=1e-6)
    assert score("rouge_l", "", ["a b"]) == 0
    assert score("rouge_l", "...", ["a b"]) == 0


def test_rouge_l_of_one_very_long_sentence_is_no_zero() -> None:
    """The package's recursion would exceed Python's limit, which LongBench takes for a score of 0."""
    pytest.importorskip("rouge")
    limit = sys.getrecursionlimit()
    words = " ".join(f"w{i}" for i in range(600))
    assert score("rouge_l", words, [words + " " + words.replace("w", "v")]) == pytest.approx(2 / 3, abs=1e-6)
    assert sys.getrecursionlimit() == limit


def test_classification_divides_by_the_labels_named() -> None:
    labels = ["Food", "Animal", "Sport", "Number of something", "Number"]
    assert score("classification", "Animal", ["Animal"], labels) == 1
    assert score("classification", "Animal or Sport", ["Animal"], labels) == 0.5
    assert score("classification", "Sport", ["Animal"], labels) == 0
    # A label inside the right one does not count against it.
    assert score("classification", "Number of something", ["Number of something"], labels) == 1
    with pytest.raises(ValueError, match="classes: expected all labels"):
        score("classification", "Animal", ["Animal"])


def test_classification_skips_the_label_after_one_it_removed() -> None:
    """LongBench shortens the list while it walks it: of two labels inside the right one, the second stays."""
    assert score("classification", "ab abc abcd", ["abcd"], ["ab", "abc", "abcd"]) == 0.5


def test_code_similarity_takes_the_first_line_that_is_code() -> None:
    # "return a" and "return b": 14 of 16 characters are common, 87.5 in whole percents is 88.
    assert score("code_similarity", "\n```python\n# note\nreturn a\nx = 1", ["return b"]) == pytest.approx(0.88)
    assert score("code_similarity", "return b", ["return b"]) == 1
    assert score("code_similarity", "# only a comment", ["return b"]) == 0


def test_edit_similarity_ignores_space_around_the_line() -> None:
    assert score("edit_similarity", "\n\n    return b\nmore", ["    return b"]) == 1
    assert score("edit_similarity", "return a", ["return b"]) == pytest.approx(0.875)
    assert score("edit_similarity", "", ["return b"]) == 0


@pytest.mark.parametrize(
    ("first", "second"), [("", ""), ("", "ab"), ("kitten", "sitting"), ("aXbXc", "abc"), ("ab", "ba")]
)
def test_the_fuzzy_ratio_is_the_same_with_and_without_rapidfuzz(first: str, second: str, monkeypatch) -> None:
    fuzz = pytest.importorskip("rapidfuzz.fuzz")
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    assert metrics._ratio(first, second) == pytest.approx(fuzz.ratio(first, second) / 100)


def test_retrieval_and_count_divide_by_the_numbers_written() -> None:
    assert score("retrieval", "Paragraph 12", ["Paragraph 12"]) == 1
    assert score("retrieval", "Paragraph 12 or 3", ["Paragraph 12"]) == 0.5
    assert score("retrieval", "Paragraph 1", ["Paragraph 12"]) == 0
    assert score("retrieval", "none", ["Paragraph 12"]) == 0
    assert score("retrieval_zh", "\u6bb5\u843d7", ["\u6bb5\u843d7"]) == 1
    assert score("count", "7 of 7, or 8", ["7"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="expected a paragraph's number"):
        score("retrieval", "1", ["no number"])


def test_chinese_metrics_name_the_package_they_need(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match="pip install jieba"):
        score("qa_f1_zh", "x", ["y"])
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(ImportError, match="specprefill-kernels"):
        score("rouge_l", "x", ["y"])


def test_chinese_f1_counts_words_without_punctuation(monkeypatch) -> None:
    """With a stand-in that cuts at spaces: stops and brackets of either script are no words."""
    cut = type("jieba", (), {"cut": staticmethod(lambda text, cut_all: text.split())})
    monkeypatch.setitem(sys.modules, "jieba", cut)
    assert score("qa_f1_zh", "\u5317\u4eac \uff0c \u300c A \u300d \u3002 !", ["\u5317\u4eac b"]) == pytest.approx(0.5)


def test_unknown_metrics_and_missing_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="metric: expected one of"):
        score("bleu", "x", ["y"])
    with pytest.raises(ValueError, match="right: expected at least one"):
        score("f1", "x", [])
    assert {"contains_all", "contains_any", "edit_similarity", "f1"} <= METRICS.keys()
