"""Answers each prompt with the tokens of each method, and keeps a record of every answer.

One speculation of a prompt serves all keep ratios: its seconds count in each of their first tokens, as they would if
each had run alone. The base reads the tokens of every method in the same way, at their original positions, and decodes
greedily.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.continuing import ContinuingRun
from specprefill_kernels.loop.decoding import decode, plan_decoding
from specprefill_kernels.loop.prefill import BaseRun
from specprefill_kernels.loop.prompts import Prompt, encoded_prompt
from specprefill_kernels.loop.results import PromptSelection
from specprefill_kernels.loop.speculator import NothingToScore
from specprefill_kernels.quality.longbench import LongBenchSample
from specprefill_kernels.quality.methods import METHODS, baseline, forced_tokens, random_chunk
from specprefill_kernels.quality.metrics import score
from specprefill_kernels.quality.records import Key, Record, RecordFile
from specprefill_kernels.quality.tasks import Sample

KEEP_RATIOS = (0.1, 0.2, 0.3, 0.5)
FULL_RATIO = 1.0

MakeSample = Callable[[], Sample]


@dataclass(frozen=True)
class Planned:
    """A prompt to come: its task and seed, and how it is made when its turn comes."""

    task: str
    seed: int
    make: MakeSample


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    seconds: dict[str, float]


class Runner:
    """Answers prompts with the tokens of several methods.

    Args:
        loop: base, speculator, tokenizers and configuration; the budget of the configuration is not used.
        keep_ratios: each in (0, 1).
        methods: names in `METHODS`.

    Raises:
        ValueError: an argument is wrong, or the base cannot read a part of a prompt.
    """

    def __init__(
        self, loop: SpecPrefill, keep_ratios: Sequence[float] = KEEP_RATIOS, methods: Sequence[str] = METHODS
    ) -> None:
        for ratio in keep_ratios:
            if not 0 < ratio < 1:
                raise ValueError(f"keep_ratios: expected fractions in (0, 1), got {ratio!r}")
        for method in methods:
            if method not in METHODS:
                raise ValueError(f"methods: expected some of {METHODS}, got {method!r}")
        if loop.tokenizer is None:
            raise ValueError("loop: expected one with a tokenizer, got none")
        if loop.base_problem is not None:
            raise ValueError(f"base: expected a model that can read a part of a prompt, got {loop.base_problem}")
        self.loop = loop
        self.keep_ratios = tuple(dict.fromkeys(keep_ratios))
        self.methods = tuple(method for method in METHODS if method in methods)

    def keys(self, task: str, seed: int) -> list[Key]:
        """What there is to do for one prompt, in the order in which it is done."""
        ratios = [(method, ratio) for ratio in self.keep_ratios for method in self.methods if method != "full"]
        full = [("full", FULL_RATIO)] if "full" in self.methods else []
        return [(task, seed, method, ratio) for method, ratio in [*full, *ratios]]

    def run(self, sample: Sample, wanted: Iterable[Key]) -> Iterator[Record]:
        """Records of one prompt, those of `wanted` alone."""
        wanted = set(wanted)
        reading = _Reading(self.loop, sample)
        for key in self.keys(sample.task, sample.seed):
            if key in wanted:
                yield self._record(reading, sample, key)

    def _record(self, reading: _Reading, sample: Sample, key: Key) -> Record:
        method, ratio = key[2], key[3]
        selection = None if method == "full" else reading.selection(ratio)
        if selection is None:
            indices = torch.arange(reading.length)
        elif method == "kept":
            indices = selection.kept_indices.cpu()
        else:
            config = self._config(ratio)
            indices = baseline(
                method,
                forced_tokens(selection, config),
                selection.kept_tokens,
                random_chunk(config),
                seed=f"{sample.task}/{sample.seed}/{ratio}",
            )
        # Baselines need no speculator, so its seconds are not theirs.
        before = selection.seconds if method == "kept" and selection is not None else reading.seconds
        answer = reading.answer(indices, before, sample.max_new_tokens, kept=method == "kept")
        judged, classes = answer.text, tuple[str, ...]()
        if isinstance(sample, LongBenchSample):
            judged, classes = sample.judged(answer.text), sample.classes
        return Record(
            task=sample.task,
            seed=sample.seed,
            method=method,
            keep_ratio=ratio,
            metric=sample.metric,
            score=score(sample.metric, judged, sample.answers, classes),
            answer=answer.text,
            new_tokens=answer.tokens,
            prompt_tokens=reading.length,
            kept_tokens=indices.shape[0],
            mode="dense" if indices.shape[0] == reading.length else "sparse",
            reason="" if selection is None else selection.reason,
            evidence=reading.evidence_read(indices),
            seconds=answer.seconds,
            ttft=sum(value for stage, value in answer.seconds.items() if stage != "decode"),
            note=sample.note if isinstance(sample, LongBenchSample) else "",
        )

    def _config(self, ratio: float) -> SpecPrefillConfig:
        return with_ratio(self.loop.config, ratio)


class _Reading:
    """One prompt in tokens, its speculation once it is needed, and what the base makes of parts of it."""

    def __init__(self, loop: SpecPrefill, sample: Sample) -> None:
        self._loop = loop
        self._clock = StageClock(loop.base.device)
        chat = getattr(loop.tokenizer, "chat_template", None) and not (
            isinstance(sample, LongBenchSample) and not sample.chat
        )
        self._prompt, self._protection = loop.read(sample.messages if chat else sample.prompt, None, None, self._clock)
        self.length = int(self._prompt.input_ids.shape[1])
        self.seconds = dict(self._clock.seconds)
        self._evidence = evidence_tokens(self._prompt, sample, loop.tokenizer)
        self._speculation: Any = None
        self._selections: dict[float, PromptSelection] = {}

    def selection(self, ratio: float) -> PromptSelection:
        if ratio not in self._selections:
            self._selections[ratio] = self._select(with_ratio(self._loop.config, ratio))
        return self._selections[ratio]

    def _select(self, config: SpecPrefillConfig) -> PromptSelection:
        selector = self._loop.selector
        if selector.dense_reason(self._prompt, self._protection) is None:
            try:
                if self._speculation is None:
                    self._speculation = selector.speculate(self._prompt, self._clock)
                own = StageClock(self._loop.base.device)
                own.seconds.update(self._clock.seconds)
                return selector.choose(self._prompt, self._protection, self._speculation, own, config=config)
            except NothingToScore:
                pass
        # The loop's own dense result, with its reason.
        return selector.select(self._prompt, self._protection, self._clock)

    def answer(self, indices: Tensor, before: Mapping[str, float], max_new_tokens: int, *, kept: bool) -> Answer:
        """What the base writes after reading the tokens `indices` [K].

        Args:
            before: stage -> seconds that came before the base's prefill.
            kept: they are the loop's own selection. Where it scores with the base's own lower layers, the upper ones go
                on with the kept tokens, so the lower layers' seconds are in the base's prefill.
        """
        base: Any = self._loop.base
        tokenizer: Any = self._loop.tokenizer
        layers = self._loop.continuing_layers if kept else None
        clock = StageClock(base.device)
        clock.seconds.update(before)
        sparse = indices.shape[0] < self.length
        step: Callable[[Tensor], Tensor]
        if sparse and layers is not None:
            clock.seconds.pop("speculator_prefill", None)
        with clock.stage("base_prefill"):
            input_ids = self._prompt.input_ids.to(base.device)
            positions = indices.to(base.device)
            plan = plan_decoding(base, input_ids, max_new_tokens=max_new_tokens, do_sample=False, tokenizer=tokenizer)
            if sparse and layers is not None:
                config = self._loop.config
                continuing = ContinuingRun(
                    base, layers, rows=config.look_ahead, room=max_new_tokens, prefill_chunk=config.prefill_chunk
                )
                logits, step = continuing.prefill(input_ids, lambda _: positions), continuing.step
            else:
                run = BaseRun(base, self.length, sparse=sparse, room=max_new_tokens)
                logits, step = run.prefill(input_ids[:, positions] if sparse else input_ids, positions), run.step
            tokens = decode(plan, input_ids, logits, step)
            generated = [next(tokens)]
        with clock.stage("decode"):
            generated.extend(tokens)
        return Answer(tokenizer.decode(generated, skip_special_tokens=True), len(generated), clock.seconds)

    def evidence_read(self, indices: Tensor) -> float | None:
        """The part of the evidence's tokens among `indices`; None without evidence."""
        if not self._evidence.any():
            return None
        return int(self._evidence[indices].sum()) / int(self._evidence.sum())


