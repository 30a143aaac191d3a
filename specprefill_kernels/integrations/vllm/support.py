"""Whether a server's engine can run pruned prompts, told from its configuration; and if not, why.

What is listed here either reads more from a position than a rotation (learned or relative positions, ALiBi), counts
cache slots where it should count positions (sliding windows, chunked attention), keeps a state that no selection fits
(Mamba), computes positions of its own (speculative decoding, context parallelism), or stores blocks under keys that
know no positions (KV connectors).
"""

from __future__ import annotations

import re
from typing import Any

# Minor versions whose internals the hooks were tested with.
TESTED_VERSIONS = ("0.32",)


def engine_problem(config: Any, version: str, *, any_version: bool = False) -> str | None:
    """Why every request of an engine with this `VllmConfig` runs dense, or None."""
    if not any_version and ".".join(version.split(".")[:2]) not in TESTED_VERSIONS:
        return (
            f"vLLM {version} is not one of the tested versions ({', '.join(TESTED_VERSIONS)}); "
            "SPECPREFILL_VLLM_ANY_VERSION=1 tries it"
        )
    return model_problem(config.model_config) or _serving_problem(config)


def model_problem(model: Any) -> str | None:
    """Why a model with this `ModelConfig` cannot read a part of the prompt at its original positions."""
    if model.runner_type != "generate":
        return f"a model for {model.runner_type}, which generates nothing"
    if model.is_encoder_decoder:
        return "an encoder-decoder model"
    if model.is_hybrid or model.has_inner_state or model.is_attention_free:
        return "layers that are no attention and keep a state of all tokens"
    if getattr(model, "is_diffusion", False):
        return "a diffusion model"
    if model.uses_mrope or getattr(model, "uses_xdrope_dim", 0):
        return "positions of more than one dimension"
    text = model.hf_text_config
    if not has_rotary_positions(text):
        return "a model without rotary positions (RoPE)"
    windows = {
        "a sliding window": model.get_sliding_window(),
        "chunked attention": getattr(text, "attention_chunk_size", None),
        "a sliding window after the prompt": getattr(model, "rswa_window", None),
    }
    for what, width in windows.items():
        if width is not None and (not isinstance(width, int) or width < model.max_model_len):
            return f"{what} of {width} tokens, which would count kept tokens instead of positions"
    if any(getattr(text, name, None) is not None for name in ("index_topk", "sparse_attention_config")):
        return "sparse attention whose indexer reads positions of its own"
    return None


def has_rotary_positions(text_config: Any) -> bool:
    """Whether a Hugging Face config describes a model that rotates queries and keys."""
    if getattr(text_config, "alibi", False):
        return False
    kind = getattr(text_config, "position_embedding_type", None)
    if isinstance(kind, str) and not re.search("rope|rotary", kind):
        return False
    names = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim", "rotary_pct", "rotary_emb_base")
    return any(getattr(text_config, name, None) is not None for name in names)


def _serving_problem(config: Any) -> str | None:
    parallel = config.parallel_config
    if config.speculative_config is not None:
        return "speculative decoding, whose draft model would count indices"
    if config.kv_transfer_config is not None:
        return "a KV connector, whose keys know no positions"
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        return "context parallelism"
    if getattr(parallel, "use_ubatching", False):
        return "dual batch overlap"
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        return "fast prefill with shared KV layers"
    if getattr(getattr(config, "aux_output_config", None), "enable_return_routed_experts", False):
        return "answers that name the experts of every prompt token"
    return None


def request_problem(request: Any) -> str | None:
    """Why one `EngineCoreRequest` runs dense, or None."""
    params = request.sampling_params
    if params is None:
        return "a pooling request"
    if request.mm_features:
        return "a multimodal prompt"
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return "a prompt of embeddings"
    for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
        if getattr(params, name, None) is not None:
            return f"{name} asks for every prompt token"
    if request.resumable:
        return "a prompt that comes in pieces"
    if _is_beam(request):
        return "the logprobs of a single token, as beam search asks for: it sends a new prompt for every token"
    arguments = params.extra_args or {}
    if arguments.get("kv_transfer_params") or arguments.get("ec_transfer_params"):
        return "a request that transfers its KV cache"
    return None


def _is_beam(request: Any) -> bool:
    params = request.sampling_params
    named = re.search(r"-beam-\d+$", request.external_req_id or request.request_id) is not None
    return named or (params.max_tokens == 1 and not params.detokenize and params.logprobs is not None)
