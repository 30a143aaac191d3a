"""Fused kernels for speculative prefill.

A small speculator reads a long prompt and decodes a few look-ahead tokens; the attention of those look-ahead queries
says which prompt tokens matter, and the base model prefills only those, at their original positions (Liu, Chen,
Zhang: "Speculative Prefill", ICML 2025, arXiv 2502.02789). This package holds the ops between the two models.
"""

from typing import Any

from specprefill_kernels._diagnosis import show_config
from specprefill_kernels._version import __version__

try:
    from specprefill_kernels import _library as _library  # registers the ops
    from specprefill_kernels._backends import BackendUnavailable, available_backends, use_backend
    from specprefill_kernels.config import SpecPrefillConfig
    from specprefill_kernels.ops.finalize import finalize_importance
    from specprefill_kernels.ops.gather import Packed, gather_kv, gather_tokens
    from specprefill_kernels.ops.score import new_state, score_layer_, score_layers_, score_workspace_size
    from specprefill_kernels.ops.select import Selection, select_chunks
    from specprefill_kernels.ops.select_tokens import TokenSelection, select_tokens
    from specprefill_kernels.ops.sparse_attention import (
        AttentionBlocks,
        block_sparse_attention,
        select_attention_blocks,
        sparse_prefill_attention,
    )
except ImportError as error:
    # Only `show_config` and the command `specprefill show-config` still work then, to say what is broken.
    _broken = error

    def __getattr__(name: str) -> Any:
        if name.startswith("_"):  # the import system asks for submodules this way
            raise AttributeError(name)
        message = f"specprefill_kernels cannot be used: {_broken} (specprefill show-config says more)"
        raise ImportError(message) from _broken


__all__ = [
    "AttentionBlocks",
    "BackendUnavailable",
    "Packed",
    "Selection",
    "SpecPrefillConfig",
    "TokenSelection",
    "__version__",
    "available_backends",
    "block_sparse_attention",
    "finalize_importance",
    "gather_kv",
    "gather_tokens",
    "new_state",
    "score_layer_",
    "score_layers_",
    "score_workspace_size",
    "select_attention_blocks",
    "select_chunks",
    "select_tokens",
    "show_config",
    "sparse_prefill_attention",
    "use_backend",
]
