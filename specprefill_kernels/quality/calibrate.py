"""Which layers of a speculator retrieve: prompts with known evidence, each layer alone, and sets of layers.

The state of a set of layers is the elementwise maximum of its layers' states, so one capture of a prompt tells every
set. A score is the mean, over keep ratios, of two things: the part of the evidence's tokens that is kept, and whether
all of it is. Nothing is protected here but the prompt's last token: what is measured is the scoring alone.

The best of many sets looks better than it is. So the set that is chosen is the largest whose score is within one
standard error of the best's, prompt by prompt; and the figure that is reported for it comes from prompts that had no
part in the choice: each half of the prompts is judged by what the other half chose.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.prompts import read_prompt
from specprefill_kernels.loop.scoring import layer_states
from specprefill_kernels.loop.speculator import Speculator
from specprefill_kernels.ops.finalize import finalize_importance
from specprefill_kernels.ops.select import select_chunks
from specprefill_kernels.quality.intervals import paired_difference
from specprefill_kernels.quality.runner import evidence_tokens
from specprefill_kernels.quality.tasks import TASKS, Sample, make

FORMAT = 1
KEEP_RATIOS = (0.1, 0.2, 0.3)
# Their evidence is a sentence or a few. Of few-shot examples a model needs some, not all.
CALIBRATION_TASKS = ("niah_multikey", "niah_multivalue", "multi_doc_qa", "variable_tracking")


@dataclass(frozen=True)
class Reading:
    """One prompt, read: which of its tokens are evidence, and the state that each layer left.

    Attributes:
        evidence: [T] bool.
        layers: indices of the scored layers.
        rows: rows of the states that count.
        states: [L, N, T] fp32.
    """

    task: str
    seed: int
    evidence: Tensor
    layers: tuple[int, ...]
    rows: int
    states: Tensor


@dataclass(frozen=True)
class Figures:
    """What a set of layers keeps of the evidence, as means over prompts.

    Attributes:
        layers: their indices.
        evidence: keep ratio -> part of the evidence's tokens that is kept.
        complete: keep ratio -> part of the prompts whose evidence is kept to the last token.
        score: mean of both over the keep ratios.
        tasks: task -> the same mean of its prompts.
    """

    layers: tuple[int, ...]
    evidence: dict[str, float]
    complete: dict[str, float]
    score: float
    tasks: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        setting: the model's identity, the configuration, tasks, seeds and lengths: what has to be equal to compare.
        score_layers: for `SpecPrefillConfig.score_layers`; None when no set is clearly better than all layers.
        single: figures of each layer alone.
        choices: figures of the sets that were compared, by name.
        chosen: name of the set in `choices`.
        unseen: scores on prompts that had no part in the choice: "chosen", "all", and their "difference" with its
            95% interval.
    """

    setting: dict[str, Any]
    score_layers: tuple[int, ...] | None
    single: tuple[Figures, ...]
    choices: dict[str, Figures]
    chosen: str
    unseen: dict[str, Any]

    def save(self, path: Path) -> None:
        values = {"format": FORMAT, **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Raises ValueError where the file is no calibration."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            values = None
        if not isinstance(values, dict) or "format" not in values:
            raise ValueError(f"path: expected a calibration, got {path}, which is none")
        found = values.pop("format")
        if found != FORMAT:
            raise ValueError(f"path: expected a calibration of format {FORMAT}, got format {found} in {path}")

        def figures(entry: dict[str, Any]) -> Figures:
            return Figures(**{**entry, "layers": tuple(entry["layers"])})

        values["single"] = tuple(map(figures, values["single"]))
        values["choices"] = {name: figures(entry) for name, entry in values["choices"].items()}
        values["score_layers"] = None if values["score_layers"] is None else tuple(values["score_layers"])
        return cls(**values)


def calibrate(
    model: Any,
    tokenizer: Any,
    config: SpecPrefillConfig,
    *,
    name: str,
    tasks: Sequence[str] = CALIBRATION_TASKS,
    seeds: Sequence[int] = tuple(range(6)),
    tokens: int = 1024,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    sources: Sequence[Path] | None = None,
    parts: Path | None = None,
    on_prompt: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Read each prompt once, then compare layers and sets of layers.

    Args:
        model: the speculator.
        config: everything but the budget and `score_layers`, which this finds.
        name: what the model is called in the result.
        seeds: of each task; at least two prompts in all, for halves.
        parts: a folder where each prompt's reading is kept: a later call with the same setting goes on there.
        on_prompt: called with (prompts read, prompts in all).

    Raises:
        ValueError: an unknown task, too few prompts, a keep ratio outside (0, 1), or `parts` of another setting.
        NothingToScore: the model cannot read or score such prompts.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"tasks: expected some of {tuple(TASKS)}, got {task!r}")
    if len(set(seeds)) * len(set(tasks)) < 4 or len(set(seeds)) < 2:
        raise ValueError(f"seeds: expected at least 2, and 4 prompts in all, got {len(seeds)} for {len(tasks)} tasks")
    for ratio in keep_ratios:
        if not 0 < ratio < 1:
            raise ValueError(f"keep_ratios: expected fractions in (0, 1), got {ratio}")
    config = config.replace(score_layers=None)
    setting = describe(model, config, name, tasks, seeds, tokens, keep_ratios, sources)
    store = None if parts is None else _Parts(parts, setting)
    # Seeds outermost: every prefix of the work, and each half, holds all tasks.
    plan = [(task, seed) for seed in sorted(set(seeds)) for task in dict.fromkeys(tasks)]
    readings: list[Reading] = []
    for task, seed in plan:
        reading = None if store is None else store.load(task, seed)
        if reading is None:
            sample = make(task, seed, tokens, tokenizer, sources)
            reading = read(Speculator(model, config), tokenizer, sample)
            if store is not None:
                store.save(reading)
        readings.append(reading)
        on_prompt(len(readings), len(plan))
    return compare(readings, config, keep_ratios, setting)


def read(speculator: Speculator, tokenizer: Any, sample: Sample) -> Reading:
    """One capture of the prompt, and the state of each layer."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    prompt = read_prompt(sample.messages if chat else sample.prompt, tokenizer)
    captured = speculator.capture(prompt.input_ids.to(speculator.model.device))
    layers, rows, states = layer_states(captured, speculator.config)
    evidence = evidence_tokens(prompt, sample, tokenizer).cpu()
    return Reading(sample.task, sample.seed, evidence, layers, rows, states)


def compare(
    readings: Sequence[Reading], config: SpecPrefillConfig, keep_ratios: Sequence[float], setting: dict[str, Any]
) -> Calibration:
    """Figures of each layer and of sets of layers, and the choice. Halves are every other seed."""
    table = _Table(readings, config, keep_ratios)
    every = range(len(readings))
    ranked = table.ranking(every)
    chosen, names = _choose(table, every, ranked)
    seeds = sorted({reading.seed for reading in readings})
    halves = [[i for i in every if seeds.index(readings[i].seed) % 2 == half] for half in (0, 1)]
    of_chosen, of_all = [], []
    for half, other in (halves, halves[::-1]):
        own, sets = _choose(table, other, table.ranking(other))
        of_chosen += [table.scores(sets[own])[i] for i in half]
        of_all += [table.scores(sets["all"])[i] for i in half]
    unseen = {
        "prompts": len(of_all),
        "chosen": math.fsum(of_chosen) / len(of_chosen),
        "all": math.fsum(of_all) / len(of_all),
        "difference": paired_difference(of_chosen, of_all).json(),
    }
    layers = readings[0].layers
    return Calibration(
        setting=setting,
        score_layers=None if chosen == "all" else names[chosen],
        single=tuple(table.figures((layer,)) for layer in layers),
        choices={name: table.figures(members) for name, members in names.items()},
        chosen=chosen,
        unseen=unseen,
    )


class _Table:
    """Scores of sets of layers on each prompt, computed once each."""

    def __init__(self, readings: Sequence[Reading], config: SpecPrefillConfig, keep_ratios: Sequence[float]) -> None:
        self.readings = readings
        self._config = config
        self._ratios = tuple(keep_ratios)
        # [P][ratio] -> (part of the evidence kept, whether all of it is)
        self._found: dict[tuple[int, ...], list[list[tuple[float, float]]]] = {}

    def scores(self, layers: tuple[int, ...]) -> list[float]:
        return [
            math.fsum(evidence + complete for evidence, complete in prompt) / (2 * len(prompt))
            for prompt in self._kept(layers)
        ]

    def figures(self, layers: tuple[int, ...]) -> Figures:
        kept, scores = self._kept(layers), self.scores(layers)
        tasks: dict[str, list[float]] = {}
        for reading, score in zip(self.readings, scores):
            tasks.setdefault(reading.task, []).append(score)
        return Figures(
            layers=layers,
            evidence={f"{ratio:g}": _mean([prompt[r][0] for prompt in kept]) for r, ratio in enumerate(self._ratios)},
            complete={f"{ratio:g}": _mean([prompt[r][1] for prompt in kept]) for r, ratio in enumerate(self._ratios)},
            score=_mean(scores),
            tasks={task: _mean(values) for task, values in tasks.items()},
        )

    def ranking(self, prompts: Sequence[int]) -> list[int]:
        """Layers, the best first; ties to the lower index."""
        layers = self.readings[0].layers
        scores = {layer: _mean([self.scores((layer,))[i] for i in prompts]) for layer in layers}
        return sorted(layers, key=lambda layer: (-scores[layer], layer))

    def _kept(self, layers: tuple[int, ...]) -> list[list[tuple[float, float]]]:
        if layers not in self._found:
            self._found[layers] = [self._of(reading, layers) for reading in self.readings]
        return self._found[layers]

    def _of(self, reading: Reading, layers: tuple[int, ...]) -> list[tuple[float, float]]:
        config = self._config
        state = reading.states[[reading.layers.index(layer) for layer in layers]].amax(0, keepdim=True)
        importance = finalize_importance(
            state,
            None,
            torch.tensor([reading.rows], dtype=torch.int32),
            reduce=config.reduce,
            pool_kernel_size=config.pool_kernel_size if config.pool_order == "after_max" else None,
            pool_edge=config.pool_edge,
        )
        kept = []
        for ratio in self._ratios:
            selection = select_chunks(
                importance, keep_ratio=ratio, chunk_size=config.chunk_size, rounding=config.rounding, tail=1
            )
            part = selection.mask(importance.shape[1])[0][reading.evidence].float().mean().item()
            kept.append((part, float(part == 1)))
        return kept


def _choose(table: _Table, prompts: Sequence[int], ranked: Sequence[int]) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The name of the set to use, and all sets by name.

    The largest set that is not clearly worse than the best: at most one standard error of their difference below it.
    """
    layers = tuple(sorted(ranked))
    sets = {"all": layers}
    for count in range(1, len(layers)):
        sets[f"best {count}"] = tuple(sorted(ranked[:count]))
    for first in layers[1:-1]:
        sets.setdefault(f"from {first}", tuple(layer for layer in layers if layer >= first))
    scores = {name: [table.scores(members)[i] for i in prompts] for name, members in sets.items()}
    best = max(sets, key=lambda name: (_mean(scores[name]), len(sets[name])))

    def close(name: str) -> bool:
        differences = [a - b for a, b in zip(scores[best], scores[name])]
        centre = _mean(differences)
        variance = math.fsum((value - centre) ** 2 for value in differences) / max(len(differences) - 1, 1)
        return centre <= math.sqrt(variance / len(differences))

    return max(filter(close, sets), key=lambda name: (len(sets[name]), _mean(scores[name]))), sets


class _Parts:
    """Readings on disk, one file each, beside the setting they were made with."""

    def __init__(self, folder: Path, setting: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, note = folder, folder / "setting.json"
        # The command removes the folder in the end: it must hold nothing but ours.
        if not note.exists() and any(folder.iterdir()):
            raise ValueError(f"parts: expected an empty folder or one of a calibration, got {folder} with other files")
        if note.exists():
            found = json.loads(note.read_text(encoding="utf-8"))
            # More prompts or other keep ratios may follow; what the states depend on must be equal.
            for key in ("model", "config", "tokens", "sources"):
                if found.get(key) != json.loads(json.dumps(setting[key])):
                    raise ValueError(f"parts: expected {key} {setting[key]}, got {found.get(key)} in {folder}")
        note.write_text(json.dumps(setting), encoding="utf-8")

    def load(self, task: str, seed: int) -> Reading | None:
        file = self._file(task, seed)
        if not file.exists():
            return None
        values = torch.load(file, weights_only=True)
        return Reading(**{**values, "layers": tuple(values["layers"])})

    def save(self, reading: Reading) -> None:
        file = self._file(reading.task, reading.seed)
        unfinished = file.with_suffix(".unfinished")
        torch.save({**vars(reading), "layers": list(reading.layers)}, unfinished)
        unfinished.replace(file)

    def _file(self, task: str, seed: int) -> Path:
        return self._folder / f"{task}-{seed}.pt"


def describe(
    model: Any,
    config: SpecPrefillConfig,
    name: str,
    tasks: Sequence[str],
    seeds: Sequence[int],
    tokens: int,
    keep_ratios: Sequence[float],
    sources: Sequence[Path] | None,
) -> dict[str, Any]:
    skipped = ("score_layers", "min_prompt_tokens", "backend", "prefill_chunk", "protect", "turn_end_tokens")
    return {
        "model": {
            "name": name,
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": _fingerprint(model),
        },
        "config": {
            key: value for key, value in asdict(config).items() if not key.startswith("keep_") and key not in skipped
        },
        "tasks": list(dict.fromkeys(tasks)),
        "seeds": sorted(set(seeds)),
        "tokens": tokens,
        "keep_ratios": list(keep_ratios),
        "sources": None
        if sources is None
        else {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in sources},
    }


def _fingerprint(model: Any) -> str:
    """Names, shapes and the first values of all weights: tells models apart without reading gigabytes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
