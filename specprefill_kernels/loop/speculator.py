"""The speculator: reads the whole prompt, decodes a few look-ahead tokens, and says how important each prompt token is.

    prefill -> queries of the last prompt token          (row 0)
    decode  -> queries of N - 1 greedy tokens            (rows 1 .. N - 1)
    score   -> one call of score_layers_ over all layers, one of finalize_importance

With `queries="observation_window"` the rows are the last N prompt tokens' instead: nothing is decoded, and the forward
stops after the last layer that is scored; with "both" the rows are those and the decoded ones. The same pass over the
base's own lower layers needs no second model.

A prompt longer than `prefill_chunk` is read in several forwards, which leave their keys and values in a cache, so that
activations are as large as a chunk asks. All but the last forward end at the top layer that is needed, before its
attention runs. Where nothing is decoded, a layer's cache goes as soon as the last forward has passed it, but for the
keys that will be scored.

With `speculator_attention="sparse"` the prompt is read with block-sparse attention (sparse.py); decoding stays dense.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.attention import attention_configs
from specprefill_kernels.loop.cache import full_cache, layers_of
from specprefill_kernels.loop.capture import Capture
from specprefill_kernels.loop.chunks import chunk_lengths
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.memory import SpeculatorMemory
from specprefill_kernels.loop.scoring import (
    Captured,
    NothingToScore,
    Speculation,
    layer_indices,
    look_ahead_rows,
    prompt_rows,
    score_captured,
)
from specprefill_kernels.loop.sparse import SparsePrefill, settings, unaffected
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
        # Layers that a prompt runs through: decoding needs them all.
        self._depth = self._num_layers if look_ahead_rows(config) > 1 else self._last_layer + 1
        self._eos = _eos_ids(model)
        self._head = head_options(model)
        self._context = context_length(model)

    def score(
        self,
        input_ids: Tensor,
        clock: StageClock | None = None,
        *,
        memory: SpeculatorMemory | None = None,
        per_layer: bool = False,
    ) -> Speculation:
        """Importance of each token of one prompt.

        Args:
            input_ids: [1, T] on the model's device.
            clock: takes the seconds of "speculator_prefill", "look_ahead" and "score".
            memory: of an earlier prompt: the tokens that both begin with are not computed again (with sparse attention,
                whole blocks that it read sparse). Stands for this prompt afterwards.
            per_layer: also give the importance by each layer alone.

        Raises:
            NothingToScore: the prompt is longer than the model's context, `window="skip"` left no layer, or the model's
                attention was never called.
        """
        clock = clock or StageClock(input_ids.device)
        captured = self.capture(input_ids, clock, memory=memory)
        with clock.stage("score"):
            return score_captured(captured, self.config, layers=self._layers, per_layer=per_layer)

    @torch.no_grad()
    def capture(
        self, input_ids: Tensor, clock: StageClock | None = None, *, memory: SpeculatorMemory | None = None
    ) -> Captured:
        """The forwards alone: query rows and keys of the layers to score. `score_captured` does the rest.

        Raises:
            NothingToScore: the prompt is longer than the model's context. The memory is as it was.
        """
        length = input_ids.shape[1]
        if self._context is not None and length > self._context:
            raise NothingToScore(f"the speculator reads at most {self._context} tokens, the prompt has {length}")
        clock = clock or StageClock(input_ids.device)
        capture = Capture(self._configs, self._layers)
        rows, ahead = prompt_rows(self.config), look_ahead_rows(self.config)
        sparse = None
        if self.config.speculator_attention == "sparse":
            sparse = SparsePrefill(self.config, length, self._context)
        if memory is None:
            tokens = self._read(input_ids, 0, None, capture, sparse, clock)
            reused = 0
        else:
            needs = (self.model, self._depth, ahead > 1, settings(self.config))
            alike = unaffected(self.config)
            with memory.extended(input_ids, needs, rows, ahead - 1, self._new_cache, alike) as (cache, reused):
                tokens = self._read(input_ids, reused, cache, capture, sparse, clock)
        attention = ("dense", "") if sparse is None else sparse.outcome()
        return Captured(capture.layers, length, self._num_layers, rows, ahead, tuple(tokens), reused, attention)

    def _read(
        self,
        input_ids: Tensor,
        reused: int,
        cache: Cache | None,
        capture: Capture,
        sparse: SparsePrefill | None,
        clock: StageClock,
    ) -> list[int]:
        """Run the model over the prompt from token `reused` on, then decode; returns the decoded tokens."""
        if sparse is not None and sparse.problem is not None:
            sparse = None
        length, steps = input_ids.shape[1], look_ahead_rows(self.config) - 1
        rows = prompt_rows(self.config)
        with clock.stage("speculator_prefill"):
            block = None if sparse is None else self.config.attention_block_size
            lengths = chunk_lengths(length - reused, self.config.prefill_chunk, rows, start=reused, block_size=block)
            remembered = cache is not None
            if cache is None and (steps or len(lengths) > 1):
                cache = self._new_cache()
                for layer in layers_of(cache):
                    layer.reserve(length + steps)
            start = reused
            for part in lengths[:-1]:
                # Of these, only keys and values are needed: the top layer's attention never runs.
                with capture.running(0, stop_at=self._depth - 1, behind=start > 0, sparse=sparse):
                    self._forward_body(input_ids[:, start : start + part], cache)
                start += part
            if not steps:
                leave = None if cache is None or remembered else partial(_leave, cache)
                with capture.running(rows, stop_at=self._depth - 1, behind=start > 0, done=leave, sparse=sparse):
                    self._forward_body(input_ids[:, start:], cache)
                return []
            with capture.running(rows, behind=start > 0, sparse=sparse):
                logits = self._forward(input_ids[:, start:], cache)
        with clock.stage("look_ahead"):
            return self._look_ahead(logits, cache, capture, input_ids)

    def _new_cache(self) -> Cache:
        # The attention of the last layer never runs where nothing is decoded.
        steps = look_ahead_rows(self.config) - 1
        return full_cache(self._num_layers, room=steps, keys_only=None if steps else self._depth - 1)

    def _forward_body(self, input_ids: Tensor, cache: Cache | None) -> None:
        """The decoder without its head. Without a cache, keys reach the capture as arguments and nothing else stays."""
        self.model.base_model(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None)

    def _look_ahead(self, logits: Tensor, cache: Cache | None, capture: Capture, input_ids: Tensor) -> list[int]:
        """Decode greedily. EOS at step s ends it with s + 1 rows; EOS itself is never fed. So does the context's end: a
        model with learned positions has none behind it."""
        steps = self.config.look_ahead - 1
        if self._context is not None:
            steps = min(steps, self._context - input_ids.shape[1])
        tokens: list[int] = []
        for step in range(1, steps + 1):
            token = int(logits[0, -1].argmax())
            if token in self._eos:
                break
            tokens.append(token)
            # The last row's output is not needed, only its queries.
            with capture.running(1, stop_at=self._last_layer if step == steps else None):
                logits = self._forward(torch.tensor([[token]], device=input_ids.device), cache)
        return tokens

    def _forward(self, input_ids: Tensor, cache: Any) -> Tensor:
        # No position_ids: they are contiguous, so the model's own counting (from the cache's length) is right.
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **self._head)
        logits: Tensor = output.logits
        return logits


def _leave(cache: Cache, layer: int) -> None:
    """Nobody reads this layer's cache again; the score holds the keys that it needs."""
    layers_of(cache)[layer].release()


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
