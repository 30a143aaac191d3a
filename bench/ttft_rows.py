"""Rows of a pair with random weights: both ways in turn, their stages, their ratio and what limits it.

    full         the base's prefill of T tokens
    speculative  speculator_prefill + look_ahead + score + select + gather + base_prefill of the K kept tokens
    ratio        full / speculative
    limit        full / (speculator_prefill + look_ahead + base_prefill): what the two models' costs allow at this
                 budget, if scoring, selecting and gathering took no time
    limit_any_budget    full / (speculator_prefill + look_ahead): what no budget passes, however small

Every stage is the median of its rounds; speculative is their sum.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.ttft_layers import BaseLayers, Plan, SpeculatorLayers, fit, select
from bench.ttft_models import Sizes, build, config_of, title
from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.models.progress import Progress

MODELS_STAGES = ("speculator_prefill", "look_ahead", "base_prefill")
STAGES = ("tokenize", "speculator_prefill", "look_ahead", "score", "select", "gather", "base_prefill")
WARM_UP = 512
LOOK_AHEAD = SpecPrefillConfig().look_ahead
# Of the rate of a matrix product; attention kernels reach about so much of it. For estimates alone.
ATTENTION_RATE = 0.6
RANDOM = "random weights: the budget decides what is read, not the content"


@dataclass(frozen=True)
class Work:
    """One prompt length of a pair, with the budgets that share its full prefill and its speculation."""

    speculator: str
    base: str
    tokens: int
    keeps: tuple[float, ...]
    attention: str = "dense"
    base_layers: int | None = None
    speculator_layers: int | None = None

    @property
    def name(self) -> str:
        sparse = "" if self.attention == "dense" else f", speculator attention {self.attention}"
        return f"{title(self.speculator)} -> {title(self.base)}, {self.tokens} tokens{sparse}"


def config_for(keep: float, preset: str, attention: str) -> SpecPrefillConfig:
    """The preset at this budget, nothing protected. Raises ValueError for what it cannot be."""
    return SpecPrefillConfig.preset(preset, keep_ratio=keep, protect="none", speculator_attention=attention)


def sparse_keys(config: SpecPrefillConfig) -> int | None:
    """To how many tokens one attends at most where the speculator's attention is sparse; shorter prompts are dense."""
    if config.speculator_attention != "sparse":
        return None
    return config.attention_keep_blocks * config.attention_block_size


def ratios(full: float, stages: Mapping[str, float]) -> dict[str, float]:
    """See this file's head."""
    speculative = sum(stages.values())
    models = sum(stages.get(name, 0.0) for name in MODELS_STAGES)
    return {
        "full_seconds": full,
        "speculative_seconds": speculative,
        "ratio": full / speculative,
        "limit": full / models,
        "limit_any_budget": full / (models - stages["base_prefill"]),
    }


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Stage -> median seconds, in the order of STAGES."""
    names = [name for name in STAGES if any(name in run for run in runs)]
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}


@dataclass(frozen=True)
class Rate:
    """Floating-point operations a second of a large matrix product on this device."""

    value: float

    @classmethod
    def of(cls, device: str, dtype: torch.dtype, size: int) -> Rate:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = []
        for _ in range(6):
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            start = time.perf_counter()
            a @ b
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return cls(2 * size**3 / min(seconds))

    def seconds(self, sizes: Sizes, tokens: int, keys: int | None = None) -> float:
        products, attention = sizes.flops(tokens, keys)
        return (products + attention / ATTENTION_RATE) / self.value


@dataclass(frozen=True)
class Estimate:
    """Seconds that the arithmetic alone takes, at the rate of a matrix product; of the whole measurement too."""

    full: float
    speculator: float
    kept: tuple[float, ...]
    measuring: float


def estimate(
    work: Work, base: Sizes, speculator: Sizes, plan: Plan, rate: Rate, rounds: int, keys: int | None = None
) -> Estimate:
    """`keys`: as many a token of the speculator attends to at most."""
    full = rate.seconds(base, work.tokens)
    reading = rate.seconds(speculator, work.tokens, keys)
    kept = tuple(rate.seconds(base, max(1, int(keep * work.tokens))) for keep in work.keeps)
    part = plan.base_layers / base.layers
    depth = plan.speculator_layers / speculator.layers * (1.0 if plan.speculator_layers == speculator.layers else 1.5)
    return Estimate(full, reading, kept, rounds * (part * (full + sum(kept)) + depth * reading))


_models: dict[tuple[Any, ...], Any] = {}


class Prepared:
    """A work's sizes and plan; `models` allocates."""

    def __init__(
        self,
        work: Work,
        *,
        dtype: torch.dtype,
        device: str,
        memory: int,
        rounds: int,
        preset: str = "default",
    ) -> None:
        self.work, self.dtype, self.device, self.rounds, self.preset = work, dtype, device, rounds, preset
        self.configs = [config_for(keep, preset, work.attention) for keep in work.keeps]
        self._base, base_note = config_of(work.base, work.tokens)
        self._speculator, speculator_note = config_of(work.speculator, work.tokens)
        self.base_sizes, self.speculator_sizes = Sizes.of(self._base), Sizes.of(self._speculator)
        self.plan = fit(
            self.base_sizes,
            self.speculator_sizes,
            work.tokens,
            int(max(work.keeps) * work.tokens),
            dtype.itemsize,
            memory,
            base_layers=work.base_layers,
            speculator_layers=work.speculator_layers,
            prefill_chunk=self.configs[0].prefill_chunk,
        )
        self.notes = [RANDOM, *sorted({note for note in (base_note, speculator_note) if note})]
        if self.plan.chunk is not None:
            self.notes.append(f"base reads {self.plan.chunk} tokens at a time")
        parts = (("speculator", self.plan.speculator_layers, self.speculator_sizes.layers),)
        for name, measured, whole in (*parts, ("base", self.plan.base_layers, self.base_sizes.layers)):
            if measured < whole:
                self.notes.append(f"{name} timed by {measured} of {whole} layers, scaled")

    def asked(self, keep: float) -> dict[str, Any]:
        """What a row says of what was asked for, known before anything is measured."""
        work = self.work
        return {
            "speculator": title(work.speculator),
            "base": title(work.base),
            "tokens": work.tokens,
            "keep_ratio": keep,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "weights": "random",
            "prompt": "random",
            "speculator_attention": work.attention,
            "preset": self.preset,
            "layers_asked": {"speculator": work.speculator_layers, "base": work.base_layers},
            "rounds": self.rounds,
        }

    def estimate(self, rate: Rate) -> Estimate:
        keys = sparse_keys(self.configs[0])
        return estimate(self.work, self.base_sizes, self.speculator_sizes, self.plan, rate, self.rounds, keys)

    def models(self, progress: Progress | None) -> tuple[BaseLayers, SpeculatorLayers]:
        """The work before this one leaves its models behind: those of the same shape are used again."""
        wanted = {
            (role, str(config.to_dict()), layers, self.dtype, self.device): (name, config, layers)
            for role, name, config, layers in (
                ("speculator", self.work.speculator, self._speculator, self.plan.speculator_layers),
                ("base", self.work.base, self._base, self.plan.base_layers),
            )
        }
        for key in [key for key in _models if key not in wanted]:
            del _models[key]
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        for key, (name, config, layers) in wanted.items():
            if key not in _models:
                label = f"{title(name)}, {layers} layers"
                how: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "progress": progress}
                _models[key] = build(config, layers=layers, label=label, **how)
        small, large = (_models[key] for key in wanted)
        return (
            BaseLayers(large, self.base_sizes.layers, self.plan.chunk),
            SpeculatorLayers(small, self.speculator_sizes.layers, self.configs[0]),
        )


