"""From calls of the rooms' launchers to the kernels that would be launched, and which configurations that covers.

A room is a folder of ops with `triton_config.py`: a heuristic, functions named `choose...`, and `CONFIGS`, all that it
can choose. While a call is recorded, its choices are too, so that a configuration nobody would ever see is found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from aot_compile import Arch, Job, prepare
from aot_cover import Options, candidates, covering, product

from specprefill_kernels import _triton


@dataclass(frozen=True)
class Room:
    """A folder of ops: its heuristics and the calls that stand for all that users do.

    Attributes:
        modules: the room's modules; the heuristics are called through their names there.
        configs: everything that the heuristics can choose on an architecture.
        factors: what a call may vary, name -> values.
        call: makes one call, with CPU tensors.
        usable: which combinations of the factors a user may ask for.
        whole: the factors whose whole product --full compiles.
        needs_tensor_cores: whether each kernel with a dot must have tensor-core instructions.
    """

    name: str
    modules: tuple[ModuleType, ...]
    configs: Callable[[Arch], Iterable[Any]]
    factors: Mapping[str, Sequence[Any]]
    call: Callable[[Options], object]
    usable: Callable[[Options], bool] = lambda options: True
    whole: tuple[str, ...] = ()
    needs_tensor_cores: bool = False


@dataclass
class Recorded:
    """What the calls came to."""

    jobs: list[Job] = field(default_factory=list)
    calls: int = 0
    launches: int = 0
    problems: list[str] = field(default_factory=list)  # calls that failed, configurations never chosen


# Random calls that are tried for configurations that the covering set has missed.
TRIES = 1000


def record(rooms: Iterable[Room], archs: Sequence[Arch], full: bool = False) -> Recorded:
    """Every distinct kernel that the rooms' calls launch on `archs`."""
    recorded = Recorded()
    jobs: dict[Any, Job] = {}
    for room in rooms:
        unseen: dict[Any, list[str]] = {}
        for arch in archs:
            for config in _record_room(room, arch, full, jobs, recorded):
                unseen.setdefault(config, []).append(arch.name)
        recorded.problems += [
            f"{room.name}: no call makes the heuristics choose {config} on {', '.join(names)}"
            for config, names in unseen.items()
        ]
    recorded.jobs = list(jobs.values())
    return recorded


def _record_room(room: Room, arch: Arch, full: bool, jobs: dict[Any, Job], recorded: Recorded) -> set[Any]:
    """The configurations that no call has led to."""
    unseen = set(room.configs(arch))
    combinations = covering(room.factors, arch.name, room.usable)
    if full and room.whole:
        combinations = product(room.factors, room.whole, arch.name, room.usable)

    def keep(options: Options, launches: list[_triton.Launch], choices: list[Any]) -> None:
        recorded.calls += 1
        recorded.launches += len(launches)
        unseen.difference_update(choices)
        for launch in launches:
            job = prepare(launch, arch, room.name, _label(launch, choices), _text(options))
            jobs.setdefault(job.key(), job)

    for options in combinations:
        place = f"{room.name}, {arch.name}, {_text(options)}"
        try:
            launches, choices = _observe(room, arch, options)
            keep(options, launches, choices)
            if not launches:
                recorded.problems.append(f"{place}: launched nothing")
        except Exception as error:
            recorded.problems.append(f"{place}: {type(error).__name__}: {error}")
    tries = candidates(room.factors, f"{arch.name} again", room.usable)
    for options in itertools.islice(tries, TRIES):
        if not unseen:
            break
        with contextlib.suppress(Exception):  # whatever fails has failed above
            launches, choices = _observe(room, arch, options)
            if unseen.intersection(choices):
                keep(options, launches, choices)
    return unseen


def _observe(room: Room, arch: Arch, options: Options) -> tuple[list[_triton.Launch], list[Any]]:
    """(launches, what the heuristics chose) of one call."""
    with watching(room.modules) as choices, _triton.recording(arch.target) as launches:
        room.call(options)
    return launches, choices


def _text(options: Options) -> str:
    def value(item: Any) -> str:
        if isinstance(item, tuple):
            return "/".join(map(value, item))
        return item.__name__ if callable(item) else str(item).removeprefix("torch.")

    return " ".join(f"{name}={value(item)}" for name, item in options.items())


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
