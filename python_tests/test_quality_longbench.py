"""LongBench from JSONL files written here: prompts, metrics, the cut in the middle, lines that are not LongBench's."""

from __future__ import annotations

import json

import pytest
from loop_models import byte_tokenizer

from specprefill_kernels.quality.longbench import (
    DATASETS,
    longbench_sample,
    prompt_limit,
    read_formats,
    read_longbench,
)
from specprefill_kernels.quality.metrics import METRICS, score

LINE = {
    "input": "Who?", "context": "Long {text} of a story.", "answers": ["Ann", "Bob"], "all_classes": None,
    "dataset": "hotpotqa", "length": 5, "language": "en", "_id": "1",
}  # fmt: skip


def write(path, *lines) -> object:
    path.write_text(
        "".join(json.dumps({**LINE, **line}, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    return path


def one(path, limit=None, formats=None):
    (task, number, fields), *_ = read_longbench(path, formats)
    return longbench_sample(task, number, fields, byte_tokenizer(), limit, formats)


def test_every_data_set_has_a_prompt_and_a_known_metric() -> None:
    assert len(DATASETS) == 21
    for name, dataset in DATASETS.items():
        assert dataset.metric in METRICS, name
        assert dataset.prompt.count("{context}") == 1, name
        assert dataset.prompt.count("{input}") == (name not in SUMMARIES), name
        assert dataset.prompt.find("{context}") < dataset.prompt.find("{input}") or name in SUMMARIES
    plain = {name for name, dataset in DATASETS.items() if not dataset.chat}
    assert plain == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {n for n, d in DATASETS.items() if d.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    assert {n: d.max_new_tokens for n, d in DATASETS.items() if d.max_new_tokens > 128} == dict.fromkeys(LONG, 512)


SUMMARIES = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
LONG = ("gov_report", "qmsum", "multi_news", "vcsum")


def test_a_line_becomes_a_prompt_with_context_and_question(tmp_path) -> None:
    sample = one(write(tmp_path / "a.jsonl", {}))
    assert sample.task == "longbench/hotpotqa"
    assert sample.prompt.count("Long {text} of a story.") == 1  # braces in a text are no placeholders
    assert sample.prompt.endswith("Question: Who?\nAnswer:")
    assert (sample.metric, sample.max_new_tokens, sample.answers) == ("qa_f1", 32, ("Ann", "Bob"))
    assert (sample.chat, sample.note, sample.evidence) == (True, "", ())
    assert sample.prompt_tokens == sample.context_tokens == len(sample.prompt)
    assert score(sample.metric, "bob", sample.answers) == 1


def test_a_context_that_names_a_placeholder_is_left_alone(tmp_path) -> None:
    sample = one(
        write(tmp_path / "a.jsonl", {"context": "def f(): return '{input} {context}'", "dataset": "repobench-p"})
    )
    assert "return '{input} {context}'Who?Next line" in sample.prompt
    assert not sample.chat


def test_classes_and_first_lines_are_judged_as_longbench_does(tmp_path) -> None:
    sample = one(
        write(tmp_path / "a.jsonl", {"dataset": "trec", "all_classes": ["Food", "Sport"], "answers": ["Food"]})
    )
    assert sample.classes == ("Food", "Sport")
    assert sample.judged("\nFood\nSport") == "Food"
    assert score(sample.metric, sample.judged("\nFood\nSport"), sample.answers, sample.classes) == 1
    assert one(write(tmp_path / "b.jsonl", {})).judged("\na\nb") == "\na\nb"


def test_a_long_prompt_loses_its_middle_and_says_so(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", {"context": "x" * 500 + "MIDDLE" + "y" * 500})
    whole, cut = one(path), one(path, limit=301)
    assert cut.prompt == whole.prompt[:150] + whole.prompt[-150:]  # a token is a character here
    assert cut.note == f"cut in the middle: {len(whole.prompt)} tokens, 300 of them stay"
    assert (cut.prompt_tokens, cut.context_tokens) == (300, len(whole.prompt))
    assert one(path, limit=len(whole.prompt)).note == ""
    assert one(path, limit=len(whole.prompt) - 1).note


def test_the_limit_leaves_room_for_template_answer_and_look_ahead() -> None:
    tokenizer = byte_tokenizer()
    template = len("user\n") + len("\n") + len("assistant\n") + 3  # and three markers
    assert prompt_limit("longbench/hotpotqa", 1000, tokenizer, 8) == 1000 - template - 32
    assert prompt_limit("longbench/hotpotqa", 1000, tokenizer, 50) == 1000 - template - 50
    assert prompt_limit("longbench/lcc", 1000, tokenizer, 8) == 1000 - 64
    assert prompt_limit("longbench/lcc", None, tokenizer, 8) is None
    with pytest.raises(ValueError, match="longbench/lcc: expected a context with room"):
        prompt_limit("longbench/lcc", 65, tokenizer, 8)


def test_longbench_e_names_the_same_data_sets(tmp_path) -> None:
    assert one(write(tmp_path / "a.jsonl", {"dataset": "hotpotqa_e"})).task == "longbench/hotpotqa"


def test_only_so_many_lines_are_read_and_blank_ones_do_not_count(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", {}, {}, {})
    path.write_text("\n" + path.read_text() + "not read\n")
    assert [number for _, number, _ in read_longbench(path, most=3)] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 5: expected a JSON object"):
        list(read_longbench(path))


def test_formats_of_longbench_itself_replace_ours(tmp_path) -> None:
    formats = tmp_path / "dataset2prompt.json"
    formats.write_text(json.dumps({"hotpotqa": "C: {context} {braces} I: {input}!"}))
    path = write(tmp_path / "a.jsonl", {})
    assert one(path, formats=read_formats(formats)).prompt == "C: Long {text} of a story. {braces} I: Who?!"
    with pytest.raises(ValueError, match="expected a prompt format for qasper"):
        list(read_longbench(write(tmp_path / "b.jsonl", {"dataset": "qasper"}), read_formats(formats)))
    for content in ("[]", "{broken", '{"hotpotqa": "no place"}'):
        formats.write_text(content)
        with pytest.raises(ValueError, match=r"dataset2prompt\.json: expected"):
            read_formats(formats)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dataset": "squad"}, "dataset: expected one of"),
        ({"context": 3}, "expected context as a str, got 3"),
        ({"answers": "Ann"}, "expected answers as a list"),
        ({"answers": []}, "expected at least one answer"),
        ({"dataset": "trec"}, "expected all_classes for trec"),
    ],
)
def test_lines_that_are_not_longbenchs_are_named(change: dict, expected: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: {expected}"):
        list(read_longbench(write(tmp_path / "a.jsonl", {}, change)))