def measure(
    prepared: Prepared,
    expected: Estimate,
    report: Callable[[int, int], None],
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """One row for each budget. Rounds: full, speculation, each budget; the next round in the other order."""
    work, rounds = prepared.work, prepared.rounds
    base, speculator = prepared.models(progress)
    size = min(model.model.get_input_embeddings().weight.shape[0] for model in (base, speculator))
    generator = torch.Generator().manual_seed(work.tokens)
    ids = torch.randint(size, (1, work.tokens), generator=generator).to(prepared.device)
    full: list[float] = []
    runs: list[list[dict[str, float]]] = [[] for _ in work.keeps]
    kept_tokens, attention = [0] * len(work.keeps), ("", "")
    total, done = rounds * (len(work.keeps) + 2), 0

    def tick() -> None:
        nonlocal done
        done += 1
        report(done, total)

    def full_way() -> None:
        full.append(base.seconds(ids, torch.arange(work.tokens, device=ids.device), work.tokens, sparse=False))
        tick()

    def sparse_way() -> None:
        nonlocal attention
        stages, speculation = speculator.seconds(ids)
        attention = speculation.attention
        tick()
        for i, config in enumerate(prepared.configs):
            selecting, packed, kept = select(speculation.importance, config, ids)
            reading = base.seconds(packed, kept, work.tokens, sparse=True)
            runs[i].append({**stages, **selecting, "base_prefill": reading})
            kept_tokens[i] = int(kept.shape[0])
            tick()

    _warm_up(base, speculator, prepared.configs[0], ids)
    for number in range(rounds):
        for way in (full_way, sparse_way) if number % 2 == 0 else (sparse_way, full_way):
            way()
    return [
        {
            **_row(prepared, keep, kept_tokens[i], attention, full, runs[i], (base, speculator)),
            "estimate": {"full": expected.full, "speculative": expected.speculator + expected.kept[i]},
        }
        for i, keep in enumerate(work.keeps)
    ]


def _warm_up(base: BaseLayers, speculator: SpeculatorLayers, config: SpecPrefillConfig, ids: Tensor) -> None:
    """What only a first run pays: handles, compiled kernels, those of sparse attention too."""
    importance = speculator.seconds(ids[:, : WARM_UP + (sparse_keys(config) or 0)])[1].importance
    few = ids[:, :WARM_UP]
    base.seconds(few, torch.arange(few.shape[1], device=ids.device), few.shape[1], sparse=False)
    _, packed, kept = select(importance[: few.shape[1]], config, few)
    base.seconds(packed, kept, few.shape[1], sparse=True)


def _row(
    prepared: Prepared,
    keep: float,
    kept_tokens: int,
    attention: tuple[str, str],
    full: list[float],
    runs: list[dict[str, float]],
    models: tuple[BaseLayers, SpeculatorLayers],
) -> dict[str, Any]:
    stages = medians(runs)
    base, speculator = models
    return {
        **prepared.asked(keep),
        "kept_tokens": kept_tokens,
        **ratios(statistics.median(full), stages),
        "stages": stages,
        "layers_measured": {
            "speculator": f"{speculator.measured} of {speculator.whole}",
            "base": f"{base.measured} of {base.whole}",
        },
        "speculator_attention_ran": attention[0],
        "base_chunk": prepared.plan.chunk,
        "runs": {"full": full, "speculative": [sum(run.values()) for run in runs]},
        "note": "; ".join([*prepared.notes, *([f"attention {': '.join(attention)}"] if attention[1] else [])]),
    }


def works(
    pairs: Sequence[tuple[str, str]], tokens: Sequence[int], keeps: Sequence[float], **more: Any
) -> Iterator[Work]:
    for speculator, base in pairs:
        for count in tokens:
            yield Work(speculator, base, count, tuple(keeps), **more)
