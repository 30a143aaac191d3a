"""Whether a model can play a part in speculative prefill, and if not, why: the reason goes into every result."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

SCORED_LAYERS = {"full_attention", "sliding_attention"}
# Their forwards reshape the last layer's output to the length of the input, which has no room for fewer tokens.
_FIXED_LENGTH = {"codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj"}


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


def decoder_layers(model: Any) -> list[nn.Module] | None:
    """The model's decoder layers in order, or None where no one list of them is found.

    They are the one `ModuleList` as long as the config says whose i-th entry holds an attention with `layer_idx` i.
    (Lists of experts, or of another tower's layers, can have the same length.)
    """
    count = num_layers(model)
    found = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(_attends_as(index, layer) for index, layer in enumerate(module))
    ]
    return found[0] if len(found) == 1 else None


def _attends_as(index: int, layer: nn.Module) -> bool:
    indices = {getattr(module, "layer_idx", None) for module in layer.modules()} - {None}
    return indices == {index}


def continuing_problem(model: Any) -> str | None:
    """Why this model's upper layers cannot go on with a part of the prompt, or None."""
    problem = base_problem(model)
    if problem is not None:
        return problem
    if _text_config(model).model_type in _FIXED_LENGTH:
        return "a forward that needs as many tokens after the last layer as before the first"
    if decoder_layers(model) is None:
        return f"no list of {num_layers(model)} decoder layers, each with an attention of its own"
    return None


def check_continuing_layers(layer_range: tuple[int, int], count: int) -> tuple[int, int]:
    """(first, last) of the layers to score in the middle of a forward of `count` layers.

    Raises:
        ValueError: not 0 <= first <= last, or no layer is left above `last`.
    """
    first, last = layer_range
    if not 0 <= first <= last:
        raise ValueError(f"self_layers: expected 0 <= first <= last, got {layer_range}")
    if last >= count - 1:
        raise ValueError(
            f"self_layers: expected last < {count - 1}, so that layers are left to go on with the kept tokens, "
            f"got {last} (the model has {count} layers)"
        )
    return first, last


def layer_range_of(self_layers: int | tuple[int, int], count: int) -> tuple[int, int]:
    """(first, last) of `self_layers`, a pair or an int n for (0, n - 1), in a model of `count` layers.

    Raises:
        ValueError: it is something else, or `check_continuing_layers` refuses it.
    """
    span: Any = (0, self_layers - 1) if type(self_layers) is int else self_layers
    whole = isinstance(span, Sequence) and len(span) == 2 and all(type(layer) is int for layer in span)
    if not whole:
        raise ValueError(f"self_layers: expected an int or a pair (first, last), got {self_layers!r}")
    return check_continuing_layers((span[0], span[1]), count)
