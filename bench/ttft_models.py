"""Models by their published shapes, with random weights: what they weigh, what a prefill of them computes.

Shapes are those of the published config.json files. Weights are drawn on the device in the dtype, with a standard
deviation of 1 / sqrt(inputs), so that activations keep their size; norms are ones, biases zeros. Each tensor has a seed
of its own, so a model of k layers has the same first k layers as a model of more.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config
from transformers.initialization import no_init_weights

from specprefill_kernels.loop.support import decoder_layers
from specprefill_kernels.models import REGISTRY
from specprefill_kernels.models.progress import Progress

# Positions beyond a model's context that the look-ahead may use: a prompt as long as the context is measured too.
LOOK_AHEAD_ROOM = 256


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _shape(kind: type, heads: tuple[int, int, int], sizes: tuple[int, int, int, int], **more: Any) -> dict[str, Any]:
    """heads: query heads, key/value heads, head_dim; sizes: layers, hidden, intermediate, vocabulary."""
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    found = dict(zip(names, heads))
    found |= dict(zip(("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"), sizes))
    return {"kind": kind, **found, **more}


_LLAMA = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
_QWEN3 = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    # For longer prompts, as the model cards say: YaRN, validated up to 131072 tokens.
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
}
SHAPES = MappingProxyType(
    {
        "smollm2-135m": _shape(
            LlamaConfig,
            (9, 3, 64),
            (30, 576, 1536, 49152),
            rms_norm_eps=1e-5,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        ),
        "llama-1b": _shape(
            LlamaConfig,
            (32, 8, 64),
            (16, 2048, 8192, 128256),
            rope_parameters=_llama3(32.0),
            tie_word_embeddings=True,
            **_LLAMA,
        ),
        "llama-8b": _shape(
            LlamaConfig, (32, 8, 128), (32, 4096, 14336, 128256), rope_parameters=_llama3(8.0), **_LLAMA
        ),
        "llama-70b": _shape(
            LlamaConfig, (64, 8, 128), (80, 8192, 28672, 128256), rope_parameters=_llama3(8.0), **_LLAMA
        ),
        "llama-405b": _shape(
            LlamaConfig, (128, 8, 128), (126, 16384, 53248, 128256), rope_parameters=_llama3(8.0), **_LLAMA
        ),
        "qwen3-0.6b": _shape(Qwen3Config, (16, 8, 128), (28, 1024, 3072, 151936), tie_word_embeddings=True, **_QWEN3),
        "qwen3-32b": _shape(Qwen3Config, (64, 8, 128), (64, 5120, 25600, 151936), **_QWEN3),
        # For tests and --quick.
        "tiny": _shape(LlamaConfig, (4, 2, 16), (3, 64, 128, 512), rope_parameters=_llama3(8.0), **_LLAMA),
        "tiny-base": _shape(LlamaConfig, (8, 2, 32), (6, 256, 512, 512), rope_parameters=_llama3(8.0), **_LLAMA),
    }
)
TITLES = MappingProxyType(
    {
        "smollm2-135m": "SmolLM2-135M",
        "llama-1b": "Llama-3.2-1B",
        "llama-8b": "Llama-3.1-8B",
        "llama-70b": "Llama-3.1-70B",
        "llama-405b": "Llama-3.1-405B",
        "qwen3-0.6b": "Qwen3-0.6B",
        "qwen3-32b": "Qwen3-32B",
    }
)


def known(name: str) -> bool:
    return name in SHAPES or name in REGISTRY or (Path(name).expanduser() / "config.json").is_file()


def title(name: str) -> str:
    """What tables call a model."""
    if name in TITLES:
        return TITLES[name]
    return REGISTRY[name].title if name in REGISTRY else Path(name).name


def config_of(name: str, tokens: int = 0) -> tuple[PretrainedConfig, str]:
    """A model's config, and a note where it differs from the published one for a prompt of so many tokens.

    Raises:
        ValueError: no such model, or the prompt is longer than the model's context.
    """
    note = ""
    if name in SHAPES:
        fields = dict(SHAPES[name])
        kind, yarn = fields.pop("kind"), fields.pop("yarn", None)
        if yarn is not None and tokens > fields["max_position_embeddings"]:
            note = f"{title(name)}: YaRN, factor {yarn['factor']:g}, for more than {fields['max_position_embeddings']}"
            fields["rope_parameters"] = yarn
            fields["max_position_embeddings"] = int(yarn["factor"] * yarn["original_max_position_embeddings"])
        config = kind(**fields)
    elif known(name):
        from specprefill_kernels import models

        where = Path(name).expanduser()
        config = AutoConfig.from_pretrained(where if where.is_dir() else models.ensure(name), local_files_only=True)
    else:
        raise ValueError(f"pair: expected one of {', '.join(SHAPES)}, a folder with a config.json or one of "
                         f"{', '.join(REGISTRY)}, got {name!r}")  # fmt: skip
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise ValueError(f"tokens: expected at most {context}, the context of {title(name)}, got {tokens}")
    return config, note


def build(
    config: PretrainedConfig,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    label: str = "model",
) -> Any:
    """A model with random weights, of the first `layers` layers."""
    config = _resized(config, layers)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None  # no look-ahead ends early
    config.max_position_embeddings += LOOK_AHEAD_ROOM
    model = _bare(config, device, dtype)
    weights = list(model.named_parameters())
    total = sum(weight.numel() for _, weight in weights)
    if progress is None:
        _draw(weights, lambda done: None)
    else:
        with progress.task(f"Random weights of {label}", steps=True) as task:
            _draw(weights, lambda done: task.update(done, total))
    return model.eval().requires_grad_(False)


def _bare(config: PretrainedConfig, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose weights nobody has written yet."""
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()  # which is part of the initialization that was left out
    return model


