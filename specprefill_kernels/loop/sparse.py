"""Block-sparse attention for a speculator's prefill, layer by layer, with a reason wherever it does not run.

The rows whose queries are scored, and the rest of their block, stay dense: they are few, and what they read decides the
selection. So does whatever a layer asks for that the op has not (soft caps, sliding windows, sinks). Which layers
stay dense does not depend on the prompt's length: a conversation goes on from the keys that a fresh read would have.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels._checks import FLOATS
from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.attention import Attention, implementation_under
from specprefill_kernels.loop.chunks import IMPLEMENTATIONS, PLAIN, chunk_attention
from specprefill_kernels.ops.sparse_attention import sparse_prefill_attention
from specprefill_kernels.ops.sparse_attention.blocks import MAX_HEAD_DIM

logger = logging.getLogger("specprefill_kernels")

_said: set[str] = set()  # reasons that were logged


class SparsePrefill:
    """The attention of one prompt's prefill.

    Args:
        config: with `speculator_attention="sparse"`.
        seq_len: tokens of the prompt.
        context: the most tokens of any prompt, if known: a sliding window of so many never cuts anything off.

    Attributes:
        problem: why the whole prompt runs dense, or None.
        sparse: indices of the layers that ran sparse.
        dense: index -> reason of those that could not.
    """

    def __init__(self, config: SpecPrefillConfig, seq_len: int, context: int | None = None) -> None:
        self._config = config
        self._context = context
        self._reach = _reach(config)
        self.sparse: set[int] = set()
        self.dense: dict[int, str] = {}
        self.problem: str | None = None
        if seq_len <= self._reach:
            self.problem = f"{seq_len} tokens, and each block of sparse attention reads up to {self._reach}"

    def __call__(
        self,
        ordinary: Attention,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scored_rows: int,
        **kwargs: Any,
    ) -> Tensor | None:
        """[B, n, Hq, D], or None where the layer has to run dense.

        Args:
            query: [B, Hq, n, D], the last n of the keys' positions.
            scored_rows: how many of them are scored, the last ones.
        """
        layer: Any = getattr(module, "layer_idx", None)
        reason = self._reason(module, query, key, value, kwargs)
        if reason is not None:
            self.dense[layer] = reason
            return None
        config, total = self._config, key.shape[2]
        size = config.attention_block_size
        if total <= self._reach:
            return None  # every block is read: dense attention is the same, and faster
        end = (total - scored_rows) // size * size if scored_rows else total
        rows = query.shape[2] - (total - end)
        if rows <= 0:
            return None
        self.sparse.add(layer)
        output = sparse_prefill_attention(
            query[:, :, :rows],
            key[:, :, :end],
            value[:, :, :end],
            block_size=size,
            keep_blocks=config.attention_keep_blocks,
            sink_blocks=config.attention_sink_blocks,
            local_blocks=config.attention_local_blocks,
            scale=kwargs.get("scaling"),
            backend=_backend(config),
        ).transpose(1, 2)
        if rows == query.shape[2]:
            return output
        return torch.cat([output, _dense(ordinary, module, query[:, :, rows:], key, value, **kwargs)], dim=1)

    def _reason(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
    ) -> str | None:
        implementation = implementation_under(module)
        if implementation not in IMPLEMENTATIONS and not _aligned_at_the_end(implementation):
            return f"its attention implementation {implementation}"
        window = kwargs.get("sliding_window")
        if window is not None and (self._context is None or window < self._context):
            return f"a sliding window of {window} tokens"
        for name in sorted(kwargs.keys() - PLAIN):
            if kwargs[name] is not None and kwargs[name] is not False:
                return (
                    f"{name}={kwargs[name]}" if isinstance(kwargs[name], (int, float)) else f"{name} in its attention"
                )
        if not getattr(module, "is_causal", True):
            return "attention that is not causal"
        if module.training:
            return "training"
        if query.shape[3] > MAX_HEAD_DIM or value.shape != key.shape:
            return f"heads of {query.shape[3]} dimensions, values of {value.shape[3]}"
        if query.dtype not in FLOATS or not query.dtype == key.dtype == value.dtype:
            return f"{query.dtype} queries, {key.dtype} keys and {value.dtype} values"
        if query.device.type not in ("cpu", "cuda"):
            return f"tensors on {query.device.type}"
        return None

    def outcome(self) -> tuple[str, str]:
        """("sparse" or "dense", in words what ran and why), logged the first time that a layer had to stay dense."""
        config = self._config
        if self.problem is not None:
            return "dense", self.problem
        groups: dict[str, list[int]] = {}
        for layer, reason in sorted(self.dense.items()):
            groups.setdefault(reason, []).append(layer)
        exceptions = [f"{_layers(layers)} dense: {reason}" for reason, layers in groups.items()]
        for text in exceptions:
            if text not in _said:
                _said.add(text)
                logger.warning("speculator attention, %s", text)
        if not self.sparse:
            return "dense", "; ".join(exceptions) or "only the rows that are scored were left to read"
        blocks = f"{config.attention_keep_blocks} blocks of {config.attention_block_size} tokens"
        return "sparse", "; ".join([f"{blocks} in {len(self.sparse)} layers", *exceptions])


def settings(config: SpecPrefillConfig) -> tuple[int, ...] | None:
    """What the keys of a prompt depend on; None for dense attention."""
    if config.speculator_attention == "dense":
        return None
    return (
        config.attention_block_size,
        config.attention_keep_blocks,
        config.attention_sink_blocks,
        config.attention_local_blocks,
    )


def unaffected(config: SpecPrefillConfig) -> Callable[[int], int] | None:
    """Of the first `count` tokens of a prompt whose scored rows lie behind them, how many a longer prompt reads alike.

    Beyond the blocks that read everything in any case, whole blocks only: the rest of the last one ran dense. None for
    dense attention, where all are.
    """
    if config.speculator_attention == "dense":
        return None
    reach, size = _reach(config), config.attention_block_size
    return lambda count: count if count <= reach else count // size * size


def _reach(config: SpecPrefillConfig) -> int:
    """Tokens up to which every block reads all before it."""
    return config.attention_keep_blocks * config.attention_block_size


def _dense(
    ordinary: Attention, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> Tensor:
    """[B, n, Hq, D]: the last rows over all keys, by the model's own attention."""
    if implementation_under(module) in IMPLEMENTATIONS:
        return chunk_attention(ordinary, module, query, key, value, **kwargs)[0]
    kwargs.pop("position_ids", None)  # those of all rows; flash attention looks in them for packed sequences
    return ordinary(module, query, key, value, None, **kwargs)[0]


def _aligned_at_the_end(implementation: str) -> bool:
    """Whether a short query without a mask is taken for the last of the keys' positions."""
    return "flash" in implementation and "paged" not in implementation


def _layers(indices: list[int]) -> str:
    return f"layer{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def _backend(config: SpecPrefillConfig) -> str:
    return "auto" if config.backend == "cuda" else config.backend  # the op has no CUDA implementation of its own
