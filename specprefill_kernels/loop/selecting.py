"""From one prompt to the tokens that the base will read: every decision to run dense is taken here, with its reason."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels._backends import resolve
from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.prompts import Prompt, TokenBridge
from specprefill_kernels.loop.results import PromptSelection, Span
from specprefill_kernels.loop.speculator import NothingToScore, Speculation, Speculator
from specprefill_kernels.ops.select import select_chunks

logger = logging.getLogger("specprefill_kernels")


class Selector:
    """Scores a prompt with the speculator and selects its chunks.

    Args:
        speculator: None when `problem` says why there is none.
        bridge: None when speculator and base share their tokens.
        problem: a reason for which every prompt runs dense.
        device: where `kept_indices` and `importance` go.
    """

    def __init__(
        self,
        speculator: Speculator | None,
        bridge: TokenBridge | None,
        config: SpecPrefillConfig,
        problem: str | None,
        device: torch.device,
    ) -> None:
        self._speculator = speculator
        self._bridge = bridge
        self._config = config
        self._problem = problem
        self._device = device

    def select(self, prompt: Prompt, protect: Sequence[Span] | None, clock: StageClock) -> PromptSelection:
        seq_len = prompt.input_ids.shape[1]
        protected = protect_mask(protect, seq_len)
        reason = self._dense_reason(seq_len, protected)
        if reason is None:
            try:
                return self._sparse(prompt, protected, clock)
            except NothingToScore as problem:
                reason = str(problem)
        return self._dense(prompt, reason, clock)

    def _dense_reason(self, seq_len: int, protected: Tensor | None) -> str | None:
        config = self._config
        if self._problem is not None:
            return self._problem
        if seq_len < config.min_prompt_tokens:
            return f"prompt too short: {seq_len} tokens, min_prompt_tokens is {config.min_prompt_tokens}"
        if config.keeps_all(seq_len):
            name, value = next(iter(config.budget.items()))
            return f"the budget keeps everything: {name}={value} of {seq_len} tokens in chunks of {config.chunk_size}"
        if protected is not None and bool(protected.all()):
            return "every token is protected"
        return None

    def _dense(self, prompt: Prompt, reason: str, clock: StageClock) -> PromptSelection:
        logger.info("dense prefill: %s", reason)
        seq_len = prompt.input_ids.shape[1]
        return PromptSelection(
            input_ids=prompt.input_ids[0],
            importance=None,
            kept_indices=torch.arange(seq_len, device=self._device),
            spans=((0, seq_len),),
            mode="dense",
            reason=reason,
            seconds=dict(clock.seconds),
            backend="none",
        )

    def _sparse(self, prompt: Prompt, protected: Tensor | None, clock: StageClock) -> PromptSelection:
        config, seq_len = self._config, prompt.input_ids.shape[1]
        speculation = self._speculate(prompt, clock)
        with clock.stage("select"):
            importance = speculation.importance[None]
            selection = select_chunks(
                importance,
                chunk_size=config.chunk_size,
                rounding=config.rounding,
                protect=None if protected is None else protected.to(importance.device),
                sink=config.sink,
                # The first answer token is read off the last prompt token: without it the answer starts elsewhere.
                tail=max(config.tail, 1),
                backend=config.backend,
                **config.budget,
            )
            kept = selection.indices[0, : int(selection.num_kept[0])].to(self._device, torch.int64)
            spans = tuple(selection.spans(0))
        dense = kept.shape[0] == seq_len
        used = {speculation.backend, resolve("select_chunks", config.backend, importance.device.type)}
        return PromptSelection(
            input_ids=prompt.input_ids[0],
            importance=importance[0].to(self._device),
            kept_indices=kept,
            spans=spans,
            mode="dense" if dense else "sparse",
            reason="the selection kept every token" if dense else f"kept {kept.shape[0]} of {seq_len} tokens",
            seconds=dict(clock.seconds),
            backend="+".join(sorted(used)),
            overflow=bool(selection.overflow[0]),
            num_look_ahead=speculation.num_look_ahead,
            look_ahead_tokens=speculation.look_ahead_tokens,
            scored_layers=speculation.layers,
        )

    def _speculate(self, prompt: Prompt, clock: StageClock) -> Speculation:
        """Speculation with its importance over the base's tokens."""
        if self._speculator is None:
            raise NothingToScore("no speculator")
        model: Any = self._speculator.model
        if self._bridge is None:
            ids = prompt.input_ids
            self._check_vocabulary(ids, model)
            return self._speculator.score(ids.to(model.device), clock)
        with clock.stage("tokenize"):
            ids, base_offsets, speculator_offsets = self._bridge.cross(prompt)
        speculation = self._speculator.score(ids.to(model.device), clock)
        with clock.stage("select"):
            importance = self._bridge.back(speculation.importance, base_offsets, speculator_offsets)
        return Speculation(
            importance,
            speculation.num_look_ahead,
            speculation.layers,
            speculation.look_ahead_tokens,
            speculation.backend,
        )

    @staticmethod
    def _check_vocabulary(ids: Tensor, model: Any) -> None:
        size = model.get_input_embeddings().weight.shape[0]
        if int(ids.max()) >= size:
            raise ValueError(
                f"speculator: expected a vocabulary that holds id {int(ids.max())}, got one of {size}; "
                "give speculator_tokenizer if its tokens are others"
            )


def protect_mask(protect: Sequence[Span] | None, seq_len: int) -> Tensor | None:
    """[1, T] bool from (start, end) token spans, end exclusive; None for no span at all.

    Raises:
        ValueError: a span is empty or leaves the prompt.
    """
    if not protect:
        return None
    mask = torch.zeros(1, seq_len, dtype=torch.bool)
    for index, span in enumerate(protect):
        try:
            start, end = span
        except (TypeError, ValueError):
            raise ValueError(f"protect[{index}]: expected a pair (start, end), got {span!r}") from None
        if not 0 <= start < end <= seq_len:
            raise ValueError(f"protect[{index}]: expected 0 <= start < end <= {seq_len}, got ({start}, {end})")
        mask[0, start:end] = True
    return mask
