"""Prompts in, token ids out: text, chat messages or ids, for a speculator that may have another tokenizer.

Text becomes ids once, with the base's tokenizer; chat messages are rendered once, with the base's chat template. A
speculator with another tokenizer reads that SAME rendered text. Rendering the messages with its own template would look
more familiar to it, but the two texts would then only share the messages' contents: role markers, tool definitions and
the generation prompt would have no importance at all and would be the first to be dropped. With one text every base
token has its characters in the speculator's text, and offsets cannot go out of step. Markers that the speculator does
not know are plain text to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specprefill_kernels.loop.align import project_importance
from specprefill_kernels.loop.offsets import Encoded, complete, encode, pieces, told


@dataclass(frozen=True)
class Prompt:
    """One prompt in the base's tokens.

    Attributes:
        input_ids: [1, T] int64 on the CPU.
        text: what they came from, if known; for messages what the chat template made of them.
        templated: a chat template has written the special tokens into the text.
        messages: the chat messages, if it was a chat.
        template_options: what the chat template was given beside them.
        encoding: the record that a fast tokenizer made of the text.
    """

    input_ids: Tensor
    text: str | None = None
    templated: bool = False
    messages: tuple[Mapping[str, Any], ...] | None = field(default=None, repr=False)
    template_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    encoding: Any = field(default=None, repr=False)

    @cached_property
    def encoded(self) -> Encoded | None:
        """The tokens and their characters, where a fast tokenizer made them. Found out when first asked for."""
        return None if self.encoding is None or self.text is None else told(self.encoding, self.text)


def is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts. A list of ints is one prompt's ids, a list of dicts one chat."""
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and not isinstance(prompt[0], (int, dict))


def read_prompt(prompt: Any, tokenizer: Any, template_options: Mapping[str, Any] | None = None) -> Prompt:
    """Ids of one prompt: text, chat messages, ids as a list, or a tensor [T] or [1, T]. A `Prompt` stays as it is.

    `template_options` go to the chat template: `tools`, `enable_thinking`, ... The answer is opened
    (`add_generation_prompt`) unless they say otherwise, or let the last message go on (`continue_final_message`).

    Raises:
        ValueError: an empty prompt, a batch of rows, text without a tokenizer, or template options without messages.
        TypeError: anything else than a prompt.
    """
    is_chat = isinstance(prompt, Sequence) and len(prompt) and all(isinstance(item, dict) for item in prompt)
    if template_options and not is_chat:
        raise ValueError(
            f"template_options: expected none for a prompt that is no chat, which no chat template renders, got "
            f"{', '.join(template_options)}"
        )
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, Tensor):
        if prompt.ndim not in (1, 2) or (prompt.ndim == 2 and prompt.shape[0] != 1):
            raise ValueError(f"prompt: expected ids [T] or [1, T] (a list for several), got {list(prompt.shape)}")
        if prompt.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"prompt: expected integer ids, got {prompt.dtype}")
        return _checked(Prompt(prompt.reshape(1, -1).to("cpu", torch.int64)))
    if isinstance(prompt, str):
        return _from_text(prompt, _need(tokenizer), special=True)
    if is_chat:
        given = template_options or {}
        options = {"add_generation_prompt": not given.get("continue_final_message"), **given}
        text = render(_need(tokenizer), prompt, options)
        # The template has written the special tokens out already.
        return _from_text(text, tokenizer, special=False, messages=tuple(prompt), template_options=options)
    if isinstance(prompt, Sequence) and all(isinstance(item, int) for item in prompt):
        return _checked(Prompt(torch.tensor([list(prompt)], dtype=torch.int64)))
    raise TypeError(f"prompt: expected text, chat messages or token ids, got {type(prompt).__name__}")


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """What the chat template makes of the messages."""
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    return text


def _from_text(text: str, tokenizer: Any, *, special: bool, **fields: Any) -> Prompt:
    surrogate = (
        next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None) if _broken(text) else None
    )
    if surrogate is not None:
        raise ValueError(
            f"prompt: expected text that UTF-8 can hold, got half a surrogate pair at character {surrogate}"
        )
    batch = tokenizer(text, add_special_tokens=special)
    encoding = batch.encodings[0] if getattr(tokenizer, "is_fast", False) else None
    input_ids = torch.tensor([batch["input_ids"]], dtype=torch.int64)
    return _checked(Prompt(input_ids, text, templated=not special, encoding=encoding, **fields))


def _broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _checked(prompt: Prompt) -> Prompt:
    if prompt.input_ids.numel() == 0:
        raise ValueError("prompt: expected at least one token, got none")
    if int(prompt.input_ids.min()) < 0:
        raise ValueError(f"prompt: expected token ids of at least 0, got {int(prompt.input_ids.min())}")
    return prompt