def evidence_tokens(prompt: Prompt, sample: Sample, tokenizer: Any) -> Tensor:
    """[T] bool: the tokens of the rendered prompt that touch a character of the sample's evidence.

    Raises:
        ValueError: the chat template changed the message, so that its characters cannot be found again.
    """
    touched = torch.zeros(prompt.input_ids.shape[1], dtype=torch.bool)
    if not sample.evidence:
        return touched
    text, spans = encoded_prompt(prompt, tokenizer)
    # Templates may strip a message.
    stripped = sample.prompt.strip()
    start = text.find(stripped)
    if start < 0:
        raise ValueError(f"{sample.task}: expected the chat template to keep the user's message as it is")
    shift = start - sample.prompt.index(stripped)
    left, right = spans.cpu().unbind(1)
    for first, last in sample.evidence:
        touched |= (left < last + shift) & (right > first + shift)
    return touched


def with_ratio(config: SpecPrefillConfig, ratio: float) -> SpecPrefillConfig:
    return config.replace(keep_ratio=ratio, keep_tokens=None, keep_mass=None)


def evaluate(
    runner: Runner,
    plan: Sequence[Planned],
    file: RecordFile,
    *,
    on_record: Callable[[Record], None] = lambda record: None,
    seconds: float | None = None,
) -> bool:
    """Does what of `plan` is not in `file` yet. Whole prompts, so that methods stay paired.

    Args:
        on_record: called after each record.
        seconds: no new prompt is begun after that many.

    Returns:
        Whether everything is done.
    """
    stop = None if seconds is None else time.monotonic() + seconds
    warm = False
    for planned in plan:
        wanted = [key for key in runner.keys(planned.task, planned.seed) if key not in file.done]
        if not wanted:
            continue
        if stop is not None and time.monotonic() > stop:
            return False
        sample = planned.make()
        if not warm:
            # The first forwards of a process pay for what all later ones find ready.
            kept = [key for key in wanted if key[2] == "kept"]
            for _ in runner.run(sample, (kept or wanted)[:1]):
                warm = True
        for record in runner.run(sample, wanted):
            file.append(record)
            on_record(record)
    return True


def describe(
    runner: Runner,
    *,
    base: str,
    speculator: str | None,
    self_layers: str | None = None,
    tasks: Sequence[str],
    seeds: tuple[int, int],
    tokens: int,
    answer_tokens: int,
    files: Sequence[Path] = (),
    versions: dict[str, str],
    machine: str,
) -> dict[str, Any]:
    """The whole setting: results that differ in one of these do not belong together."""
    loop = runner.loop
    config = {name: value for name, value in asdict(loop.config).items() if not name.startswith("keep_")}
    return {
        "base": {"name": base, **_model(loop.base)},
        "speculator": None if speculator is None else {"name": speculator},
        "self_layers": self_layers,
        "config": config,
        "keep_ratios": list(runner.keep_ratios),
        "methods": list(runner.methods),
        "tasks": list(tasks),
        "seeds": list(seeds),
        "tokens": tokens,
        "answer_tokens": answer_tokens,
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files},
        "versions": versions,
        "machine": machine,
    }


def _model(model: Any) -> dict[str, Any]:
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
