"""Rows of a pair with real weights, through `SpecPrefill` itself: its own stages, its own decision to run sparse.

Full and speculative prefill take turns on one prompt. The full one is the same class with the whole prompt as budget.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.transcripts import Message, Transcript
from bench.ttft_models import title
from bench.ttft_rows import config_for, medians, ratios
from specprefill_kernels.loop import GenerationResult, SpecPrefill
from specprefill_kernels.loop.support import context_length, num_layers

WARM_UP_CHARACTERS = 3000  # enough that the warm-up is sparse too


class NotSparse(RuntimeError):
    """The loop ran a prompt dense; its reason is the message."""


@dataclass(frozen=True)
class Pair:
    """Two loaded models with their tokenizers."""

    speculator_name: str
    base_name: str
    speculator: Any
    base: Any
    speculator_tokenizer: Any
    tokenizer: Any

    def count(self, messages: list[Message]) -> int:
        """Tokens of a prompt to the model that makes more of them."""
        return max(len(_ids(one, messages)) for one in (self.tokenizer, self.speculator_tokenizer))

    @property
    def context(self) -> int:
        """The most tokens that both take."""
        contexts = [context_length(model) for model in (self.base, self.speculator)]
        return min(one for one in (*contexts, 1 << 30) if one is not None)

    def loop(self, keep: float, preset: str, attention: str) -> SpecPrefill:
        # As users get it: the chat template's parts are protected.
        config = config_for(keep, preset, attention).replace(protect="template")
        return SpecPrefill(
            self.base,
            self.speculator,
            config,
            tokenizer=self.tokenizer,
            speculator_tokenizer=self.speculator_tokenizer,
        )


def _ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def measure(
    pair: Pair,
    transcript: Transcript,
    keeps: Sequence[float],
    report: Callable[[int, int], None],
    *,
    rounds: int,
    preset: str = "default",
    attention: str = "dense",
) -> list[dict[str, Any]]:
    """One row for each budget.

    Raises:
        NotSparse: a speculative run was dense.
    """
    full = pair.loop(1.0, preset, "dense")
    sparse = {keep: pair.loop(keep, preset, attention) for keep in keeps}
    prompt = [dict(message) for message in transcript.messages]
    text = "\n".join(message["content"] for message in prompt)
    warm = [{"role": "user", "content": text[:WARM_UP_CHARACTERS]}]
    for one in (full, *sparse.values()):
        one.generate(warm, max_new_tokens=1)
    total, done = rounds * (1 + len(keeps)), 0
    dense: list[GenerationResult] = []
    found: dict[float, list[GenerationResult]] = {keep: [] for keep in keeps}
    for number in range(rounds):
        ways = [(dense, full), *((found[keep], sparse[keep]) for keep in keeps)]
        for results, loop in ways if number % 2 == 0 else reversed(ways):
            result = loop.generate(prompt, max_new_tokens=1)
            if results is not dense and result.mode != "sparse":
                raise NotSparse(f"{transcript.name}: ran {result.mode}: {result.reason}")
            results.append(result)
            done += 1
            report(done, total)
    how: dict[str, Any] = {"rounds": rounds, "preset": preset, "attention": attention}
    return [_row(pair, asked(pair, transcript, keep, **how), dense, results) for keep, results in found.items()]


def asked(
    pair: Pair, transcript: Transcript, keep: float, *, rounds: int, preset: str = "default", attention: str = "dense"
) -> dict[str, Any]:
    """What a row says of what was asked for, known before anything is measured; all layers always run."""
    return {
        "speculator": title(pair.speculator_name),
        "base": title(pair.base_name),
        "keep_ratio": keep,
        "dtype": str(pair.base.dtype).removeprefix("torch."),
        "device": pair.base.device.type,
        "weights": "real",
        "prompt": transcript.name,
        "speculator_attention": attention,
        "preset": preset,
        "layers_asked": {"speculator": None, "base": None},
        "rounds": rounds,
    }


def _row(
    pair: Pair, requested: dict[str, Any], dense: list[GenerationResult], sparse: list[GenerationResult]
) -> dict[str, Any]:
    stages = medians([{name: value for name, value in one.seconds.items() if name != "decode"} for one in sparse])
    first, whole = sparse[0], statistics.median(one.ttft for one in dense)
    layers = {"speculator": num_layers(pair.speculator), "base": num_layers(pair.base)}
    return {
        **requested,
        "tokens": first.prompt_tokens,
        "kept_tokens": first.kept_tokens,
        **ratios(whole, stages),
        "stages": stages,
        "layers_measured": {name: f"{count} of {count}" for name, count in layers.items()},
        "speculator_attention_ran": first.selection.speculator_attention,
        "base_chunk": None,
        "runs": {"full": [one.ttft for one in dense], "speculative": [one.ttft for one in sparse]},
        "note": "; ".join(filter(None, [f"{first.mode}: {first.reason}", first.selection.attention_reason])),
    }


def load(speculator: str, base: str, dtype: torch.dtype | None, device: str, progress: Any) -> Pair:
    """Both models, fetched if they are not here. Raises what `models.load` raises."""
    from specprefill_kernels import models

    small, small_tokenizer = models.load(speculator, dtype, device, progress)
    large, tokenizer = models.load(base, dtype, device, progress)
    return Pair(speculator, base, small, large, small_tokenizer, tokenizer)
