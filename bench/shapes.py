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


@dataclass(frozen=True)
class Grid:
    """What `pytest bench/ --shapes NAME` measures.

    Attributes:
        models, prompts, dtypes: of all layers' scores, each with each.
        long: prompt lengths of what follows scoring.
        many: prompts of a batch, tokens of each.
        key_bytes: what all layers' keys may take together; as many layers are scored as fit, and the result says how
            many. None: half of the memory that is free.
        seconds: of timing for each benchmark, about.
    """

    models: tuple[Model, ...]
    prompts: tuple[int, ...]
    dtypes: tuple[str, ...]
    long: tuple[int, ...]
    many: tuple[int, int]
    key_bytes: int | None
    seconds: float


TYPES = ("bfloat16", "float32")
GRIDS = {
    "quick": Grid(QUICK_MODELS, QUICK_PROMPTS, TYPES, QUICK_LONG, QUICK_MANY, 2**20, 0.005),
    "default": Grid(MODELS, (2048, 8192), TYPES, (32768, 131072), (64, 4096), 32 * 2**20, 0.15),
    "full": Grid(MODELS, (2048, 8192, 32768, 131072), TYPES, (2048, 8192, 32768, 131072, 2**20), MANY, None, 2.0),
}


def layers_within(m: Model, tokens: int, element: int, key_bytes: int) -> int:
    """How many layers' keys fit in so many bytes: at least one, at most all."""
    return max(1, min(m.layers, key_bytes // (m.kv_heads * tokens * m.head_dim * element)))


def size_name(tokens: int) -> str:
    """131072 -> "128K"."""
    for unit, factor in (("M", 2**20), ("K", 2**10)):
        if tokens % factor == 0:
            return f"{tokens // factor}{unit}"
    return str(tokens)
