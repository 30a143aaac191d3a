"""The base model's side: prefill a part of the prompt at its original positions, then decode from position T on.

Three things would go wrong silently if the kept tokens were simply passed with their `position_ids`:

- With no cache and no mask, Transformers reads a gap between positions as the border of two packed sequences. A cache
  is always given here, which turns that off in the mask code.
- Flash attention looks for packed sequences again, in the `position_ids` that reach it. They are taken out of its
  arguments.
- Sliding windows count cache slots. Where a window is shorter than the span of positions, that layer gets an explicit
  mask built from positions, and SDPA (or eager, for soft-capped scores) runs it; all other layers keep the model's own
  attention function with no mask, so that `is_causal` kernels stay on.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from specprefill_kernels.loop.attention import (
    Attention,
    attention_configs,
    attention_function,
    attention_handler,
    implementation_of,
)
from specprefill_kernels.loop.cache import full_cache
from specprefill_kernels.loop.support import head_options, num_layers


class PositionalAttention:
    """Attention handler: causal by slot order, sliding windows by position.

    A mask that the model made itself is passed on where it has the right size and no window binds. It has the wrong one
    where layers hold caches of unequal lengths: Transformers measures the first layer's. Then none is passed if the
    implementation is causal by itself, and one made from positions if not.

    Args:
        implementation: the model's own, "sdpa", "eager", "flash_attention_2", ...
        query_positions: [q] int64, ascending.
        key_positions: [k] int64, ascending; the queries' own are its last q entries.
        span: largest distance between two of these positions plus one; known without reading the tensors.
    """

    def __init__(self, implementation: str, query_positions: Tensor, key_positions: Tensor, span: int) -> None:
        self._implementation = implementation
        self._queries = query_positions
        self._keys = key_positions
        self._span = span
        self._masks: dict[tuple[int | None, torch.device], Tensor] = {}

    def __call__(
        self,
        ordinary: Attention,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        kwargs.pop("position_ids", None)
        window = kwargs.get("sliding_window")
        if window is not None and window >= self._span:
            window = None
        implementation = self._implementation
        if window is None:
            sizes = (query.shape[2], key.shape[2])
            if attention_mask is not None and tuple(attention_mask.shape[-2:]) == sizes:
                return ordinary(module, query, key, value, attention_mask, **kwargs)
            if _causal_by_itself(implementation, *sizes):
                return ordinary(module, query, key, value, None, **kwargs)
        mask = self._mask(window, key.device)
        if implementation not in ("sdpa", "eager"):
            # Flash and flex attention take no such mask; SDPA knows no softcap and no attention sink.
            plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
            implementation = "sdpa" if plain else "eager"
            ordinary = attention_function(module, implementation)
        if implementation == "eager":
            blocked = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, blocked)
        return ordinary(module, query, key, value, mask, **kwargs)

    def _mask(self, window: int | None, device: torch.device) -> Tensor:
        """[1, 1, q, k] bool, True where the key is seen. One per window and device, not one per layer."""
        if (window, device) not in self._masks:
            distance = self._queries.to(device)[:, None] - self._keys.to(device)[None, :]
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._masks[window, device] = seen[None, None]
        return self._masks[window, device]


def _causal_by_itself(implementation: str, queries: int, keys: int) -> bool:
    """Whether attention without a mask is causal when the queries are the last of the keys."""
    if queries == 1 or "flash" in implementation:
        return True
    return implementation == "sdpa" and queries == keys  # its is_causal counts from the first key


class BaseRun:
    """One sequence on the base model: its cache, and where it stands.

    Args:
        model: a Transformers causal language model.
        prompt_len: T; the first decoded token sits at position T whatever was kept.
        sparse: keep every layer's whole cache and count windows in positions. False runs as `model.generate` would.
        room: tokens that will be decoded, as far as known.
    """

    def __init__(self, model: Any, prompt_len: int, *, sparse: bool, room: int = 256) -> None:
        self._model = model
        self._sparse = sparse
        self._next_position = prompt_len
        self._key_positions: Tensor | None = None
        self.cache = full_cache(num_layers(model), room) if sparse else DynamicCache(config=model.config)
        self._configs = attention_configs(model) if sparse else []
        self._implementation = implementation_of(model)
        self._head = head_options(model)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Prefill tokens [1, K] at ascending `positions` [K]; returns the last one's logits, [1, V] fp32."""
        return self._forward(input_ids, positions)

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Feed one decoded token [1, 1] at the next position; returns its logits, [1, V] fp32."""
        position = torch.full((1,), self._next_position, dtype=torch.int64, device=token.device)
        self._next_position += 1
        return self._forward(token, position)

    def _forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        arguments = {
            "input_ids": input_ids,
            "position_ids": positions[None],
            "past_key_values": self.cache,
            "use_cache": True,
            **self._head,
        }
        if not self._sparse:
            output = self._model(**arguments)
        else:
            seen = positions if self._key_positions is None else torch.cat([self._key_positions, positions])
            self._key_positions = seen
            # Positions lie in [0, next_position): a window of that many tokens or more never cuts anything off.
            handler = PositionalAttention(self._implementation, positions, seen, self._next_position)
            with attention_handler(self._configs, handler):
                output = self._model(**arguments)
        # A copy in fp32, like generate's own: logits processors write in place.
        logits: Tensor = output.logits[:, -1].to(copy=True, dtype=torch.float32)
        return logits
