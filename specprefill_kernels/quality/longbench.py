"""LongBench (Bai et al., ACL 2024, arXiv 2308.14508) from JSONL files that the reader has.

A line has the fields input, context, answers, all_classes, dataset and length. Metrics, answer lengths, the cut in the
middle of a prompt that is too long, and which tasks come without a chat template are LongBench's. The instructions (in
longbench.json) say the same in words of our own: figures compare methods with each other, not with a leaderboard. For
that, hand over LongBench's own `dataset2prompt.json` as `formats`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from specprefill_kernels.loop.prompts import read_prompt
from specprefill_kernels.quality.tasks import Sample

PREFIX = "longbench/"


@dataclass(frozen=True)
class Dataset:
    """How one data set is asked and judged.

    Attributes:
        prompt: with {context} and {input}.
        metric: a name in `metrics.METRICS`.
        max_new_tokens: LongBench's limit.
        chat: with a chat template. Few-shot and code tasks do better as plain text, and LongBench runs them so.
        first_line: only the answer's first line counts.
    """

    prompt: str
    metric: str
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False


def _datasets() -> Mapping[str, Dataset]:
    table = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return MappingProxyType({name: Dataset(**values) for name, values in table.items()})


DATASETS = _datasets()


@dataclass(frozen=True)
class LongBenchSample(Sample):
    """A LongBench prompt.

    Attributes:
        classes: all labels of a classification.
        chat: whether a chat template goes around the prompt.
        note: how the prompt was cut, if it was.
        first_line: only the answer's first line is judged.
    """

    classes: tuple[str, ...] = ()
    chat: bool = True
    note: str = ""
    first_line: bool = False

    def judged(self, answer: str) -> str:
        """The part of an answer that counts."""
        return answer.lstrip("\n").split("\n")[0] if self.first_line else answer


def read_longbench(
    path: Path, formats: Mapping[str, str] | None = None, most: int | None = None
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(task, line number from 0, fields) of the first `most` prompts of a file, checked.

    Raises:
        ValueError: a line is not LongBench's; the message names file and line.
    """
    with path.open(encoding="utf-8") as file:
        found = 0
        for number, line in enumerate(file):
            if found == most:
                return
            if not line.strip():
                continue
            found += 1
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number + 1}: expected a JSON object, got {error}") from None
            name = _checked(fields, f"{path}, line {number + 1}", formats)
            yield PREFIX + name, number, fields


def longbench_sample(
    task: str,
    number: int,
    fields: Mapping[str, Any],
    tokenizer: Any,
    limit: int | None,
    formats: Mapping[str, str] | None = None,
) -> LongBenchSample:
    """One prompt.

    Args:
        task, number, fields: as `read_longbench` gives them; `number` becomes the sample's seed.
        tokenizer: the base's.
        limit: tokens that a prompt may have, its chat template not counted. A longer one loses its middle: the first
            and the last limit // 2 tokens stay, because instruction and question stand at the ends. None cuts nothing.
        formats: data set -> prompt with {context} and {input}, instead of ours.
    """
    name = task.removeprefix(PREFIX)
    dataset = DATASETS[name]
    form = (formats or {}).get(name, dataset.prompt)
    # Not str.format: braces in a format's own text, and in code, are what they are.
    before, _, rest = form.partition("{context}")
    middle, asked, after = rest.partition("{input}")
    prompt = before + fields["context"] + middle + (fields["input"] if asked else "") + after
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    note = ""
    if limit is not None and len(ids) > limit:
        half = limit // 2
        note = f"cut in the middle: {len(ids)} tokens, {2 * half} of them stay"
        first, last = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[len(ids) - half :])
        )
        prompt = first + last
    count = len(ids) if not note else len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return LongBenchSample(
        task=task,
        seed=number,
        prompt=prompt,
        answers=tuple(fields["answers"]),
        evidence=(),
        metric=dataset.metric,
        max_new_tokens=dataset.max_new_tokens,
        context_tokens=len(ids),
        prompt_tokens=count,
        classes=tuple(fields["all_classes"] or ()),
        chat=dataset.chat,
        note=note,
        first_line=dataset.first_line,
    )


def prompt_limit(task: str, room: int | None, tokenizer: Any, look_ahead: int) -> int | None:
    """Tokens that a prompt may have beside its template, its answer and the look-ahead, in a context of `room` tokens.

    Raises:
        ValueError: nothing is left.
    """
    if room is None:
        return None
    dataset = DATASETS[task.removeprefix(PREFIX)]
    template = 0
    if dataset.chat and getattr(tokenizer, "chat_template", None):
        template = read_prompt([{"role": "user", "content": ""}], tokenizer).input_ids.shape[1]
    limit = room - template - max(dataset.max_new_tokens, look_ahead)
    if limit < 2:
        raise ValueError(f"{task}: expected a context with room for a prompt, got one of {room} tokens")
    return limit


def read_formats(path: Path) -> dict[str, str]:
    """LongBench's `dataset2prompt.json`: data set -> prompt with {context} and {input}.

    Raises:
        ValueError: it is something else.
    """
    try:
        formats = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(formats, dict) or not all("{context}" in str(form) for form in formats.values()):
        raise ValueError(f"{path}: expected an object of prompts with {{context}}, got something else")
    return formats


def _checked(fields: Any, where: str, formats: Mapping[str, str] | None) -> str:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(fields).__name__}")
    for name, kind in (("input", str), ("context", str), ("answers", list), ("dataset", str)):
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"{where}: expected {name} as a {kind.__name__}, got {fields.get(name)!r:.60}")
    fields.setdefault("all_classes", None)
    # LongBench-E's files end in _e and name the same data sets.
    name = fields["dataset"].removesuffix("_e")
    if name not in DATASETS:
        raise ValueError(f"{where}: dataset: expected one of {sorted(DATASETS)}, got {fields['dataset']!r}")
    if not fields["answers"]:
        raise ValueError(f"{where}: expected at least one answer, got none")
    if formats is not None and name not in formats:
        raise ValueError(f"{where}: expected a prompt format for {name} among those given, got none")
    if DATASETS[name].metric == "classification" and not fields["all_classes"]:
        raise ValueError(f"{where}: expected all_classes for {name}, got none")
    return name
