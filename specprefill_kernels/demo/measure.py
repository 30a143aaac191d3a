"""Full against speculative prefill on the same models and prompt, in turns, in one process."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.demo.document import Story
from specprefill_kernels.demo.reading import as_prompt, read
from specprefill_kernels.loop import GenerationResult, SpecPrefill
from specprefill_kernels.models.progress import Progress
from specprefill_kernels.report.data import Comparison, Measured

WARM_UP_CHARS = 3_000  # enough that the warm-up is sparse too, so both sides have run every kernel once


@dataclass(frozen=True)
class Side:
    """A model with its tokenizer and the name it goes by."""

    name: str
    model: Any
    tokenizer: Any


def compare(
    base: Side,
    speculator: Side,
    story: Story,
    config: SpecPrefillConfig,
    progress: Progress,
    *,
    rounds: int = 2,
    max_new_tokens: int = 40,
    command: str = "",
) -> Comparison:
    """Answers `story` both ways and times them.

    Both sides are warmed up on a short prompt. Then they take turns, the second round in the other order, so that a
    machine that is slowing down or speeding up favours neither. The first round gives the answers, every round a time;
    the figures are means over the rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")

    def loop(with_config: SpecPrefillConfig) -> SpecPrefill:
        return SpecPrefill(
            base.model,
            speculator.model,
            with_config,
            tokenizer=base.tokenizer,
            speculator_tokenizer=speculator.tokenizer,
        )

    prompt = as_prompt(story.prompt, base.tokenizer)
    # The whole prompt as budget: the loop then runs an ordinary dense prefill of the base, and no speculator.
    dense = config.replace(keep_ratio=1.0, keep_tokens=None, keep_mass=None)
    sides = {"Full prefill": loop(dense), "Speculative prefill": loop(config)}
    with progress.task("Warm-up of both sides on a short prompt"):
        short = as_prompt(story.prompt[:WARM_UP_CHARS], base.tokenizer)
        for side in sides.values():
            side.generate(short, max_new_tokens=2)

    results: dict[str, list[GenerationResult]] = {label: [] for label in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for label in order:
            with progress.task(f"{label}, round {number + 1} of {rounds}"):
                tokens = max_new_tokens if number == 0 else 1
                results[label].append(sides[label].generate(prompt, max_new_tokens=tokens))

    full, sparse = results["Full prefill"], results["Speculative prefill"]
    selection = sparse[0].selection
    if selection.importance is not None:
        with progress.task("Importance by layer, for the page"):
            layers = sides["Speculative prefill"].select(prompt, per_layer=True).layer_importance
        selection = dataclasses.replace(selection, layer_importance=layers)
    reading = read(
        selection,
        prompt,
        base.tokenizer,
        config,
        title=story.title,
        base=base.name,
        speculator=speculator.name,
        question=story.question,
        passages=() if story.inserted is None else (story.inserted,),
        machine=machine(),
        command=command,
    )
    return Comparison.of(
        reading,
        full=_measured(full, story),
        sparse=_measured(sparse, story),
        expected=story.expected,
        inserted=story.inserted,
        same_model=base.model is speculator.model,
    )


def _measured(results: Sequence[GenerationResult], story: Story) -> Measured:
    first = results[0]
    stages = [stage for stage in first.seconds if stage != "decode"]
    return Measured(
        ttft=sum(result.ttft for result in results) / len(results),
        seconds={stage: sum(result.seconds[stage] for result in results) / len(results) for stage in stages},
        tokens_read=first.kept_tokens,
        answer=first.text,
        right=story.is_right(first.text),
        rounds=[result.ttft for result in results],
    )


def machine() -> str:
    """The processor (or GPU), as its maker calls it, and the threads in use."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
