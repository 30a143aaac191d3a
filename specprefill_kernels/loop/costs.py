"""Whether speculative prefill pays, from measured costs: what both ways would take for a prompt, in seconds.

    full   = base(T)
    sparse = speculator(S) + steps * step(S) + score(S) + select(S) + base(K)        two models
    sparse = lower(T) + score(T) + select(T) + upper(K)                              self_layers that continue

T prompt tokens, K kept ones, S the prompt in the speculator's tokens. Every term is constant + per_token * n +
per_token_squared * n^2, fitted to prefills that were timed on this machine; see `CostModel.measure`. Beyond the longest
prompt that was timed these are extrapolations, and `Prediction.text` says so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from specprefill_kernels.config import SpecPrefillConfig

if TYPE_CHECKING:
    from specprefill_kernels.loop.results import GenerationResult
    from specprefill_kernels.models.progress import Progress

# A smaller gain is within what predictions err, and a full prefill loses no quality.
LEAST_GAIN = 1.05
_VERSION = 1
_COSTS = ("base", "speculator", "look_ahead_step", "score", "select", "lower", "upper")


@dataclass(frozen=True)
class PrefillCost:
    """Seconds of work on n tokens: constant + per_token * n + per_token_squared * n^2, none of them negative."""

    constant: float = 0.0
    per_token: float = 0.0
    per_token_squared: float = 0.0

    def __post_init__(self) -> None:
        for name in ("constant", "per_token", "per_token_squared"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected seconds of at least 0, got {value!r}")

    def seconds(self, n: int) -> float:
        return self.constant + self.per_token * n + self.per_token_squared * n * n

    def scaled(self, factor: float) -> PrefillCost:
        return PrefillCost(self.constant * factor, self.per_token * factor, self.per_token_squared * factor)

    @classmethod
    def fit(cls, samples: Sequence[tuple[int, float]]) -> PrefillCost:
        """The cost that is nearest to (tokens, seconds) samples, by the sum of squared RELATIVE errors.

        Non-negative least squares: of all sets of terms that fit with no negative one, the best. Fewer different
        lengths than terms allow only as many terms, the simplest first: one length says per_token alone.

        Raises:
            ValueError: no sample, or one of no tokens or no time.
        """
        if not samples or any(n < 1 or not 0 < seconds < math.inf for n, seconds in samples):
            raise ValueError(f"samples: expected (tokens, seconds) pairs, all positive, got {list(samples)}")
        lengths = torch.tensor([n for n, _ in samples], dtype=torch.float64)
        seconds = torch.tensor([value for _, value in samples], dtype=torch.float64)
        longest = float(lengths.max())
        scaled = lengths / longest  # columns of one size: n^2 beside 1 would lose digits
        terms = torch.stack([torch.ones_like(scaled), scaled, scaled**2], dim=1) / seconds[:, None]
        different = len(set(lengths.tolist()))
        allowed: tuple[int, ...] = (1,) if different == 1 else (0, 1) if different == 2 else (0, 1, 2)
        best, least = [0.0, 0.0, 0.0], math.inf
        for count in range(1, len(allowed) + 1):
            for chosen in combinations(allowed, count):
                columns = terms[:, list(chosen)]
                found = torch.linalg.lstsq(columns, torch.ones_like(seconds)[:, None]).solution
                error = float(((columns @ found)[:, 0] - 1).square().sum())
                # A further term has to earn its place: rounding alone lets it fit a little better.
                if bool((found >= 0).all()) and error < least * (1 - 1e-6) - 1e-18:
                    best, least = [0.0, 0.0, 0.0], error
                    for term, value in zip(chosen, found[:, 0].tolist()):
                        best[term] = value / longest**term
        return cls(*best)


@dataclass(frozen=True)
class Prediction:
    """What both ways would take for one prompt, in seconds.

    Attributes:
        full, sparse: seconds to the first token.
        stages: stage -> seconds of the sparse way, with the names of `GenerationResult.seconds`.
        prompt_tokens, kept_tokens, speculator_tokens: T, K, S.
        measured_tokens: the longest prompt that was timed; None if unknown.
        continues: as in `CostModel.predict`.
    """

    full: float
    sparse: float
    stages: Mapping[str, float] = field(repr=False)
    prompt_tokens: int
    kept_tokens: int
    speculator_tokens: int
    measured_tokens: int | None = None
    continues: bool = True

    @property
    def pays(self) -> bool:
        """Whether speculative prefill is the faster way, by `LEAST_GAIN` at least."""
        return self.sparse * LEAST_GAIN < self.full

    @property
    def text(self) -> str:
        """One sentence with both times."""
        far = self.measured_tokens is not None and self.prompt_tokens > 2 * self.measured_tokens
        note = f" (extrapolated: costs were measured up to {self.measured_tokens} tokens)" if far else ""
        verdict = "hardly faster" if self.sparse < self.full else "no faster"
        if self.pays:
            verdict = f"{self.full / self.sparse:.1f}x faster"
        return (
            f"keeping {self.kept_tokens} of {self.prompt_tokens} tokens is predicted to take {self.sparse:.3g} s, "
            f"{verdict} than the {self.full:.3g} s of a full prefill{note}"
        )


@dataclass(frozen=True)
class CostModel:
    """Measured costs of a base and of what selects its tokens.

    Attributes:
        base: the base's dense prefill.
        speculator: its prefill; None where the base's own lower layers continue.
        look_ahead_step: one decoded look-ahead token, over the tokens before it.
        look_ahead_steps: how many there are.
        score, select: scoring; choosing chunks. Over the speculator's tokens.
        lower, upper: the base's layers up to the cut, and above it; None with a speculator.
        speculator_ratio: the speculator's tokens per token of the base.
        measured_tokens: the longest prompt that was timed.
        identity: what was measured: name -> description; see `identity_of`.

    Example:
        >>> base, small = PrefillCost(per_token=10e-3), PrefillCost(per_token=1e-3)
        >>> CostModel(base, small).predict(1000, 100).pays
        True
    """

    base: PrefillCost
    speculator: PrefillCost | None = None
    look_ahead_step: PrefillCost = PrefillCost()
    look_ahead_steps: int = 0
    score: PrefillCost = PrefillCost()
    select: PrefillCost = PrefillCost()
    lower: PrefillCost | None = None
    upper: PrefillCost | None = None
    speculator_ratio: float = 1.0
    measured_tokens: int | None = None
    identity: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = [name for name in ("speculator", "lower", "upper") if getattr(self, name) is not None]
        if parts not in (["speculator"], ["lower", "upper"]):
            got = " and ".join(parts) or "neither"
            raise ValueError(f"costs: expected those of a speculator, or of lower and upper layers, got {got}")
        if not 0 < self.speculator_ratio < math.inf:
            raise ValueError(f"speculator_ratio: expected tokens per token above 0, got {self.speculator_ratio!r}")
        if self.look_ahead_steps < 0:
            raise ValueError(f"look_ahead_steps: expected at least 0, got {self.look_ahead_steps!r}")

    @classmethod
    def measure(
        cls,
        base: Any,
        speculator: Any = None,
        config: SpecPrefillConfig | None = None,
        *,
        self_layers: int | tuple[int, int] | None = None,
        tokenizer: Any = None,
        speculator_tokenizer: Any = None,
        seconds: float = 10.0,
        longest: int = 8192,
        progress: Progress | None = None,
    ) -> CostModel:
        """Time both models on random tokens, at lengths that double until the time is used.

        Args:
            base, speculator, config, self_layers, tokenizer, speculator_tokenizer: as for `SpecPrefill`. The tokenizers
                only say how many tokens of the one make one of the other.
            seconds: the time to spend, about. Two lengths are always timed, 64 and 256 tokens, whatever they take. More
                time gives longer prompts first, then repeats, whose median counts.
            longest: no prompt longer than this; nor than a model's context.
            progress: see `specprefill_kernels.models.progress`.

        Raises:
            ValueError: not exactly one of `speculator` and `self_layers`; or models that cannot run the sparse way.
        """
        from specprefill_kernels.loop.measuring import measure

        return measure(
            base,
            speculator,
            SpecPrefillConfig.preset("default") if config is None else config,
            self_layers=self_layers,
            tokenizer=tokenizer,
            speculator_tokenizer=speculator_tokenizer,
            seconds=seconds,
            longest=longest,
            progress=progress,
        )

    def predict(
        self, prompt_tokens: int, kept_tokens: int, speculator_tokens: int | None = None, *, continues: bool = True
    ) -> Prediction:
        """Seconds of both ways.

        Args:
            prompt_tokens: T >= 1.
            kept_tokens: 1 <= K <= T.
            speculator_tokens: S; default: T times the measured ratio.
            continues: without a speculator, whether the base goes on above the lower layers. False: it reads the kept
                tokens from its first layer on, as in a `Session`.
        """
        if prompt_tokens < 1:
            raise ValueError(f"prompt_tokens: expected at least 1, got {prompt_tokens}")
        if not 1 <= kept_tokens <= prompt_tokens:
            raise ValueError(f"kept_tokens: expected 1 to {prompt_tokens} (prompt_tokens), got {kept_tokens}")
        if speculator_tokens is None:
            speculator_tokens = math.ceil(prompt_tokens * self.speculator_ratio)
        if speculator_tokens < 1:
            raise ValueError(f"speculator_tokens: expected at least 1, got {speculator_tokens}")
        stages: dict[str, float] = {}
        if self.speculator is not None:
            stages["speculator_prefill"] = self.speculator.seconds(speculator_tokens)
            if self.look_ahead_steps:
                stages["look_ahead"] = self.look_ahead_steps * self.look_ahead_step.seconds(speculator_tokens)
            reading = self.base
        else:
            assert self.lower is not None  # __post_init__ took care
            assert self.upper is not None
            stages["speculator_prefill"] = self.lower.seconds(prompt_tokens)
            reading = self.upper if continues else self.base
        stages["score"] = self.score.seconds(speculator_tokens)
        stages["select"] = self.select.seconds(speculator_tokens)
        stages["base_prefill"] = reading.seconds(kept_tokens)
        return Prediction(
            full=self.base.seconds(prompt_tokens),
            sparse=sum(stages.values()),
            stages=MappingProxyType(stages),
            prompt_tokens=prompt_tokens,
            kept_tokens=kept_tokens,
            speculator_tokens=speculator_tokens,
            measured_tokens=self.measured_tokens,
            continues=continues,
        )

    def observe(self, result: GenerationResult, weight: float = 0.2) -> CostModel:
        """Costs moved toward what one answer really took: a machine that is busier, or a longer prompt.

        Whole prefills alone count: no selection from a cache, no part of a `Session`. One run moves a cost by `weight`
        of the difference (of logarithms), and its own factor counts as at most 2, so that no hiccup overturns what was
        measured.
        """
        if not 0 < weight <= 1:
            raise ValueError(f"weight: expected a fraction in (0, 1], got {weight!r}")
        if result.selection.cached or result.selection.reused_tokens:
            return self
        if result.prefilled_tokens not in (0, result.kept_tokens):
            return self
        moved: dict[str, PrefillCost] = {}

        def move(name: str, tokens: int, stage: str) -> None:
            cost, taken = getattr(self, name), result.seconds.get(stage, 0.0)
            predicted = 0.0 if cost is None else cost.seconds(tokens)
            if taken > 0 and predicted > 0:
                moved[name] = cost.scaled(min(max(taken / predicted, 0.5), 2.0) ** weight)

        if result.mode == "dense":
            if "speculator_prefill" not in result.seconds:
                move("base", result.prompt_tokens, "base_prefill")
        elif self.speculator is not None:
            move("speculator", math.ceil(result.prompt_tokens * self.speculator_ratio), "speculator_prefill")
            move("base", result.kept_tokens, "base_prefill")
        else:
            move("lower", result.prompt_tokens, "speculator_prefill")
            prediction = result.selection.prediction
            reading = "upper" if prediction is None or prediction.continues else "base"
            move(reading, result.kept_tokens, "base_prefill")
        return replace(self, **moved)  # type: ignore[arg-type]

    def check(self, identity: Mapping[str, str], source: str = "costs") -> None:
        """Raises ValueError unless these costs are of what `identity` (see `identity_of`) describes."""
        for name in sorted({*self.identity, *identity}):
            expected, got = identity.get(name, "none"), self.identity.get(name, "none")
            if expected != got:
                raise ValueError(
                    f"{source}: expected costs measured with {name} = {expected}, got {got}; measure again"
                )

    def to_json(self) -> str:
        record: dict[str, Any] = {"version": _VERSION, "identity": dict(self.identity)}
        for name in _COSTS:
            cost = getattr(self, name)
            if cost is not None:
                record[name] = [cost.constant, cost.per_token, cost.per_token_squared]
        record["look_ahead_steps"] = self.look_ahead_steps
        record["speculator_ratio"] = self.speculator_ratio
        record["measured_tokens"] = self.measured_tokens
        return json.dumps(record, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "costs") -> CostModel:
        """Raises ValueError, naming `source`, for anything that `to_json` did not write."""
        try:
            record = json.loads(text)
            if record["version"] != _VERSION:
                raise ValueError(f"version {record['version']!r}")
            return cls(
                **{name: PrefillCost(*record[name]) for name in _COSTS if name in record},
                look_ahead_steps=int(record["look_ahead_steps"]),
                speculator_ratio=float(record["speculator_ratio"]),
                measured_tokens=record["measured_tokens"],
                identity=MappingProxyType({str(name): str(value) for name, value in record["identity"].items()}),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{source}: expected costs as CostModel.to_json writes them, got {type(error).__name__}: {error}"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str], identity: Mapping[str, str] | None = None) -> CostModel:
        """Costs from a file; with `identity` refused, by name, if something else was measured."""
        costs = cls.from_json(Path(path).read_text(encoding="utf-8"), os.fspath(path))
        if identity is not None:
            costs.check(identity, os.fspath(path))
        return costs


def identity_of(
    base: Any, speculator: Any, config: SpecPrefillConfig, self_layers: tuple[int, int] | None = None
) -> Mapping[str, str]:
    """What costs depend on: both models' sizes, dtypes and devices, threads, and the settings that change the work.

    Models of one shape cost the same whatever their weights, so weights and paths are not part of it.
    """
    identity = {"base": _description(base)}
    if speculator is not None:
        identity["speculator"] = _description(speculator)
    if self_layers is not None:
        identity["self_layers"] = f"{self_layers[0]} to {self_layers[1]}"
    if any(model is not None and model.device.type == "cpu" for model in (base, speculator)):
        identity["threads"] = str(torch.get_num_threads())
    identity["queries"] = {
        "look_ahead": f"look_ahead {config.look_ahead}",
        "observation_window": f"observation_window {config.look_ahead}",
        "both": f"both {config.observation_rows} + {config.look_ahead}",
    }[config.queries]
    identity["score_layers"] = "all" if config.score_layers is None else ", ".join(map(str, config.score_layers))
    identity["prefill_chunk"] = str(config.prefill_chunk)
    if config.speculator_attention == "sparse":
        blocks = f"{config.attention_keep_blocks} blocks of {config.attention_block_size}"
        identity["speculator_attention"] = f"sparse, {blocks}"
    return MappingProxyType(identity)


def _description(model: Any) -> str:
    text = model.config.get_text_config(decoder=True)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return (
        f"{type(model).__name__}, {text.num_hidden_layers} layers of {text.hidden_size}, "
        f"{sum(weight.numel() for weight in model.parameters())} parameters, "
        f"{str(model.dtype).removeprefix('torch.')} on {device}, {text._attn_implementation or 'eager'} attention"
    )
