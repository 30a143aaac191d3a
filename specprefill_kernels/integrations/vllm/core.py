"""In the process of vLLM's scheduler: prefix caching that knows positions.

vLLM finds a cached block by a hash over its tokens and all tokens before it. The keys and values of a pruned prompt
depend on its positions too, so they go into the hash, block by block, where they differ from the indices. Blocks in
front of the first dropped token stand where an ordinary request has them: they are shared with ordinary requests, both
ways, and rightly so.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from specprefill_kernels.integrations.vllm.positions import Positions, from_arguments

_HASHER = "generate_block_hash_extra_keys"
# Each holds the function under its own name.
_HOLDERS = ("vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")


def install() -> None:
    """Make this process's scheduler hash positions, and answer `specprefill_status`."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore

    original = getattr(kv_cache_utils, _HASHER)
    if getattr(original, "of_specprefill", False):
        return
    hasher = positional(original)
    for name in _HOLDERS:
        module = importlib.import_module(name)
        if getattr(module, _HASHER, None) is original:
            setattr(module, _HASHER, hasher)
    EngineCore.preprocess_add_request = _checked(EngineCore.preprocess_add_request)
    EngineCore.specprefill_status = _status


def _checked(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """The server's front end makes the positions; one without the plugin would let a client's own through."""

    @functools.wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        params = request.sampling_params
        positions = None if params is None else from_arguments(params.extra_args)
        if positions is not None:
            limit = self.vllm_config.model_config.max_model_len
            if positions.kept_tokens != len(request.prompt_token_ids or ()) or positions.prompt_tokens > limit:
                raise ValueError(
                    f"positions: expected those of {len(request.prompt_token_ids or ())} tokens within {limit}, got "
                    f"{positions.kept_tokens} within {positions.prompt_tokens}"
                )
        return preprocess(self, request)

    return preprocess_add_request


def positional(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `generate_block_hash_extra_keys`, with the block's positions among the keys."""

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        positions = positions_of(request)
        own = None if positions is None else positions.block_key(start_token_idx, end_token_idx)
        # (name, value), as all other keys: KV events publish the values.
        return (keys if own is None else (*(keys or ()), ("specprefill", own))), next_mm_idx

    generate_block_hash_extra_keys.of_specprefill = True  # type: ignore[attr-defined]
    return generate_block_hash_extra_keys


def positions_of(request: Any) -> Positions | None:
    """The positions of one of vLLM's requests, read once."""
    if not hasattr(request, "specprefill_positions"):
        params = request.sampling_params
        request.specprefill_positions = None if params is None else from_arguments(params.extra_args)
    positions: Positions | None = request.specprefill_positions
    return positions


def _status(core: Any) -> list[str | None]:
    """What keeps each worker of this engine from reading positions; None where nothing does. Called by the server."""
    status: list[str | None] = core.model_executor.collective_rpc("specprefill_status")
    return status
