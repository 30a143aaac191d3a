"""Timing the parts of both ways, for `CostModel.measure`: random tokens, lengths that double, interleaved repeats."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.budgets import keep_tokens, spans_of_mask
from specprefill_kernels.loop.capture import LayerCapture
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.continuing import ContinuingRun
from specprefill_kernels.loop.costs import CostModel, PrefillCost, identity_of
from specprefill_kernels.loop.prefill import BaseRun
from specprefill_kernels.loop.scoring import Captured, prompt_rows, score_captured
from specprefill_kernels.loop.speculator import Speculator
from specprefill_kernels.loop.support import (
    base_problem,
    context_length,
    layer_range_of,
    num_layers,
    speculator_problem,
)
from specprefill_kernels.models.progress import LogProgress, Progress

SHORTEST = 64
SECOND = 256  # far enough from the shortest that noise in either does not decide the slope
REPEATS = 3
_CLIMB = 0.75  # of the time goes to longer prompts, the rest to repeats of them


@dataclass(frozen=True)
class Part:
    """Something to time: `run(n)` gives the seconds of each of its costs for n tokens, at most `limit` of them."""

    run: Callable[[int], Mapping[str, float]]
    limit: int


def sample(
    parts: Sequence[Part],
    *,
    seconds: float,
    report: Callable[[float], None] = lambda fraction: None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[tuple[int, float]]]:
    """Cost -> (tokens, median seconds), ascending.

    Parts share the time equally, so that a slow base does not keep the speculator from long prompts. Each runs 64 and
    256 tokens at least, and goes on doubling while the next length is sure to fit in its share. Parts take turns at
    each length, so that a machine that gets busier slows all of them.
    """
    taken: list[dict[int, list[float]]] = [{} for _ in parts]  # per part: tokens -> seconds of whole runs
    samples: dict[str, dict[int, list[float]]] = {}
    share = seconds / len(parts)

    def run(index: int, size: int) -> None:
        start = now()
        for name, value in parts[index].run(size).items():
            if value > 0:
                samples.setdefault(name, {}).setdefault(size, []).append(value)
        taken[index].setdefault(size, []).append(now() - start)
        report(min(sum(map(spent, range(len(parts)))) / seconds, 1.0))

    def spent(index: int) -> float:
        return sum(sum(values) for values in taken[index].values())

    for part in parts:  # what only a first run pays: memory, compiled kernels, weights read from the disk
        part.run(min(SHORTEST, part.limit))
    growing, size = list(range(len(parts))), SHORTEST
    while growing:
        for index in list(growing):
            if min(size, parts[index].limit) in taken[index]:
                growing.remove(index)
                continue
            before = taken[index].get(size // 2, [0.0])[0]
            # Attention is quadratic, so twice as many tokens take at most four times as long; mostly it is twice.
            if size > SECOND and spent(index) + 2.5 * before > _CLIMB * share:
                growing.remove(index)
                continue
            run(index, min(size, parts[index].limit))
        size = max(SECOND, 2 * size)
    for repeat in range(2, REPEATS + 1):
        for size in sorted({size for one in taken for size in one}):
            for index in range(len(parts)):
                values = taken[index].get(size)
                if values and len(values) < repeat and spent(index) + median(values) <= share:
                    run(index, size)
    report(1.0)
    return {name: [(n, median(values)) for n, values in sorted(sizes.items())] for name, sizes in samples.items()}


def measure(
    base: Any,
    speculator: Any,
    config: SpecPrefillConfig,
    *,
    self_layers: int | tuple[int, int] | None,
    tokenizer: Any,
    speculator_tokenizer: Any,
    seconds: float,
    longest: int,
    progress: Progress | None,
) -> CostModel:
    """See `CostModel.measure`."""
    if (speculator is None) == (self_layers is None):
        got = "neither" if speculator is None else "both"
        raise ValueError(f"speculator: expected a model or self_layers=(first, last), got {got}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a time above 0, got {seconds!r}")
    if longest < SECOND:
        raise ValueError(f"longest: expected at least {SECOND} tokens, got {longest!r}")
    for name, problem in (
        ("base", base_problem(base)),
        ("speculator", None if speculator is None else speculator_problem(speculator)),
    ):
        if problem is not None:
            raise ValueError(f"{name}: expected a model that can play this part, got {problem}")
    base_limit = min(longest, context_length(base) or longest)
    layer_range = None
    if self_layers is not None:
        layer_range = layer_range_of(self_layers, num_layers(base))
        config = config.replace(queries="observation_window")
        parts = [Part(_continuing(base, config, layer_range), base_limit)]
    else:
        limit = min(longest, context_length(speculator) or longest)
        parts = [Part(_base(base), base_limit), Part(_speculator(speculator, config), limit)]
    progress = progress or LogProgress()
    with progress.task("Measuring what prefill costs here", steps=True) as task:
        samples = sample(parts, seconds=seconds, report=lambda fraction: task.update(round(100 * fraction), 100))
    if speculator is base and config.queries != "observation_window":
        # One model's one forward. Timed apart, a hiccup in one of the two could make it seem to outrun itself.
        samples["base"] = samples["speculator"] = sorted(samples["base"] + samples["speculator"])
    costs = {name: PrefillCost.fit(values) for name, values in samples.items()}
    steps = config.look_ahead - 1 if "look_ahead_step" in costs else 0
    return CostModel(
        **costs,
        look_ahead_steps=steps,
        speculator_ratio=_ratio(tokenizer, speculator_tokenizer),
        measured_tokens=max(n for n, _ in samples["base"]),
        identity=identity_of(base, speculator, config, layer_range),
    )


def _random_ids(model: Any, count: int) -> Tensor:
    """[1, count] on the model's device; other ones for every length, the same in every run."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, (1, count), generator=torch.Generator().manual_seed(count))
    return ids.to(model.device)


