"""The shapes that are measured: attention layers of real models, prompt lengths, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """One attention layer of a speculator or base model, and how many of them there are."""

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    layers: int


MODELS = (
    Model("SmolLM2-135M", 9, 3, 64, 30),
    Model("Llama-3.2-1B", 32, 8, 64, 16),
    Model("Qwen3-0.6B", 16, 8, 128, 28),
    Model("Llama-3.1-8B", 32, 8, 128, 32),
)
LOOK_AHEAD = 8
KEEP_RATIO = 0.2
CHUNK = 32
PROMPTS = (8192, 32768, 131072)
LONG = (131072, 2**20)  # what follows scoring costs so little that only long prompts tell anything
MANY = (256, 4096)  # prompts of a batch, tokens of each
# On a CPU, to try the harness itself.
QUICK_MODELS = (Model("tiny", 4, 2, 16, 2),)
QUICK_PROMPTS = (512,)
QUICK_LONG = (1000,)
QUICK_MANY = (3, 512)


def size_name(tokens: int) -> str:
    """131072 -> "128K"."""
    for unit, factor in (("M", 2**20), ("K", 2**10)):
        if tokens % factor == 0:
            return f"{tokens // factor}{unit}"
    return str(tokens)
