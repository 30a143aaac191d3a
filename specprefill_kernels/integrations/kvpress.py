"""kvpress: this library's importance as a press, so that its users can compare it with the presses they know.

A press prunes the KV cache AFTER the model has read the whole prompt. So it shows what a selection does to answers and
to the memory of decoding; it cannot show what speculative prefill is for, an earlier first token. Other differences
from the loop: what is pruned is chosen layer by layer unless `importance` is given; the context is scored before the
question is known, as kvpress's pipeline has it; nothing is decoded, so queries are the last rows of the prompt; and
later layers, and pruned tokens' influence on the kept ones, were computed from the full prompt.

Needs kvpress 0.5 (`pip install '.[kvpress]'`), which wants an older transformers than the loop is tested with.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import ScorerPress
from kvpress.utils import compute_n_kept, get_prerope_query_states
from torch import Tensor, nn

from specprefill_kernels import _checks
from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.ops.finalize import finalize_importance
from specprefill_kernels.ops.score import new_state, score_layer_

__all__ = ["SpeculativePrefillPress"]

MAX_TOKENS = 2**24  # ranks are fp32 integers
NORMED = ("Gemma3Attention", "Qwen3Attention")  # whose query norm kvpress applies
# Layers whose queries are known to be the projection, that norm, and the rotation. Others may leave out the rotation in
# some layers (SmolLM3, Cohere 2), clip (OLMo) or scale by position, and nothing in a module says so.
LAYERS = (*NORMED, "LlamaAttention", "MistralAttention", "Phi3Attention", "Qwen2Attention")


@dataclass
class SpeculativePrefillPress(ScorerPress):
    """Keeps the chunks of largest importance (Liu, Chen, Zhang, arXiv 2502.02789), as this library defines it.

    The score of a token is the attention that the last `window_size` prompt rows pay it in this layer: softmax in fp32
    (each row sees keys up to itself), pooled, the maximum over query heads, reduced over rows, averaged over chunks.
    Defaults are those of the preset "default". As with every `ScorerPress`, `int(T * (1 - compression_ratio))` entries
    of each KV head are kept; the last chunk that fits may be kept in part.

    Attributes:
        compression_ratio: fraction of the entries REMOVED, in [0, 1): 1 - keep_ratio.
        window_size: last prompt rows that are queries; a shorter prompt has fewer.
        chunk_size: tokens per chunk. 1: scores are importances. Otherwise they are ranks, T for the best token down to
            1: chunks by their mean, ties to the lower index, tokens of a chunk in their order; so that whole chunks are
            kept, and a tie is never left to `topk`. Only their order means something then, so presses that compare
            scores of different heads (AdaKV) want chunk_size=1.
        pool_kernel_size, pool_edge, pool_order, reduce: see `SpecPrefillConfig`.
        sink, tail: first and last tokens that are always kept, paid from the same budget.
        per_head: True takes the maximum over the query heads of each KV head, so that each keeps tokens of its own.
            False, as in speculative prefill, over all heads of the layer: all keep the same.
        importance: [T] or [B, T] fp32 from outside, such as a speculator's: then all layers and heads keep the same
            tokens, those that speculative prefill with this importance would have read, and nothing is scored here.
            Set it anew for each prompt.
        backend: which implementation of the ops runs.

    Raises:
        ValueError: an option is wrong, or cannot be met for a prompt; the message names it.
    """

    compression_ratio: float = 0.0
    window_size: int = 8
    chunk_size: int = 8
    pool_kernel_size: int = 31
    pool_edge: str = "zero"
    pool_order: str = "after_max"
    reduce: str = "max"
    sink: int = 0
    tail: int = 0
    per_head: bool = False
    importance: Tensor | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        _checks.number("compression_ratio", self.compression_ratio)
        if not 0 <= self.compression_ratio < 1:
            _checks.fail("compression_ratio", "a fraction in [0, 1)", self.compression_ratio)
        _checks.integer("window_size", self.window_size, 1)
        if not isinstance(self.per_head, bool):
            raise TypeError(f"per_head: expected a bool, got {type(self.per_head).__name__}")
        self._config()

    def _config(self) -> SpecPrefillConfig:
        """The same options, checked; attributes may have been changed since."""
        return SpecPrefillConfig(
            look_ahead=self.window_size,
            queries="observation_window",
            chunk_size=self.chunk_size,
            pool_kernel_size=self.pool_kernel_size,
            pool_edge=self.pool_edge,
            pool_order=self.pool_order,
            reduce=self.reduce,
            sink=self.sink,
            tail=self.tail,
            backend=self.backend,
        )

    @torch.no_grad()
    def score(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        """[B, Hkv, T] fp32, see `chunk_size`. `values` and `attentions` are not used."""
        del values, attentions
        batch, kv_heads, tokens = keys.shape[:3]
        if tokens > MAX_TOKENS:
            _checks.fail("keys", f"at most {MAX_TOKENS} tokens", tokens)
        kept = compute_n_kept(tokens, self.compression_ratio)
        if self.sink + self.tail > kept:
            _checks.fail("sink + tail", f"at most {kept}, the entries kept of {tokens}", self.sink + self.tail)
        if self.importance is not None:
            importance = _given(self.importance, batch, tokens, keys.device)[:, None]
        else:
            importance = self._score_layer(module, hidden_states, keys, kwargs)
        return self._order(importance).expand(batch, kv_heads, tokens).clone()  # other presses write into it

    def _score_layer(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, kwargs: Any) -> Tensor:
        """Importance by this layer alone, [B, 1 or Hkv, T]."""
        batch, kv_heads, tokens = keys.shape[:3]
        if hidden_states.shape[1] != tokens:
            _checks.fail("keys", f"the {hidden_states.shape[1]} tokens of this forward alone", tokens)
        config, rows = self._config(), min(self.window_size, tokens)
        window = _window(module)
        _check_mask(kwargs.get("attention_mask"), tokens, window)
        query = _queries(module, hidden_states[:, -rows:], kwargs["position_embeddings"]).transpose(1, 2)
        if self.per_head:  # each KV head is a sequence of its own
            query = query.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)
            keys = keys.flatten(0, 1).unsqueeze(1)
        state = new_state(len(keys), rows, tokens, device=keys.device)
        score_layer_(
            state,
            query,
            keys,
            queries="observation_window",
            scale=getattr(module, "scaling", None),
            softcap=getattr(module, "attn_logit_softcapping", None),
            window=window,
            pool_kernel_size=config.pool_kernel_size,
            pool_edge=config.pool_edge,
            pool_order=config.pool_order,
            backend=config.backend,
        )
        importance = finalize_importance(
            state,
            reduce=config.reduce,
            pool_kernel_size=config.pool_kernel_size if config.pool_order == "after_max" else None,
            pool_edge=config.pool_edge,
            backend=config.backend,
        )
        return importance.view(batch, -1, tokens)

    def _order(self, importance: Tensor) -> Tensor:
        """Scores that `topk` orders as `select_chunks` would; protected tokens first."""
        tokens, size = importance.shape[-1], self.chunk_size
        if size > 1:
            starts = torch.arange(0, tokens, size, device=importance.device)
            padded = nn.functional.pad(importance.double(), (0, -tokens % size)).unflatten(-1, (-1, size))
            means = (padded.sum(-1) / (tokens - starts).clamp(max=size)).float()
            importance = means.repeat_interleave(size, -1)[..., :tokens]
        elif not self.sink and not self.tail:
            return importance
        if self.sink or self.tail:
            importance = importance.clone()
            best = importance.amax(-1, keepdim=True)
            first = torch.nextafter(best + 1, best.new_tensor(torch.inf))  # more than the best, if 1 is lost in it, too
            importance[..., : self.sink] = first
            importance[..., tokens - self.tail :] = first
        if size == 1:
            return importance
        best = importance.argsort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(tokens, 0, -1, dtype=torch.float32, device=importance.device)
        return torch.empty_like(importance).scatter_(-1, best, ranks.expand_as(importance))


def _given(importance: Tensor, batch: int, tokens: int, device: torch.device) -> Tensor:
    _checks.tensor("importance", importance, ndim=(1, 2), dtypes=(torch.float32,))
    rows = importance if importance.ndim == 2 else importance[None].expand(batch, -1)
    if rows.shape != (batch, tokens):
        wanted = f"one value for each of the prompt's {tokens} tokens (of {batch} prompts)"
        _checks.fail("importance", wanted, f"shape {_checks.shape(importance)}; it is set anew for each prompt")
    if not bool(torch.isfinite(rows).all()):
        _checks.fail("importance", "finite values", "NaN or Inf")
    return rows.to(device)


def _queries(module: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """[B, Hq, rows, D]: queries of the last rows as the layer's attention had them, by the model's own rotation."""
    name = type(module).__name__
    rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if name not in LAYERS or rotate is None:
        raise ValueError(
            f"model: expected an attention layer whose queries are known to be those of the model "
            f"({', '.join(sorted(LAYERS))}), or `importance`, got {name}"
        )
    if hasattr(module, "q_norm") and name not in NORMED:
        raise ValueError(
            f"model: expected an attention layer whose queries kvpress can compute, got {name} with q_norm"
        )
    query = get_prerope_query_states(module, hidden_states)
    cos, sin = (angles[:, -hidden_states.shape[1] :] for angles in position_embeddings)
    rotated: Tensor = rotate(query, query[:, :1], cos, sin)[0]
    return rotated


def _window(module: nn.Module) -> int | None:
    """Keys that a row of a sliding-window layer sees, itself included."""
    holder = module if hasattr(module, "sliding_window") else module.config  # a model's whose layers are all alike
    window: Any = getattr(holder, "sliding_window", None)
    return int(window) if window else None


def _check_mask(mask: Any, tokens: int, window: int | None) -> None:
    """The last row sees every key, or all of its window: nothing is padded."""
    if not isinstance(mask, Tensor):
        return
    row = mask if mask.ndim == 2 else mask[..., -1, :]  # [B, T], 1 where there is a token; [B, 1, rows, T]
    row = row[..., :tokens]
    additive = mask.ndim == 4 and mask.dtype != torch.bool
    seen = row == 0 if additive else row != 0
    if not bool(seen[..., -(window or tokens) :].all()):
        _checks.fail("attention_mask", "prompts without padding", "a mask that hides keys from the last row")
