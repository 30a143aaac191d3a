"""From one prompt to the tokens that the base will read: every decision to run dense is taken here, with its reason.

    dense_reason -> speculate -> choose            `select` is the three in a row

One speculation serves many choices: `choose` may be called again with other budgets.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specprefill_kernels._backends import resolve
from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.budgets import budget_tokens, keep_tokens, spans_of_mask
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.prompts import Crossing, Prompt, TokenBridge
from specprefill_kernels.loop.protection import Protection
from specprefill_kernels.loop.results import PromptSelection
from specprefill_kernels.loop.scoring import Captured, NothingToScore, Speculation, score_captured
from specprefill_kernels.loop.speculator import Speculator

if TYPE_CHECKING:
    from specprefill_kernels.loop.costs import CostModel, Prediction
    from specprefill_kernels.loop.memory import SpeculatorMemory

logger = logging.getLogger("specprefill_kernels")


class Selector:
    """Scores a prompt with the speculator and selects what the base reads of it.

    Args:
        speculator: None when `problem` says why there is none.
        bridge: None when speculator and base share their tokens.
        problem: a reason for which every prompt runs dense.
        device: where `kept_indices` and `importance` go.
        costs: predicts the seconds of both ways; a prompt for which the sparse way would take longer runs dense.
    """

    def __init__(
        self,
        speculator: Speculator | None,
        bridge: TokenBridge | None,
        config: SpecPrefillConfig,
        problem: str | None,
        device: torch.device,
        costs: CostModel | None = None,
    ) -> None:
        self._speculator = speculator
        self._bridge = bridge
        self._config = config
        self._problem = problem
        self._device = device
        self._costs = costs

    def select(
        self,
        prompt: Prompt,
        protection: Protection,
        clock: StageClock,
        *,
        memory: SpeculatorMemory | None = None,
        per_layer: bool = False,
    ) -> PromptSelection:
        """What the base reads of this prompt.

        Args:
            protection: what must survive, see `find_protection`.
            clock: takes the seconds of each stage.
            memory: what the speculator remembers of an earlier prompt; it stands for this one afterwards.
            per_layer: also give each layer's own importance.
        """
        reason, prediction = self.dense_reason(prompt, protection), None
        if reason is None:
            try:
                crossing = self._cross(prompt, clock)
                # With a cache to go on from, the seconds of whole prompts say nothing.
                if self._costs is not None and not memory:
                    prediction, reason = self._predict(prompt, protection, crossing, continues=memory is None)
                if reason is None:
                    speculation = self._speculate(prompt, crossing, clock, memory, per_layer)
                    selection = self.choose(prompt, protection, speculation, clock, prediction=prediction)
                    return selection if prediction is None else self._predicted_again(selection, crossing)
            except NothingToScore as problem:
                reason = str(problem)
        return self._dense(prompt, protection, reason, clock, prediction)

    def dense_selection(self, prompt: Prompt, protection: Protection, clock: StageClock) -> PromptSelection | None:
        """The whole prompt, where that is clear before anything is scored; else None."""
        reason, prediction = self.dense_reason(prompt, protection), None
        if reason is None and self._costs is not None:
            prediction, reason = self._predict(prompt, protection, self._cross(prompt, clock))
        return None if reason is None else self._dense(prompt, protection, reason, clock, prediction)

    def select_captured(
        self, prompt: Prompt, protection: Protection, captured: Captured, clock: StageClock
    ) -> PromptSelection:
        """`select` where the base's own lower layers were captured already; `dense_selection` said None before."""
        prediction = None if self._costs is None else self._predict(prompt, protection, None)[0]
        try:
            with clock.stage("score"):
                speculation = score_captured(captured, self._config)
        except NothingToScore as problem:
            return self._dense(prompt, protection, str(problem), clock, prediction)
        selection = self.choose(prompt, protection, speculation, clock, prediction=prediction)
        return selection if prediction is None else self._predicted_again(selection, None)

    def dense_reason(self, prompt: Prompt, protection: Protection) -> str | None:
        """Why this prompt needs no speculator at all; None when it does."""
        config, seq_len = self._config, prompt.input_ids.shape[1]
        if self._problem is not None:
            return self._problem
        if seq_len < config.min_prompt_tokens:
            return f"prompt too short: {seq_len} tokens, min_prompt_tokens is {config.min_prompt_tokens}"
        if config.keeps_all(seq_len):
            return (
                f"the budget keeps everything: {_budget(config)} of {seq_len} tokens in chunks of {config.chunk_size}"
            )
        if protection.mask is not None and bool(protection.mask.all()):
            return "every token is protected"
        return None

    def speculate(
        self, prompt: Prompt, clock: StageClock, *, memory: SpeculatorMemory | None = None, per_layer: bool = False
    ) -> Speculation:
        """Run the speculator; its importance is carried over to the base's tokens.

        Raises:
            NothingToScore: this prompt cannot be scored.
        """
        return self._speculate(prompt, self._cross(prompt, clock), clock, memory, per_layer)

    def choose(
        self,
        prompt: Prompt,
        protection: Protection,
        speculation: Speculation,
        clock: StageClock,
        *,
        config: SpecPrefillConfig | None = None,
        prediction: Prediction | None = None,
    ) -> PromptSelection:
        """Spend the budget on what `speculate` found.

        Args:
            speculation: with importance over the base's tokens.
            config: another budget, chunk size, sink or tail than the Selector's, for the same importance.
            prediction: goes into the result.
        """
        config = self._config if config is None else config
        seq_len = prompt.input_ids.shape[1]
        with clock.stage("select"):
            importance = speculation.importance
            must_keep = None if protection.mask is None else protection.mask.to(importance.device)
            mask, overflow = keep_tokens(importance, must_keep, config)
            kept = mask.nonzero()[:, 0].to(self._device)
            spans = spans_of_mask(mask)
        count = kept.shape[0]
        dense = count == seq_len
        if dense:
            reason = "the selection kept every token"
        else:
            reason = f"kept {count} of {seq_len} tokens{_account(protection)}"
        if overflow:
            reason += _overflow(must_keep, config, seq_len)
        attention, attention_reason = speculation.attention
        if attention_reason:
            reason += f"; speculator attention {attention}: {attention_reason}"
        used = {speculation.backend, resolve("select_chunks", config.backend, importance.device.type)}
        layers = speculation.layer_importance
        return PromptSelection(
            input_ids=prompt.input_ids[0],
            importance=importance.to(self._device),
            kept_indices=kept,
            spans=spans,
            mode="dense" if dense else "sparse",
            reason=_with_notes(reason, protection),
            seconds=dict(clock.seconds),
            backend="+".join(sorted(used)),
            overflow=overflow,
            num_look_ahead=speculation.num_look_ahead,
            look_ahead_tokens=speculation.look_ahead_tokens,
            scored_layers=speculation.layers,
            protected=protection.spans,
            protected_parts=protection.where,
            layer_importance=None if layers is None else layers.to(self._device),
            prediction=prediction,
            reused_tokens=speculation.reused_tokens,
            speculator_attention=attention,
            attention_reason=attention_reason,
        )

    def _dense(
        self, prompt: Prompt, protection: Protection, reason: str, clock: StageClock, prediction: Prediction | None
    ) -> PromptSelection:
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
            protected=protection.spans,
            protected_parts=protection.where,
            prediction=prediction,
        )

    def _cross(self, prompt: Prompt, clock: StageClock) -> Crossing | None:
        """The prompt in the speculator's own tokens; None where they are the base's."""
        if self._bridge is None:
            return None
        with clock.stage("tokenize"):
            return self._bridge.cross(prompt)

    def _predict(
        self, prompt: Prompt, protection: Protection, crossing: Crossing | None, *, continues: bool = True
    ) -> tuple[Prediction, str | None]:
        """Seconds of both ways before anything ran, and why dense is the faster one, if it is."""
        assert self._costs is not None
        config, seq_len = self._config, prompt.input_ids.shape[1]
        protected = 0 if protection.mask is None else int(protection.mask.sum())
        budget = budget_tokens(config, seq_len)
        # How much keep_mass keeps is known after scoring; even its least must pay.
        fewest = max(config.chunk_size if budget is None else budget, protected)
        speculator_tokens = _speculator_tokens(seq_len, crossing)
        prediction = self._costs.predict(seq_len, min(fewest, seq_len), speculator_tokens, continues=continues)
        return prediction, None if prediction.pays else f"sparse prefill would not pay: {prediction.text}"

    def _predicted_again(self, selection: PromptSelection, crossing: Crossing | None) -> PromptSelection:
        """With the tokens that keep_mass really kept.

        The speculator's seconds are spent by now, and the kept tokens are fewer than all: going on is right even where
        a full prefill from the start would have been faster. Then the reason says so.
        """
        if self._config.keep_mass is None or selection.prediction is None:
            return selection
        assert self._costs is not None
        seq_len, continues = selection.prompt_tokens, selection.prediction.continues
        speculator_tokens = _speculator_tokens(seq_len, crossing)
        prediction = self._costs.predict(seq_len, selection.kept_tokens, speculator_tokens, continues=continues)
        reason = selection.reason
        if not prediction.pays:
            reason += f"; known after scoring: sparse prefill did not pay, {prediction.text}"
        return replace(selection, prediction=prediction, reason=reason)

    def _speculate(
        self,
        prompt: Prompt,
        crossing: Crossing | None,
        clock: StageClock,
        memory: SpeculatorMemory | None,
        per_layer: bool,
    ) -> Speculation:
        if self._speculator is None:
            raise NothingToScore("no speculator")
        model: Any = self._speculator.model
        ids = prompt.input_ids if crossing is None else crossing.input_ids
        self._check_vocabulary(ids, model, own=crossing is not None)
        speculation = self._speculator.score(ids.to(model.device), clock, memory=memory, per_layer=per_layer)
        if crossing is None:
            return speculation
        with clock.stage("select"):
            changes: dict[str, Any] = {"importance": crossing.back(speculation.importance)}
            if speculation.layer_importance is not None:
                changes["layer_importance"] = torch.stack([crossing.back(one) for one in speculation.layer_importance])
            return replace(speculation, **changes)

    @staticmethod
    def _check_vocabulary(ids: Tensor, model: Any, own: bool) -> None:
        size = model.get_input_embeddings().weight.shape[0]
        if int(ids.max()) >= size:
            cure = (
                "speculator_tokenizer is not its own" if own else "give speculator_tokenizer if its tokens are others"
            )
            raise ValueError(
                f"speculator: expected a vocabulary that holds id {int(ids.max())}, got one of {size}; {cure}"
            )


def _speculator_tokens(seq_len: int, crossing: Crossing | None) -> int:
    return seq_len if crossing is None else int(crossing.input_ids.shape[1])


def _budget(config: SpecPrefillConfig) -> str:
    name, value = next(iter(config.budget.items()))
    return f"{name}={value}"


def _account(protection: Protection) -> str:
    """', 57 protected (markers 40, turn end 17)'."""
    if protection.mask is None:
        return ""
    parts = ", ".join(f"{label} {count}" for label, count in protection.parts.items())
    return f", {int(protection.mask.sum())} protected ({parts})"


def _overflow(must_keep: Tensor | None, config: SpecPrefillConfig, seq_len: int) -> str:
    budget = f"the budget of {budget_tokens(config, seq_len)} ({_budget(config)})"
    forced = "the last chunk" if max(config.sink, config.tail) == 0 else "the chunks of sink and tail"
    if must_keep is None:
        return f"; {forced} exceed {budget}"
    return f"; {int(must_keep.sum())} tokens that must survive and {forced} exceed {budget}"


def _with_notes(reason: str, protection: Protection) -> str:
    return "; ".join([reason, *protection.notes])
