"""Results as they come, one JSON line each, in a file that an interrupted evaluation takes up again.

The first line holds the whole setting: models, configuration, tasks, seeds, versions, machine. Results of another
setting never get into the same file. A line that was cut off when the power went is dropped; all before it counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

FORMAT = 1

Key = tuple[str, int, str, float]


@dataclass(frozen=True)
class Record:
    """One prompt answered with the tokens of one method.

    Attributes:
        task, seed: which prompt.
        method: a name in `methods.METHODS`.
        keep_ratio: what was asked for; 1.0 for the full prompt.
        metric, score: how the answer was judged, and the result in [0, 1].
        answer: what the base wrote, without special tokens.
        new_tokens: how many tokens that took.
        prompt_tokens, kept_tokens: T and the tokens that the base read.
        mode, reason: of the loop's selection for "kept": "dense" where it kept everything, and why.
        evidence: the part of the evidence's tokens that were read; None where a task knows no evidence.
        seconds: stage -> seconds, "decode" included.
        ttft: seconds until the first token was known, the speculator's included.
        note: what else has to be known, for example that the prompt was cut.
    """

    task: str
    seed: int
    method: str
    keep_ratio: float
    metric: str
    score: float
    answer: str
    new_tokens: int
    prompt_tokens: int
    kept_tokens: int
    mode: str
    reason: str
    evidence: float | None
    seconds: Mapping[str, float]
    ttft: float
    note: str = ""

    @property
    def key(self) -> Key:
        return self.task, self.seed, self.method, self.keep_ratio

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        return cls(**{field.name: values[field.name] for field in fields(cls)})


class RecordFile:
    """A file of records, open for more.

    Args:
        path: the JSONL file; its folder is made.
        setting: what the results depend on, as JSON values.
        resume: take up what is there. False starts anew and discards it.

    Raises:
        ValueError: the file is of another setting (the message names what differs), or no such file at all.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any], *, resume: bool = True) -> None:
        self.path = path
        self.setting: dict[str, Any] = json.loads(json.dumps(setting))
        self.records: list[Record] = []
        self.dropped_line = False
        path.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        if resume and path.exists():
            found, self.records, size, self.dropped_line = _read(path)
            if found is not None and self.records:
                _same_setting(path, found, self.setting)
            elif not self.records:
                size = 0  # a setting without results binds nobody
        self._file = path.open("r+b" if size else "wb")
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._write({"format": FORMAT, "setting": self.setting})
        self.done = {record.key for record in self.records}

    def append(self, record: Record) -> None:
        self._write(asdict(record))
        self.records.append(record)
        self.done.add(record.key)

    def _write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The setting and the records of a file.

    Raises:
        ValueError: it is no file of records.
    """
    setting, records, _, _ = _read(path)
    if setting is None:
        raise ValueError(f"{path}: expected records of an evaluation, got an empty file")
    return setting, records


def _read(path: Path) -> tuple[dict[str, Any] | None, list[Record], int, bool]:
    """Setting, records, the size of the part that is whole, and whether something followed it."""
    content = path.read_bytes()
    size = content.rfind(b"\n") + 1
    lines = content[:size].splitlines()
    if not lines:
        return None, [], 0, bool(content)
    try:
        header = json.loads(lines[0])
        if header["format"] != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT}, got {header['format']}")
        return header["setting"], [Record.from_json(json.loads(line)) for line in lines[1:]], size, size < len(content)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected records of an evaluation, one JSON object a line: {error!r}") from None


def _same_setting(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = list(_differences("", found, wanted))
    if different:
        raise ValueError(
            f"{path} holds results of another setting: {'; '.join(different)}. "
            "Give another --output, or --no-resume to discard them"
        )


def _differences(name: str, found: Any, wanted: Any) -> list[str]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        parts = []
        for key in sorted({*found, *wanted}):
            parts += _differences(f"{name}.{key}" if name else key, found.get(key), wanted.get(key))
        return parts
    return [] if found == wanted else [f"{name} was {_short(found)}, is {_short(wanted)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
