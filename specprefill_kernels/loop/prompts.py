"""Prompts in, token ids out: text, chat messages or ids, for a speculator that may have another tokenizer.

Text becomes ids once, with the base's tokenizer; chat messages are rendered once, with the base's chat template. A
speculator with another tokenizer reads that SAME rendered text. Rendering the messages with its own template would look
more familiar to it, but the two texts would then only share the messages' contents: role markers, tool definitions and
the generation prompt would have no importance at all and would be the first to be dropped. With one text every base
token has its characters in the speculator's text, and offsets cannot go out of step. Markers that the speculator does
not know are plain text to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels.loop.align import project_importance
from specprefill_kernels.loop.results import Span

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Prompt:
    """One prompt in the base's tokens: `input_ids` [1, T] on the CPU, and the text they came from, if known.

    `templated` says that a chat template has written the special tokens into the text.
    """

    input_ids: Tensor
    text: str | None = None
    templated: bool = False


def is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts. A list of ints is one prompt's ids, a list of dicts one chat."""
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and not isinstance(prompt[0], (int, dict))


def read_prompt(prompt: Any, tokenizer: Any, template_options: Mapping[str, Any] | None = None) -> Prompt:
    """Ids of one prompt: text, chat messages, ids as a list, or a tensor [T] or [1, T].

    `template_options` go to the chat template: `tools`, `enable_thinking`, ...

    Raises:
        ValueError: an empty prompt, a batch of rows, or text without a tokenizer.
        TypeError: anything else than a prompt.
    """
    if isinstance(prompt, Tensor):
        if prompt.ndim not in (1, 2) or (prompt.ndim == 2 and prompt.shape[0] != 1):
            raise ValueError(f"prompt: expected ids [T] or [1, T] (a list for several), got {list(prompt.shape)}")
        if prompt.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"prompt: expected integer ids, got {prompt.dtype}")
        return _checked(Prompt(prompt.reshape(1, -1).to("cpu", torch.int64)))
    if isinstance(prompt, str):
        ids = _need(tokenizer)(prompt)["input_ids"]
        return _checked(Prompt(torch.tensor([ids], dtype=torch.int64), prompt))
    if isinstance(prompt, Sequence) and len(prompt) and all(isinstance(item, dict) for item in prompt):
        options = {"add_generation_prompt": True, **(template_options or {})}
        text = _need(tokenizer).apply_chat_template(list(prompt), tokenize=False, **options)
        # The template has written the special tokens out already.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return _checked(Prompt(torch.tensor([ids], dtype=torch.int64), text, templated=True))
    if isinstance(prompt, Sequence) and all(isinstance(item, int) for item in prompt):
        return _checked(Prompt(torch.tensor([list(prompt)], dtype=torch.int64)))
    raise TypeError(f"prompt: expected text, chat messages or token ids, got {type(prompt).__name__}")


def _checked(prompt: Prompt) -> Prompt:
    if prompt.input_ids.numel() == 0:
        raise ValueError("prompt: expected at least one token, got none")
    return prompt


def _need(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError("tokenizer: expected one for a prompt of text or messages, got None")
    return tokenizer


def spans_of(prompt: Prompt, passage: str, tokenizer: Any) -> list[Span]:
    """Token spans of every place where `passage` stands in the prompt's text; a token that touches it is in.

    Raises:
        ValueError: the passage is not there, or the tokenizer has no offsets.
    """
    if prompt.text is None or not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "protect: expected (start, end) spans where the prompt came as ids or the tokenizer is slow, got text"
        )
    encoded = tokenizer(prompt.text, add_special_tokens=not prompt.templated, return_offsets_mapping=True)
    found: list[Span] = []
    start = prompt.text.find(passage) if passage else -1
    while start >= 0:
        end = start + len(passage)
        inside = [i for i, (left, right) in enumerate(encoded["offset_mapping"]) if left < end and right > start]
        found.append((inside[0], inside[-1] + 1))
        start = prompt.text.find(passage, end)
    if not found:
        raise ValueError(f"protect: expected a passage of the prompt's text, got {passage!r}")
    return found


def same_tokens(a: Any, b: Any) -> bool:
    """Whether an id means the same string to both tokenizers."""
    return a is b or (len(a) == len(b) and a.get_vocab() == b.get_vocab())


class TokenBridge:
    """Carries one prompt to a speculator with another tokenizer, and its importance back, through characters.

    Both tokenizers must be fast ones, which know each token's characters.

    Raises:
        ValueError: a tokenizer has no offsets.
    """

    def __init__(self, base_tokenizer: Any, speculator_tokenizer: Any) -> None:
        for name, tokenizer in (("tokenizer", base_tokenizer), ("speculator_tokenizer", speculator_tokenizer)):
            if not getattr(tokenizer, "is_fast", False):
                raise ValueError(
                    f"{name}: expected a fast tokenizer, which has offsets, got {type(tokenizer).__name__}"
                )
        self._base = base_tokenizer
        self._speculator = speculator_tokenizer

    def cross(self, prompt: Prompt) -> tuple[Tensor, Offsets, Offsets]:
        """(speculator ids [1, Ts], the base tokens' character offsets, the speculator tokens').

        Raises:
            ValueError: the prompt came as ids which its own tokenizer does not give back for their text.
        """
        text, special = prompt.text, not prompt.templated
        if text is None:
            text, special = self._base.decode(prompt.input_ids[0], skip_special_tokens=False), False
        base = self._base(text, add_special_tokens=special, return_offsets_mapping=True)
        if base["input_ids"] != prompt.input_ids[0].tolist():
            raise ValueError(
                "prompt: expected text or messages when the speculator has another tokenizer, "
                "got ids that do not come back from their own text"
            )
        # The speculator wants its own BOS, once.
        bos = self._speculator.bos_token
        spec = self._speculator(
            text, add_special_tokens=not (bos and text.startswith(bos)), return_offsets_mapping=True
        )
        return torch.tensor([spec["input_ids"]], dtype=torch.int64), base["offset_mapping"], spec["offset_mapping"]

    @staticmethod
    def back(importance: Tensor, base_offsets: Offsets, speculator_offsets: Offsets) -> Tensor:
        """Importance over the base's tokens, [T], from that over the speculator's, [Ts]."""
        return project_importance(importance, speculator_offsets, base_offsets)
