"""The speculator: reads the whole prompt, decodes a few look-ahead tokens, and says how important each prompt token is.

    prefill -> queries of the last prompt token          (row 0)
    decode  -> queries of N - 1 greedy tokens            (rows 1 .. N - 1)
    score   -> one call of score_layers_ over all layers, one of finalize_importance

With `queries="observation_window"` the rows are the last N prompt tokens' instead: nothing is decoded, and the forward
stops after the last layer that is scored. The same pass over the base's own lower layers needs no second model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels._backends import resolve
from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.attention import attention_configs
from specprefill_kernels.loop.cache import full_cache
from specprefill_kernels.loop.capture import Capture, LayerCapture
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.support import context_length, head_options, num_layers
from specprefill_kernels.ops.finalize import finalize_importance
from specprefill_kernels.ops.score import new_state, score_layers_


class NothingToScore(RuntimeError):
    """This prompt cannot be scored, or no layer is left to score; the message says why."""


@dataclass(frozen=True)
class Speculation:
    """What one prompt's speculation gave.

    Attributes:
        importance: [T] fp32 on the speculator's device.
        num_look_ahead: query rows that counted, at most `config.look_ahead`.
        layers: indices of the layers that were scored.
        look_ahead_tokens: the decoded tokens whose queries were used, `num_look_ahead - 1` of them.
        backend: which implementation scored.
    """

    importance: Tensor
    num_look_ahead: int
    layers: tuple[int, ...]
    look_ahead_tokens: tuple[int, ...]
    backend: str


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

    @torch.no_grad()
    def score(self, input_ids: Tensor, clock: StageClock | None = None) -> Speculation:
        """Importance of each token of one prompt.

        Args:
            input_ids: [1, T] on the model's device.
            clock: takes the seconds of "speculator_prefill", "look_ahead" and "score".

        Raises:
            NothingToScore: the prompt is longer than the model's context, `window="skip"` left no layer, or the model's
                attention was never called.
        """
        if self._context is not None and input_ids.shape[1] > self._context:
            raise NothingToScore(
                f"the speculator reads at most {self._context} tokens, the prompt has {input_ids.shape[1]} of them"
            )
        clock = clock or StageClock(input_ids.device)
        capture = Capture(self._configs, self._layers, self._last_layer)
        if self.config.queries == "observation_window":
            with clock.stage("speculator_prefill"), capture.running(self.config.look_ahead, stop=True):
                self._forward_body(input_ids)
            tokens: list[int] = []
        else:
            tokens = self._look_ahead(input_ids, capture, clock)
        with clock.stage("score"):
            return self._score(capture, input_ids.shape[1], tuple(tokens))

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
        with clock.stage("speculator_prefill"), capture.running(1, stop=steps == 0):
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

    def _score(self, capture: Capture, seq_len: int, tokens: tuple[int, ...]) -> Speculation:
        config = self.config
        layers = dict(sorted(capture.layers.items()))
        if not layers:
            raise NothingToScore("the speculator's attention was never called through AttentionInterface")
        if config.window == "skip":
            layers = {i: layer for i, layer in layers.items() if layer.window is None or layer.window >= seq_len}
            if not layers:
                raise NothingToScore('every scored layer has a sliding window shorter than the prompt (window="skip")')

        first = next(iter(layers.values()))
        rows = sum(piece.shape[1] for piece in first.queries)
        states: dict[torch.device, Tensor] = {}  # a model may be spread over devices; nearly always there is one
        for group in _groups(list(layers.values())):
            device = group[0].key.device
            if device not in states:
                states[device] = new_state(1, config.look_ahead, seq_len, device=device)
            seq_lens = torch.tensor([seq_len], dtype=torch.int32, device=device)
            num_look_ahead = torch.tensor([rows], dtype=torch.int32, device=device)
            score_layers_(
                states[device],
                [_padded(layer.queries, config.look_ahead) for layer in group],
                [layer.key for layer in group],
                layout="bhtd",
                seq_lens=seq_lens,
                num_look_ahead=num_look_ahead,
                queries=config.queries,
                normalize_over=config.normalize_over,
                scale=group[0].scale,
                softcap=group[0].softcap,
                window=[layer.window for layer in group],
                pool_kernel_size=config.pool_kernel_size,
                pool_edge=config.pool_edge,
                pool_order=config.pool_order,
                backend=config.backend,
            )
        device, state = next(iter(states.items()))
        for other in list(states.values())[1:]:
            state = torch.maximum(state, other.to(device))
        importance = finalize_importance(
            state,
            torch.tensor([seq_len], dtype=torch.int32, device=device),
            torch.tensor([rows], dtype=torch.int32, device=device),
            reduce=config.reduce,
            backend=config.backend,
            pool_kernel_size=config.pool_kernel_size if config.pool_order == "after_max" else None,
            pool_edge=config.pool_edge,
        )
        backend = resolve("score_layers", config.backend, device.type)
        return Speculation(importance[0], rows, tuple(layers), tokens, backend)


def _padded(pieces: Sequence[Tensor], rows: int) -> Tensor:
    """[B, rows, Hq, D]: zero rows behind an early EOS or a short prompt, so that shapes never change."""
    missing = rows - sum(piece.shape[1] for piece in pieces)
    if missing:
        batch, _, heads, dim = pieces[0].shape
        pieces = [*pieces, pieces[0].new_zeros(batch, missing, heads, dim)]
    return torch.cat(list(pieces), dim=1)


def _groups(layers: list[LayerCapture]) -> list[list[LayerCapture]]:
    """Layers that one call can take: one scale, softcap and shape. Nearly every model is one group."""
    groups: dict[tuple[Any, ...], list[LayerCapture]] = {}
    for layer in layers:
        piece, key = layer.queries[0], layer.key
        same = (layer.scale, layer.softcap, piece.shape[2:], key.shape, piece.dtype, key.dtype, key.device)
        groups.setdefault(same, []).append(layer)
    return list(groups.values())


def _wanted_layers(
    score_layers: tuple[int, ...] | None, layer_range: tuple[int, int] | None, count: int
) -> frozenset[int] | None:
    if score_layers is None:
        return None if layer_range is None else frozenset(range(layer_range[0], layer_range[1] + 1))
    wanted = set()
    for layer in score_layers:
        if not -count <= layer < count:
            raise ValueError(f"score_layers: expected indices in [-{count}, {count}), got {layer}")
        wanted.add(layer % count)
    if layer_range is not None and not wanted <= set(range(layer_range[0], layer_range[1] + 1)):
        raise ValueError(f"score_layers: expected layers within self_layers {layer_range}, got {score_layers}")
    return frozenset(wanted)


def _eos_ids(model: Any) -> frozenset[int]:
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config, "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
