"""From the loop's selection, which knows tensors, to a `Reading`, which knows plain numbers and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from specprefill_kernels._version import __version__
from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop import PromptSelection
from specprefill_kernels.loop.prompts import encoded_prompt, read_prompt
from specprefill_kernels.report.data import LayerImportance, Protected, Reading, Span, make_pieces

# What a reader calls the parts that `loop.protection` finds.
LABELS = {
    "system": "system prompt",
    "tools": "tool definitions",
    "markers": "role markers",
    "turn end": "end of the question",
    "user": "asked for",
}


def read(
    selection: PromptSelection,
    prompt: Any,
    tokenizer: Any,
    config: SpecPrefillConfig,
    *,
    title: str,
    base: str,
    speculator: str,
    question: str = "",
    passages: Sequence[str] = (),
    template_options: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Reading:
    """What `selection` keeps of `prompt`, for a page or a picture.

    Args:
        selection: of `SpecPrefill.select`; with `per_layer=True` the page has layers to choose from.
        prompt: the text or chat messages that were selected from.
        tokenizer: the base's.
        config: what the selection was made with.
        title: what the prompt is, in words.
        base, speculator: the models' names.
        question: what was asked about it, if known.
        passages: where the answer lies, if known: passages of the prompt's text, each in its first place.
        template_options: as for `SpecPrefill.select`.
        rest: other fields of `Reading`: machine, command.

    Raises:
        ValueError: the tokenizer has no offsets, or gives the prompt other tokens than the selection has.
    """
    text, offsets = prompt_offsets(prompt, tokenizer, template_options)
    total = selection.prompt_tokens
    if len(offsets) != total:
        raise ValueError(f"prompt: expected the {total} tokens of the selection, got {len(offsets)}")
    kept = torch.zeros(total, dtype=torch.bool)
    kept[selection.kept_indices.cpu()] = True
    importance = [0.0] * total if selection.importance is None else selection.importance.cpu().tolist()
    layers = None
    if selection.layer_importance is not None:
        layers = LayerImportance(selection.scored_layers, selection.layer_importance.cpu().tolist())
    evidence = (tokens_of(text, passage, offsets) for passage in passages)
    return Reading(
        title=title,
        base=base,
        speculator=speculator,
        prompt_tokens=total,
        kept_tokens=selection.kept_tokens,
        chunk_size=config.chunk_size,
        mode=selection.mode,
        reason=selection.reason,
        backend=selection.backend,
        pieces=make_pieces(text, offsets, importance, kept.tolist()),
        question=question,
        budget=budget_text(config),
        seconds=dict(selection.seconds),
        protected=[
            Protected(start, end, LABELS.get(label, label))
            for label, spans in selection.protected_parts.items()
            for start, end in spans
        ],
        evidence=[span for span in evidence if span is not None],
        layers=layers,
        version=__version__,
        **rest,
    )


def budget_text(config: SpecPrefillConfig) -> str:
    if config.keep_tokens is not None:
        return f"at most {config.keep_tokens:,} tokens"
    if config.keep_mass is not None:
        return f"{config.keep_mass:.0%} of the importance"
    return f"keep ratio {config.keep_ratio:g}"


def as_prompt(text: str, tokenizer: Any) -> Any:
    """A user's message where the tokenizer has a chat template, else the bare text."""
    return [{"role": "user", "content": text}] if getattr(tokenizer, "chat_template", None) else text


def prompt_offsets(
    prompt: Any, tokenizer: Any, template_options: Mapping[str, Any] | None = None
) -> tuple[str, list[Span]]:
    """The text the model reads, template included, and each token's characters in it: as the loop takes them.

    Raises:
        ValueError: the tokenizer has no offsets, and its tokens do not decode to the text.
    """
    text, spans = encoded_prompt(read_prompt(prompt, tokenizer, template_options), tokenizer)
    return text, [(start, end) for start, end in spans.tolist()]


def tokens_of(text: str, passage: str | None, offsets: Sequence[Span]) -> Span | None:
    """The token positions (start, end) that hold the first `passage`; None where there is none, or in no token."""
    if not passage or passage not in text:
        return None
    start = text.index(passage)
    end = start + len(passage)
    inside = [index for index, (a, b) in enumerate(offsets) if a < end and b > start]
    return (inside[0], inside[-1] + 1) if inside else None