def _base(model: Any) -> Callable[[int], dict[str, float]]:
    def run(count: int) -> dict[str, float]:
        clock, ids = StageClock(model.device), _random_ids(model, count)
        with clock.stage("base"):
            logits = BaseRun(model, count, sparse=False).prefill(ids, torch.arange(count, device=ids.device))
            int(logits.argmax())
        return clock.seconds

    return run


def _speculator(model: Any, config: SpecPrefillConfig) -> Callable[[int], dict[str, float]]:
    speculator = Speculator(model, config)

    def run(count: int) -> dict[str, float]:
        clock, ids = StageClock(model.device), _random_ids(model, count)
        speculation = speculator.score(ids, clock)
        with clock.stage("select"):
            _select(speculation.importance, config)
        seconds = {"speculator": clock.seconds["speculator_prefill"]}
        seconds.update({stage: clock.seconds[stage] for stage in ("score", "select")})
        steps = len(speculation.look_ahead_tokens)
        if steps:  # EOS may come first
            seconds["look_ahead_step"] = clock.seconds["look_ahead"] / steps
        return seconds

    return run


def _continuing(model: Any, config: SpecPrefillConfig, layers: tuple[int, int]) -> Callable[[int], dict[str, float]]:
    def run(count: int) -> dict[str, float]:
        clock, ids = StageClock(model.device), _random_ids(model, count)
        everything = torch.arange(count, device=ids.device)

        def choose(captured: dict[int, LayerCapture]) -> Tensor:
            with clock.stage("score"):
                rows = prompt_rows(config)
                speculation = score_captured(Captured(captured, count, num_layers(model), rows, 1), config)
            with clock.stage("select"):
                _select(speculation.importance, config)
            clock.switch("upper")
            return everything  # so that this run also says what a full prefill takes

        sut = ContinuingRun(model, layers, rows=prompt_rows(config), prefill_chunk=config.prefill_chunk)
        with clock.stage("lower"):
            int(sut.prefill(ids, choose).argmax())
        return {"base": clock.seconds["lower"] + clock.seconds["upper"], **clock.seconds}

    return run


def _select(importance: Tensor, config: SpecPrefillConfig) -> None:
    """What `Selector.choose` does, with nothing protected."""
    mask = keep_tokens(importance, None, config).mask
    mask.nonzero()
    spans_of_mask(mask)


def _ratio(tokenizer: Any, speculator_tokenizer: Any) -> float:
    """The speculator's tokens per token of the base, on English prose about Python, with code in it."""
    if tokenizer is None or speculator_tokenizer is None or tokenizer is speculator_tokenizer:
        return 1.0
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in ("assignment", "compound", "exceptions", "strings") if name in topics)
    own = len(speculator_tokenizer(text, add_special_tokens=False)["input_ids"])
    return own / len(tokenizer(text, add_special_tokens=False)["input_ids"])