def _resized(config: PretrainedConfig, layers: int | None) -> PretrainedConfig:
    fields = config.to_dict()
    if layers is not None:
        fields["num_hidden_layers"] = layers
        if fields.get("layer_types"):
            fields["layer_types"] = fields["layer_types"][:layers]
    return type(config).from_dict(fields)


@torch.no_grad()
def _draw(weights: list[tuple[str, nn.Parameter]], report: Any) -> None:
    done = 0
    for name, weight in weights:
        if weight.dim() >= 2:
            generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
            weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            weight.zero_()
        else:
            weight.fill_(1)
        done += weight.numel()
        report(done)


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, and what a prefill of it computes.

    Attributes:
        layers: L.
        layer: parameters of one layer.
        outside: embeddings, last norm and head.
        head: vocabulary times hidden size.
        attention: query heads times head_dim; cache: numbers that a layer keeps of one token.
        row: bytes of one token's activations in a layer, at most, for numbers of one byte; upcast: in any case.
    """

    layers: int
    layer: int
    outside: int
    head: int
    attention: int
    cache: int
    row: int
    upcast: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Sizes:
        model = _bare(_resized(config, 1), "meta")
        (layer,) = decoder_layers(model) or [nn.Module()]
        inside = sum(weight.numel() for weight in layer.parameters())
        if not inside:
            raise ValueError(f"pair: expected a model with a list of decoder layers, got {type(model).__name__}")
        hidden = config.hidden_size
        dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        attention = config.num_attention_heads * dim
        cache = 2 * config.num_key_value_heads * dim
        return cls(
            layers=config.num_hidden_layers,
            layer=inside,
            outside=sum(weight.numel() for weight in model.parameters()) - inside,
            head=config.vocab_size * hidden,
            attention=attention,
            cache=cache,
            # Residual, its copy, norm, projections, attention's output; gate, up and their product.
            row=5 * hidden + 4 * attention + 2 * cache + 3 * config.intermediate_size,
            upcast=4 * 3 * hidden,  # a norm computes in fp32
        )

    def flops(self, tokens: int, keys: int | None = None) -> tuple[float, float]:
        """Of a prefill: (matrix products with weights, attention). The head reads the last token alone.

        Args:
            keys: a token attends to at most so many; None: to all before it.
        """
        full = tokens if keys is None else min(keys, tokens)  # the first ones see fewer: a triangle, then a band
        pairs = full * full / 2 + (tokens - full) * full
        return (
            2.0 * self.layers * self.layer * tokens + 2.0 * self.head,
            4.0 * self.layers * self.attention * pairs,
        )

    def weight_bytes(self, layers: int, itemsize: int) -> int:
        return (layers * self.layer + self.outside) * itemsize

    def cache_bytes(self, layers: int, tokens: int, itemsize: int) -> int:
        return layers * self.cache * tokens * itemsize

    def activation_bytes(self, rows: int, itemsize: int) -> int:
        return rows * (self.row * itemsize + self.upcast)
