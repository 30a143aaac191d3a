"""Whether a model can play a part in speculative prefill, and if not, why: the reason goes into every result."""

import inspect
from typing import Any

SCORED_LAYERS = {"full_attention", "sliding_attention"}


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def num_layers(model: Any) -> int:
    return int(_text_config(model).num_hidden_layers)


def layer_types(model: Any) -> list[str]:
    """The type of each layer, "full_attention" where the config names none."""
    config = _text_config(model)
    types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers(model)
    return list(types)


def head_options(model: Any) -> dict[str, int]:
    """Keywords that make a forward compute the last token's logits only, where the model knows how."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def context_length(model: Any) -> int | None:
    """The most tokens the model was made for, if its config says."""
    length = getattr(_text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def speculator_problem(model: Any) -> str | None:
    """Why this model's attention cannot be scored, or None."""
    if model.config.is_encoder_decoder:
        return "an encoder-decoder model"
    if not getattr(model, "_supports_attention_backend", False):
        return "no attention that goes through Transformers' AttentionInterface"
    unknown = sorted(set(layer_types(model)) - SCORED_LAYERS)
    if unknown:
        return f"{', '.join(unknown)} layers"
    if getattr(_text_config(model), "num_kv_shared_layers", 0):
        return "layers that share their KV cache"
    return None


def base_problem(model: Any) -> str | None:
    """Why this model cannot prefill a part of the prompt at its original positions, or None."""
    problem = speculator_problem(model)
    if problem is not None:
        return problem
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "no position_ids in its forward"
    if getattr(_text_config(model), "alibi", False):
        return "ALiBi, which counts cache slots and not positions"
    return None