def encoded_prompt(prompt: Prompt, tokenizer: Any) -> tuple[str, Tensor]:
    """The prompt's text and the span [T, 2] of each of its tokens in it.

    A prompt of ids has the text that its ids decode to.

    Raises:
        ValueError: the tokenizer has no spans, and its tokens do not decode to the text.
    """
    if prompt.text is not None and prompt.encoded is not None:
        return prompt.text, prompt.encoded.spans
    if prompt.text is None:
        return _text_of_ids(prompt.input_ids[0].tolist(), _need(tokenizer))
    return prompt.text, encode(tokenizer, prompt.text, special=not prompt.templated).spans


def _text_of_ids(ids: list[int], tokenizer: Any) -> tuple[str, Tensor]:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if getattr(tokenizer, "is_fast", False):
        encoded = encode(tokenizer, text, special=False)
        if encoded.ids == ids:
            return text, encoded.spans
    # Ids that the tokenizer itself would not have made: other merges, or a character cut in two.
    text, spans = pieces(tokenizer, ids)
    return text, complete(spans, torch.zeros(len(ids), dtype=torch.bool), text)


def _need(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError("tokenizer: expected one for a prompt of text or messages, got None")
    return tokenizer


def same_tokens(a: Any, b: Any) -> bool:
    """Whether both tokenizers make the same ids of every text.

    An equal vocabulary is not enough: with other merges, another normalizer or another BOS the same text has other ids,
    and a speculator would read tokens that it never sees. Then the text crosses, see `TokenBridge`.
    """
    if a is b:
        return True
    fast = [bool(getattr(tokenizer, "is_fast", False)) for tokenizer in (a, b)]
    if fast[0] != fast[1] or len(a) != len(b) or a.get_vocab() != b.get_vocab():
        return False
    if fast[0]:
        return _rules(a) == _rules(b) and _surroundings(a) == _surroundings(b)
    # A slow tokenizer does not show its rules: one text that uses its whole vocabulary has to do.
    words = [token for token, _ in sorted(a.get_vocab().items(), key=lambda item: item[1])]
    return type(a) is type(b) and all(
        a(text)["input_ids"] == b(text)["input_ids"] for text in ("", " ".join(words), "".join(words))
    )


def _rules(tokenizer: Any) -> dict[str, Any]:
    """What a fast tokenizer does to a text, but for the tokens around it."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: rules.get(name) for name in ("normalizer", "pre_tokenizer", "model")}
    # "special" says what decoding leaves out; encoding knows no difference.
    kept["added_tokens"] = [
        {name: value for name, value in token.items() if name != "special"} for token in rules["added_tokens"]
    ]
    return kept


def _surroundings(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer("")["input_ids"]
    return ids


class Crossing(NamedTuple):
    """One prompt in a speculator's own tokens.

    Attributes:
        input_ids: [1, Ts].
        base_spans: [T, 2], each base token's characters.
        speculator_spans: [Ts, 2], in the same text.
    """

    input_ids: Tensor
    base_spans: Tensor
    speculator_spans: Tensor

    def back(self, importance: Tensor) -> Tensor:
        """Importance over the base's tokens, [T], from that over the speculator's, [Ts]."""
        return project_importance(importance, self.speculator_spans, self.base_spans)


class TokenBridge:
    """Carries one prompt to a speculator with another tokenizer, and its importance back, through characters.

    Upasani et al. (arXiv 2603.02631) show that importance transfers between model families. Any two tokenizers will do
    that know each token's characters: fast ones, and others whose tokens decode to the text exactly.

    Raises:
        ValueError: something is not a tokenizer.
    """

    def __init__(self, base_tokenizer: Any, speculator_tokenizer: Any) -> None:
        for name, tokenizer in (("tokenizer", base_tokenizer), ("speculator_tokenizer", speculator_tokenizer)):
            if not callable(tokenizer) or not callable(getattr(tokenizer, "decode", None)):
                raise ValueError(
                    f"{name}: expected a tokenizer that encodes and decodes, got {type(tokenizer).__name__}"
                )
        self._base = base_tokenizer
        self._speculator = speculator_tokenizer

    def cross(self, prompt: Prompt) -> Crossing:
        """The speculator's ids of the prompt's text, and both tokenizers' spans.

        Raises:
            ValueError: a tokenizer without spans does not decode to the text.
        """
        text, base_spans = encoded_prompt(prompt, self._base)
        # The speculator wants its own BOS, once.
        bos = getattr(self._speculator, "bos_token", None)
        own = encode(self._speculator, text, special=not (bos and text.startswith(bos)), name="speculator_tokenizer")
        # An EOS behind the prompt would end what the look-ahead is to go on with.
        count = len(own.ids)
        while count > 1 and bool(own.added[count - 1]):
            count -= 1
        ids = torch.tensor([own.ids[:count]], dtype=torch.int64)
        if ids.numel() == 0:
            raise ValueError("speculator_tokenizer: expected at least one token for the prompt's text, got none")
        return Crossing(ids, base_spans, own.spans[:count])
