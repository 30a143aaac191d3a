"""What the loop returns. Every result says how it was made: mode, reason, backend, and the seconds of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from specprefill_kernels.loop.budgets import Span

if TYPE_CHECKING:
    from specprefill_kernels.loop.costs import Prediction


@dataclass(frozen=True)
class PromptSelection:
    """Which tokens of one prompt the base model will read.

    Attributes:
        input_ids: [T] int64, the prompt in the base's tokens.
        importance: [T] fp32 over the base's tokens; None when nothing was scored (dense, decided before scoring).
        kept_indices: [K] int64, ascending positions of the kept tokens.
        spans: the same as merged (start, end) pairs, end exclusive.
        mode: "sparse", or "dense" when every token is kept.
        reason: why it is dense; for "sparse" what was kept, in words.
        seconds: stage -> seconds.
        backend: which implementation of the ops ran, "none" when none did.
        overflow: protected chunks exceeded the budget; they were kept all the same.
        num_look_ahead: query rows that were scored, 0 when none were.
        look_ahead_tokens: the speculator's decoded tokens whose queries were scored.
        scored_layers: the layers whose attention was scored.
        protected: what had to survive, as merged (start, end) token pairs.
        protected_parts: the same by what they are ("system", "markers", ..., see `Protection`); no token comes twice.
        layer_importance: [len(scored_layers), T] fp32, each layer's own importance, where it was asked for.
        prediction: what a cost model, where one was given, predicted for both ways.
        cached: a `SelectionCache` knew this selection; no speculator ran.
        reused_tokens: speculator tokens that a `Session` did not have to compute again.
        speculator_attention: how the speculator read the prompt: "dense", "sparse" (`config.speculator_attention`, at
            least in some layers), or "none" when no speculator ran.
        attention_reason: for "sparse" which blocks were read in how many layers, and why others were dense; for "dense"
            why, where sparse was asked for.
    """

    input_ids: Tensor = field(repr=False)
    importance: Tensor | None = field(repr=False)
    kept_indices: Tensor = field(repr=False)
    spans: tuple[Span, ...]
    mode: str
    reason: str
    seconds: Mapping[str, float]
    backend: str
    overflow: bool = False
    num_look_ahead: int = 0
    look_ahead_tokens: tuple[int, ...] = ()
    scored_layers: tuple[int, ...] = ()
    protected: tuple[Span, ...] = ()
    protected_parts: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    layer_importance: Tensor | None = field(default=None, repr=False)
    prediction: Prediction | None = None
    cached: bool = False
    reused_tokens: int = 0
    speculator_attention: str = "none"
    attention_reason: str = ""

    @property
    def prompt_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def kept_tokens(self) -> int:
        return int(self.kept_indices.shape[0])


@dataclass(frozen=True)
class GenerationResult:
    """One prompt's answer.

    Attributes:
        text: the answer without special tokens; "" when no tokenizer was given.
        tokens: the generated ids, EOS included if it came.
        prompt_tokens, kept_tokens: T and K.
        mode, reason, spans, backend: see `PromptSelection`.
        seconds: stage -> seconds: tokenize, speculator_prefill, look_ahead, score, select, base_prefill, decode. Stages
            that did not run are absent.
        ttft: seconds until the first token was known: all stages but decode.
        selection: the whole selection, importance included.
        prefilled_tokens: tokens that the base's prefill computed: K, or fewer where a `Session` had some of them.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    kept_tokens: int
    mode: str
    reason: str
    spans: tuple[Span, ...]
    seconds: Mapping[str, float]
    ttft: float
    backend: str
    selection: PromptSelection = field(repr=False)
    prefilled_tokens: int = 0
