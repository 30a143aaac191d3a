"""The speculator: reads the whole prompt, decodes a few look-ahead tokens, and says how important each prompt token is.

    prefill -> queries of the last prompt token          (row 0)
    decode  -> queries of N - 1 greedy tokens            (rows 1 .. N - 1)
    score   -> one call of score_layers_ over all layers, one of finalize_importance

With `queries="observation_window"` the rows are the last N prompt tokens' instead: nothing is decoded, and the forward
stops after the last layer that is scored. The same pass over the base's own lower layers needs no second model.
"""

from typing import Any

import torch
from torch import Tensor

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.attention import attention_configs
from specprefill_kernels.loop.cache import full_cache
from specprefill_kernels.loop.capture import Capture
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.scoring import (
    Captured,
    NothingToScore,
    Speculation,
    layer_indices,
    look_ahead_rows,
    prompt_rows,
    score_captured,
)
from specprefill_kernels.loop.support import context_length, head_options, num_layers

__all__ = ["Captured", "NothingToScore", "Speculation", "Speculator"]


class Speculator:
    """A causal language model whose attention is captured and scored.

    Args:
        model: a Transformers model; it may be the base itself.
        config: which layers, rows and normalization; see `SpecPrefillConfig`.
        layer_range: (first, last), both included: score these layers only and stop the forward after the last.
    """

    def __init__(self, model: Any, config: SpecPrefillConfig, layer_range: tuple[int, int] | None = None) -> None:
        self.model = model
        self.config = config
        self._num_layers = num_layers(model)
        self._configs = attention_configs(model)
        self._layers = _wanted_layers(config.score_layers, layer_range, self._num_layers)
        self._last_layer = self._num_layers - 1 if self._layers is None else max(self._layers)
        self._eos = _eos_ids(model)
        self._head = head_options(model)
        self._context = context_length(model)

    def score(self, input_ids: Tensor, clock: StageClock | None = None, *, per_layer: bool = False) -> Speculation:
        """Importance of each token of one prompt.

        Args:
            input_ids: [1, T] on the model's device.
            clock: takes the seconds of "speculator_prefill", "look_ahead" and "score".
            per_layer: also give the importance by each layer alone.

        Raises:
            NothingToScore: the prompt is longer than the model's context, `window="skip"` left no layer, or the model's
                attention was never called.
        """
        clock = clock or StageClock(input_ids.device)
        captured = self.capture(input_ids, clock)
        with clock.stage("score"):
            return score_captured(captured, self.config, layers=self._layers, per_layer=per_layer)

    @torch.no_grad()
    def capture(self, input_ids: Tensor, clock: StageClock | None = None) -> Captured:
        """The forwards alone: query rows and keys of the layers to score. `score_captured` does the rest.

        Raises:
            NothingToScore: the prompt is longer than the model's context.
        """
        if self._context is not None and input_ids.shape[1] > self._context:
            raise NothingToScore(
                f"the speculator reads at most {self._context} tokens, the prompt has {input_ids.shape[1]} of them"
            )
        clock = clock or StageClock(input_ids.device)
        capture = Capture(self._configs, self._layers, self._last_layer)
        rows, ahead = prompt_rows(self.config), look_ahead_rows(self.config)
        tokens: list[int] = []
        if self.config.queries == "observation_window":
            with clock.stage("speculator_prefill"), capture.running(rows, stop=True):
                self._forward_body(input_ids)
        else:
            tokens = self._look_ahead(input_ids, capture, clock)
        return Captured(capture.layers, input_ids.shape[1], self._num_layers, rows, ahead, tuple(tokens))

    def _forward_body(self, input_ids: Tensor) -> None:
        """The decoder without its head and without a cache: keys reach the capture as arguments."""
        body = self.model.base_model
        body(input_ids=input_ids, use_cache=False)

    def _look_ahead(self, input_ids: Tensor, capture: Capture, clock: StageClock) -> list[int]:
        """Prefill, then decode greedily. EOS at step s ends it with s + 1 rows; EOS itself is never fed."""
        steps = self.config.look_ahead - 1
        cache = full_cache(self._num_layers, room=steps)
        tokens: list[int] = []
        logits = None
        with clock.stage("speculator_prefill"), capture.running(prompt_rows(self.config), stop=steps == 0):
            logits = self._forward(input_ids, cache)
        with clock.stage("look_ahead"):
            for step in range(1, steps + 1):
                token = int(logits[0, -1].argmax())
                if token in self._eos:
                    break
                tokens.append(token)
                # The last row's output is not needed, only its queries.
                with capture.running(1, stop=step == steps):
                    logits = self._forward(torch.tensor([[token]], device=input_ids.device), cache)
        return tokens

    def _forward(self, input_ids: Tensor, cache: Any) -> Tensor:
        # No position_ids: they are contiguous, so the model's own counting (from the cache's length) is right.
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **self._head)
        logits: Tensor = output.logits
        return logits


def _wanted_layers(
    score_layers: tuple[int, ...] | None, layer_range: tuple[int, int] | None, count: int
) -> frozenset[int] | None:
    if score_layers is None:
        return None if layer_range is None else frozenset(range(layer_range[0], layer_range[1] + 1))
    wanted = layer_indices(score_layers, count)
    if layer_range is not None and not wanted <= set(range(layer_range[0], layer_range[1] + 1)):
        raise ValueError(f"score_layers: expected layers within self_layers {layer_range}, got {score_layers}")
    return wanted


def _eos_ids(model: Any) -> frozenset[int]:
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config, "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
