"""Capture of what the score needs from a speculator's forward: post-RoPE query rows and keys, layer by layer.

The handler calls the model's ordinary attention function, so flash or SDPA attention stays on and no attention matrix
is ever formed. Queries are the last rows of each call; the key tensor is the one attention received, which with a cache
is the cache's own tensor, so keys are never copied.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specprefill_kernels.loop.attention import Attention, attention_handler, implementation_under
from specprefill_kernels.loop.chunks import IMPLEMENTATIONS, chunk_attention
from specprefill_kernels.loop.sparse import SparsePrefill


@dataclass
class LayerCapture:
    """One attention layer: `queries` are pieces [B, n, Hq, D] in row order, `key` is [B, Hkv, >= T, D]."""

    key: Tensor
    scale: float
    softcap: float | None
    window: int | None
    queries: list[Tensor] = field(default_factory=list)


class _ForwardDone(Exception):
    """Ends a forward after the last layer that is needed; never leaves `Capture.running`."""


class Capture:
    """Collects query rows and keys over one or more forwards of a model.

    Args:
        configs: the model's `attention_configs`.
        layers: indices to collect; None for every layer that calls attention.
    """

    def __init__(self, configs: list[PretrainedConfig], layers: frozenset[int] | None) -> None:
        self.layers: dict[int, LayerCapture] = {}
        self._configs = configs
        self._wanted = layers
        self._rows = 1
        self._stop_at: int | None = None
        self.unmasked: tuple[str, ...] = ()  # read by the mask functions, see attention.py
        self._done: Callable[[int], None] | None = None
        self._sparse: SparsePrefill | None = None

    @contextmanager
    def running(
        self,
        rows: int,
        *,
        stop_at: int | None = None,
        behind: bool = False,
        done: Callable[[int], None] | None = None,
        sparse: SparsePrefill | None = None,
    ) -> Iterator[None]:
        """One forward whose last `rows` query rows count; 0 collects nothing.

        Args:
            stop_at: the forward ends at this layer, before its attention runs; its keys are in the cache by then. A
                stopped forward returns nothing: the `with` block ends where it was called. Modules are not touched.
            behind: the forward reads several tokens behind those in a cache, with masks made here.
            done: called with each layer's index when its keys and values will not be read from the cache again.
            sparse: attends instead of the model's own attention, where it can; masks are then made here, too.
        """
        self._rows, self._stop_at, self._done, self._sparse = rows, stop_at, done, sparse
        self.unmasked = IMPLEMENTATIONS if behind or sparse is not None else ()
        try:
            with attention_handler(self._configs, self):
                yield
        except _ForwardDone:
            pass

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
        layer: int | None = getattr(module, "layer_idx", None)
        if layer is not None:
            if self._rows and (self._wanted is None or layer in self._wanted):
                self._record(layer, query, key, kwargs)
            if self._done is not None:
                self._done(layer)
            if layer == self._stop_at:
                raise _ForwardDone
        if self._sparse is not None:
            output = self._sparse(ordinary, module, query, key, value, self._rows, **kwargs)
            if output is not None:
                return output, None
        if self.unmasked and implementation_under(module) in self.unmasked:
            return chunk_attention(ordinary, module, query, key, value, **kwargs)
        return ordinary(module, query, key, value, attention_mask, **kwargs)

    def _record(self, layer: int, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
        if layer not in self.layers:
            scale = kwargs.get("scaling")
            self.layers[layer] = LayerCapture(
                key=key,
                scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
                softcap=kwargs.get("softcap"),
                window=kwargs.get("sliding_window"),
            )
        # A clone: a slice would keep the queries of the whole prompt alive.
        self.layers[layer].queries.append(query[:, :, -self._rows :].transpose(1, 2).clone())
        self.layers[layer].key = key
