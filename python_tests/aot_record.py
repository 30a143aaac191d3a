"""From calls of the rooms' launchers to the kernels that would be launched, and which configurations that covers.

A room is a folder of ops with `triton_config.py`: a heuristic, functions named `choose...`, and `CONFIGS`, all that it
can choose. While a call is recorded, its choices are too, so that a configuration nobody would ever see is found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from aot_compile import Arch, Job, prepare

from specprefill_kernels import _triton


@dataclass(frozen=True)
class Call:
    """One call of a room's launcher, made with CPU tensors inside a recording."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Room:
    """A folder of ops: its heuristics and the calls that stand for all that users do.

    Attributes:
        modules: the room's modules; the heuristics are called through their names there.
        configs: everything that the heuristics can choose on an architecture.
        calls: the calls for one architecture, the whole product of options if told so.
        needs_tensor_cores: whether each kernel with a dot must have tensor-core instructions.
    """

    name: str
    modules: tuple[ModuleType, ...]
    configs: Callable[[Arch], Iterable[Any]]
    calls: Callable[[Arch, bool], Iterator[Call]]
    needs_tensor_cores: bool = False


@dataclass
class Recorded:
    """What the calls came to."""

    jobs: list[Job] = field(default_factory=list)
    calls: int = 0
    launches: int = 0
    problems: list[str] = field(default_factory=list)  # calls that failed, configurations never chosen


def record(rooms: Iterable[Room], archs: Iterable[Arch], full: bool = False) -> Recorded:
    """Every distinct kernel that the rooms' calls launch on `archs`."""
    recorded = Recorded()
    jobs: dict[Any, Job] = {}
    for room in rooms:
        chosen_anywhere: set[Any] = set()
        possible: dict[Any, list[str]] = {}
        for arch in archs:
            chosen: set[Any] = set()
            for call in room.calls(arch, full):
                recorded.calls += 1
                _record_call(room, arch, call, chosen, jobs, recorded)
            chosen_anywhere |= chosen
            missing = [config for config in room.configs(arch) if config not in chosen]
            for config in missing:
                possible.setdefault(config, []).append(arch.name)
        recorded.problems += [
            f"{room.name}: no call makes the heuristics choose {config} on {', '.join(names)}"
            for config, names in possible.items()
        ]
    recorded.jobs = list(jobs.values())
    return recorded


def _record_call(
    room: Room, arch: Arch, call: Call, chosen: set[Any], jobs: dict[Any, Job], recorded: Recorded
) -> None:
    try:
        with watching(room.modules) as choices, _triton.recording(arch.target) as launches:
            call.run()
        chosen |= set(choices)
        recorded.launches += len(launches)
        for launch in launches:
            job = prepare(launch, arch, room.name, _label(launch, choices), call.name)
            jobs.setdefault(job.key(), job)
    except Exception as error:
        recorded.problems.append(f"{room.name}, {call.name}, {arch.name}: {type(error).__name__}: {error}")
        return
    if not launches:
        recorded.problems.append(f"{room.name}, {call.name}, {arch.name}: launched nothing")


@contextlib.contextmanager
def watching(modules: Iterable[ModuleType]) -> Iterator[list[Any]]:
    """Inside, all that functions named `choose...` return in these modules is listed."""
    choices: list[Any] = []

    def watched(choose: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **kwargs: Any) -> Any:
            choices.append(choose(*args, **kwargs))
            return choices[-1]

        return watch

    before = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("choose") and callable(value)
    ]
    for module, name, value in before:
        setattr(module, name, watched(value))
    try:
        yield choices
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _field_names(config: Any) -> set[str]:
    names: set[str] = set()
    for item in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
        names |= {item.name} | _field_names(getattr(config, item.name))
    return names


def _label(launch: _triton.Launch, choices: list[Any]) -> str:
    """The part of a launch that its heuristic chose: the constants that are named as the configuration's fields are."""
    names = {"num_warps", "num_stages"}.union(*map(_field_names, choices))
    short = {"num_warps": "warps", "num_stages": "stages"}
    chosen = {key: value for key, value in launch.meta.items() if key.lower() in names}
    return " ".join(f"{short.get(key, key)}={value}" for key, value in chosen.items())


def room_modules(package: str) -> tuple[ModuleType, ...]:
    """The loaded modules of a room that have to do with Triton."""
    return tuple(module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.triton_"))
