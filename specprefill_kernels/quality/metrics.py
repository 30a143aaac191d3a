"""Scores in [0, 1] of one answer against the right ones.

The metrics named after LongBench (Bai et al., ACL 2024, arXiv 2308.14508) compute what its own evaluation computes,
oddities included, so that figures are comparable: the oddities are named where they are. Where an answer may be any of
several, the best counts. ROUGE-L comes from the package `rouge` and the fuzzy ratio from `rapidfuzz` (the extra
`eval`); Chinese texts also need `jieba`. All are imported when first needed.
"""

from __future__ import annotations

import importlib
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

# Punctuation that Chinese texts use beside ASCII's, as LongBench lists it.
_CHINESE = (
    "\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027\u3001-\u3003\u300b-\u3011\u3014-\u301f"
    "\u3030\u303e\u303f\ufe4f\uff01-\uff0d\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff64"
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION_ZH = re.compile(f"[{re.escape(string.punctuation)}{_CHINESE}]")

Metric = Callable[[str, str, Sequence[str]], float]


def score(metric: str, answer: str, right: Sequence[str], classes: Sequence[str] = ()) -> float:
    """How good `answer` is, in [0, 1].

    Args:
        metric: a name in `METRICS`.
        answer: what the model wrote.
        right: what it should have written: all of them for "contains_all", else any of them.
        classes: all labels, for "classification".

    Raises:
        ValueError: an unknown metric, or no right answer.
        ImportError: the metric's package is not installed; the message names it.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {sorted(METRICS)}, got {metric!r}")
    if not right:
        raise ValueError("right: expected at least one right answer, got none")
    parts = [METRICS[metric](answer, one, classes) for one in right]
    return float(min(parts) if metric == "contains_all" else max(parts))


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces: SQuAD's and LongBench's normalization."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(answer: Sequence[str], right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over two bags of tokens; 0 where they share none."""
    shared = sum((Counter(answer) & Counter(right)).values())
    return 2 * shared / (len(answer) + len(right)) if shared else 0.0


def _contains(answer: str, right: str, _: Sequence[str]) -> float:
    """The right string stands in the answer, whatever the case, and not inside a longer word or number."""
    pattern = rf"(?<!\w){re.escape(right.strip())}(?!\w)"
    return float(re.search(pattern, answer, re.IGNORECASE) is not None)


def _exact(answer: str, right: str, _: Sequence[str]) -> float:
    return float(normalize(answer) == normalize(right))


def _qa_f1(answer: str, right: str, _: Sequence[str]) -> float:
    return token_f1(normalize(answer).split(), normalize(right).split())


def _qa_f1_zh(answer: str, right: str, _: Sequence[str]) -> float:
    def words(text: str) -> list[str]:
        cut = ("".join(_PUNCTUATION_ZH.sub("", word.lower()).split()) for word in _cut_chinese(text))
        return [word for word in cut if word]

    return token_f1(words(answer), words(right))


def _rouge_l(answer: str, right: str, _: Sequence[str]) -> float:
    """The package's summary-level ROUGE-L F1: sentences end at full stops, and words count once each."""
    if not _sentences(answer) or not _sentences(right):
        return 0.0  # the package raises
    package = _package("rouge", 'pip install "specprefill-kernels[eval]"')
    # It walks back through the table by recursion, a call for each word of two sentences. LongBench scores a long
    # sentence 0 when that exceeds Python's limit; here the limit gives way.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, limit + len(answer.split()) + len(right.split())))
    try:
        return float(package.Rouge(metrics=["rouge-l"]).get_scores([answer], [right], avg=True)["rouge-l"]["f"])
    finally:
        sys.setrecursionlimit(limit)


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in text.split(".") if sentence]


def _rouge_l_zh(answer: str, right: str, classes: Sequence[str]) -> float:
    return _rouge_l(" ".join(_cut_chinese(answer)), " ".join(_cut_chinese(right)), classes)


def _classification(answer: str, right: str, classes: Sequence[str]) -> float:
    """1 over the number of labels named, if the right one is among them.

    As in LongBench: a label inside the right label does not count against it, but the list is shortened while it is
    walked through, so of two such labels in a row the second stays.
    """
    if not classes:
        raise ValueError("classes: expected all labels for the metric classification, got none")
    named = [label for label in classes if label in answer]
    for label in named:
        if label in right and label != right:
            named.remove(label)
    return 1.0 / len(named) if right in named else 0.0


def _code_similarity(answer: str, right: str, _: Sequence[str]) -> float:
    """Fuzzy ratio of the answer's first line that is neither a comment nor a code fence, in whole percents."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not ("`" in line or "#" in line or "//" in line)), "")
    return round(100 * _ratio(line, right)) / 100


def _edit_similarity(answer: str, right: str, _: Sequence[str]) -> float:
    """Fuzzy ratio of the first line that is not blank, spaces around it left out."""
    line = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    return _ratio(line, right.strip())


def _ratio(first: str, second: str) -> float:
    """1 - (insertions + deletions) / (both lengths): what python-Levenshtein and rapidfuzz call ratio."""
    try:
        from rapidfuzz import fuzz
    except ImportError:
        # The same number from the longest common subsequence; slow for long texts, and these are lines.
        total = len(first) + len(second)
        return 2 * _common_subsequence(first, second) / total if total else 1.0
    return fuzz.ratio(first, second) / 100


def _common_subsequence(first: str, second: str) -> int:
    row = [0] * (len(second) + 1)
    for a in first:
        diagonal = 0
        for j, b in enumerate(second, 1):
            above = row[j]
            row[j] = diagonal + 1 if a == b else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def _retrieval(answer: str, right: str, _: Sequence[str]) -> float:
    return _share_of_numbers(answer, _paragraph(r"Paragraph (\d+)", right))


def _retrieval_zh(answer: str, right: str, _: Sequence[str]) -> float:
    return _share_of_numbers(answer, _paragraph("\u6bb5\u843d(\\d+)", right))


def _count(answer: str, right: str, _: Sequence[str]) -> float:
    return _share_of_numbers(answer, right)


def _paragraph(pattern: str, right: str) -> str:
    found = re.search(pattern, right)
    if found is None:
        raise ValueError(f"right: expected a paragraph's number like {pattern!r}, got {right!r}")
    return found[1]


def _share_of_numbers(answer: str, right: str) -> float:
    """The part of the answer's numbers that are the right one, digit for digit."""
    numbers = re.findall(r"\d+", answer)
    return sum(number == right for number in numbers) / len(numbers) if numbers else 0.0


def _cut_chinese(text: str) -> list[str]:
    package = _package("jieba", "pip install jieba")
    return list(package.cut(text, cut_all=False))


def _package(name: str, how: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this metric needs the package {name}: {how}") from error


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "contains_all": _contains,
        "contains_any": _contains,
        "exact": _exact,
        "f1": _qa_f1,
        "edit_similarity": _edit_similarity,
        # LongBench's
        "qa_f1": _qa_f1,
        "qa_f1_zh": _qa_f1_zh,
        "rouge_l": _rouge_l,
        "rouge_l_zh": _rouge_l_zh,
        "classification": _classification,
        "code_similarity": _code_similarity,
        "retrieval": _retrieval,
        "retrieval_zh": _retrieval_zh,
        "count": _count,
    }
)
