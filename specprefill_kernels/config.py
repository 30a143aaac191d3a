"""SpecPrefillConfig: every choice that known implementations of speculative prefill make differently, in one place.

The scoring defaults are the paper's (Liu, Chen, Zhang, ICML 2025, arXiv 2502.02789). The paper protects nothing; here
the parts of a chat template survive by default.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from specprefill_kernels.ops.select.budget import Budget
from specprefill_kernels.ops.sparse_attention.blocks import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "pool_edge": ("zero", "valid"),
        "pool_order": ("before_max", "after_max"),
        "reduce": ("mean", "max"),
        "rounding": ("ceil", "floor"),
        "queries": ("look_ahead", "observation_window", "both"),
        "normalize_over": ("prompt", "visible"),
        "window": ("mask", "skip"),
        "speculator_attention": ("dense", "sparse"),
        "protect": ("template", "none"),
        "backend": ("auto", "reference", "cpu", "triton", "cuda"),
    }
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The best we have measured (docs/quality.md). Wide pooling carries a token's neighbourhood, so chunks need not,
        # and small ones cut less. After the maximum it costs next to nothing. What any one of the look-ahead rows asks
        # for counts in full.
        "default": MappingProxyType(
            {"pool_order": "after_max", "pool_kernel_size": 31, "chunk_size": 8, "reduce": "max"}
        ),
        # The published algorithm protects nothing.
        "paper": MappingProxyType({"protect": "none"}),
        # Luce PFlash: one pass over the prompt and no decoding, the last 8 prompt rows (each causal) as queries, scores
        # smoothed after the maximum and divided by the tokens inside the prompt, a budget rounded down. The head and
        # tail chunks that it forces shrink with the budget, which `sink` and `tail` never do: set those yourself.
        "pflash": MappingProxyType(
            {
                "keep_ratio": 0.05,
                "queries": "observation_window",
                "pool_order": "after_max",
                "pool_edge": "valid",
                "rounding": "floor",
                "protect": "none",
            }
        ),
        # llama.cpp (pull request 27692): reads the softmax the model computed, which also ran over the look-ahead
        # tokens, and always keeps BOS and the prompt's last token.
        "llama_cpp": MappingProxyType({"normalize_over": "visible", "sink": 1, "tail": 1, "protect": "none"}),
    }
)


@dataclass(frozen=True)
class SpecPrefillConfig:
    """How importance is computed, how much is kept, and when the loop runs dense instead.

    Attributes:
        keep_ratio: fraction of the prompt's chunks to KEEP, in (0, 1]; the budget unless one of the next two is given.
        look_ahead: query rows N: the last prompt token and N - 1 decoded tokens (or the last N prompt tokens).
        chunk_size: tokens per chunk; chunks are kept or dropped whole.
        keep_tokens: absolute budget in tokens, instead of `keep_ratio`.
        keep_mass: keep the fewest chunks that hold this fraction of the importance, instead of `keep_ratio`.
        pool_kernel_size: odd width of the average pooling along the prompt; 1 is no pooling.
        pool_edge: "zero" divides by the width everywhere, "valid" by the number of tokens inside the prompt.
        pool_order: "before_max" pools each head's probabilities, "after_max" pools the maximum.
        reduce: "mean" or "max" over look-ahead rows.
        rounding: "ceil" or "floor" of the budget in chunks.
        queries: "look_ahead" decodes N - 1 tokens; "observation_window" takes the last N prompt rows, with no decoding;
            "both" takes the last `observation_rows` prompt rows and the N - 1 decoded tokens.
        observation_rows: prompt rows of queries="both".
        normalize_over: "prompt" normalizes over prompt keys only, "visible" over all keys that the row saw.
        score_layers: indices of the layers to score; None for all. Negative indices count from the last layer.
        window: sliding-window layers are scored within their window ("mask"), or left out where the window is shorter
            than the prompt ("skip").
        prefill_chunk: prompt tokens that the speculator reads in one forward; None reads all at once. Bounds the memory
            of activations, which grows with it and not with the prompt.
        speculator_attention: "dense", or "sparse": block-sparse attention while the speculator reads a prompt of more
            than attention_keep_blocks * attention_block_size tokens, see `sparse_prefill_attention`. The rows that are
            scored, decoded tokens, and layers with a soft cap or a sliding window stay dense; results say so.
        attention_block_size: tokens of a block of sparse attention, a power of two from 16 to 256.
        attention_keep_blocks: blocks that each block of queries reads, the following two included.
        attention_sink_blocks: first blocks of the prompt that all read.
        attention_local_blocks: last blocks up to its own that each reads, at least its own.
        protect: "template" keeps what a chat template stands for: system prompt, tool definitions, role markers and the
            end of the last user turn. "none" keeps only what a call's own `protect` names.
        turn_end_tokens: with protect="template", at most so many last tokens of the last user turn.
        sink: first tokens that are always kept.
        tail: last tokens that are always kept.
        min_prompt_tokens: shorter prompts run dense; a prompt of a few chunks has nothing to gain.
        backend: which implementation of the ops runs.

    Raises:
        ValueError: a field has a wrong type or value; the message names it.

    Example:
        >>> SpecPrefillConfig.preset("pflash", keep_ratio=0.1).queries
        'observation_window'
    """

    keep_ratio: float | None = 0.2
    look_ahead: int = 8
    chunk_size: int = 32
    keep_tokens: int | None = None
    keep_mass: float | None = None
    pool_kernel_size: int = 13
    pool_edge: str = "zero"
    pool_order: str = "before_max"
    reduce: str = "mean"
    rounding: str = "ceil"
    queries: str = "look_ahead"
    normalize_over: str = "prompt"
    score_layers: tuple[int, ...] | None = None
    observation_rows: int = 32
    window: str = "mask"
    prefill_chunk: int | None = 4096
    speculator_attention: str = "dense"
    attention_block_size: int = 128
    attention_keep_blocks: int = 32
    attention_sink_blocks: int = 1
    attention_local_blocks: int = 2
    protect: str = "template"
    turn_end_tokens: int = 32
    sink: int = 0
    tail: int = 0
    min_prompt_tokens: int = 256
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("look_ahead", "chunk_size", "pool_kernel_size", "observation_rows", "attention_local_blocks"):
            _integer(name, getattr(self, name), 1)
        for name in ("sink", "tail", "min_prompt_tokens", "turn_end_tokens", "attention_sink_blocks"):
            _integer(name, getattr(self, name), 0)
        if self.prefill_chunk is not None:
            _integer("prefill_chunk", self.prefill_chunk, 1)
        _integer("attention_block_size", self.attention_block_size, MIN_BLOCK_SIZE)
        if self.attention_block_size > MAX_BLOCK_SIZE or self.attention_block_size & (self.attention_block_size - 1):
            power = f"a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
            _fail("attention_block_size", power, self.attention_block_size)
        _integer("attention_keep_blocks", self.attention_keep_blocks, 1)
        if self.attention_keep_blocks < self.attention_sink_blocks + self.attention_local_blocks:
            fixed = self.attention_sink_blocks + self.attention_local_blocks
            expected = f"at least attention_sink_blocks + attention_local_blocks = {fixed}"
            _fail("attention_keep_blocks", expected, self.attention_keep_blocks)
        if self.pool_kernel_size % 2 == 0:
            _fail("pool_kernel_size", "an odd number (a centred window)", self.pool_kernel_size)
        for name, options in CHOICES.items():
            if getattr(self, name) not in options:
                _fail(name, f"one of {options}", getattr(self, name))
        if self.keep_tokens is not None and self.keep_mass is not None:
            _fail("keep_mass", "None when keep_tokens is given (one budget)", self.keep_mass)
        if self.keep_tokens is not None:
            _integer("keep_tokens", self.keep_tokens, 1)
        if self.keep_mass is not None:
            _fraction("keep_mass", self.keep_mass)
        if self.keep_ratio is not None:
            _fraction("keep_ratio", self.keep_ratio)
        elif self.keep_tokens is None and self.keep_mass is None:
            _fail("keep_ratio", "a fraction in (0, 1], or keep_tokens, or keep_mass", None)
        if self.score_layers is not None:
            object.__setattr__(self, "score_layers", _layers(self.score_layers))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "SpecPrefillConfig":
        """A named configuration with `changes` on top.

        "default" is the best we have measured; "paper", "pflash" and "llama_cpp" are known implementations'.
        """
        if name not in PRESETS:
            _fail("name", f"one of {tuple(PRESETS)}", name)
        return cls(**{**PRESETS[name], **changes})

    def replace(self, **changes: Any) -> "SpecPrefillConfig":
        """A copy with some fields changed, checked like a new one."""
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                _fail(name, f"a field of SpecPrefillConfig, one of {sorted(known)}", "an unknown name")
        return replace(self, **changes)

    @property
    def budget(self) -> dict[str, Any]:
        """The budget as the one keyword that `select_chunks` takes."""
        if self.keep_tokens is not None:
            return {"keep_tokens": self.keep_tokens}
        if self.keep_mass is not None:
            return {"keep_mass": self.keep_mass}
        return {"keep_ratio": self.keep_ratio}

    def budget_chunks(self, seq_len: int) -> int | None:
        """Chunks that the budget allows of `seq_len` tokens. None for keep_mass, which depends on the importance."""
        if self.keep_mass is not None:
            return None
        budget = Budget(
            keep_ratio=None if self.keep_tokens is not None else self.keep_ratio,
            keep_tokens=self.keep_tokens,
            keep_mass=None,
            chunk_size=self.chunk_size,
            rounding=self.rounding,
            sink=self.sink,
            tail=self.tail,
        )
        return budget.chunks(self._chunks(seq_len))

    def keeps_all(self, seq_len: int) -> bool:
        """Whether the budget surely covers a whole prompt, so that there is nothing to select."""
        allowed = self.budget_chunks(seq_len)
        return allowed is not None and allowed >= self._chunks(seq_len)

    def _chunks(self, seq_len: int) -> int:
        return -(-seq_len // self.chunk_size)


def _fail(name: str, expected: str, got: object) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _integer(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        _fail(name, f"an int of at least {minimum}", value)


def _fraction(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        _fail(name, "a fraction in (0, 1]", value)


def _layers(value: object) -> tuple[int, ...]:
    try:
        layers: tuple[Any, ...] = tuple(value)  # type: ignore[arg-type]
    except TypeError:
        layers = ()
    if isinstance(value, str) or not layers or any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
        _fail("score_layers", "None or layer indices, at least one", value)
    if len(set(layers)) != len(layers):
        _fail("score_layers", "each layer once", value)
    return layers
