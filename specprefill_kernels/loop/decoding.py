"""Choosing tokens as `model.generate` would: its logits processors, sampling and stopping, around any forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria


@dataclass(frozen=True)
class DecodePlan:
    """What `generate` would apply at every step of one prompt."""

    logits_processor: Callable[..., Tensor]
    stopping_criteria: Callable[..., Tensor]
    do_sample: bool


@dataclass(frozen=True)
class Prepared:
    """What a call of `generate` has ready when its decoding begins.

    Attributes:
        input_ids: [B, T], left-padded where the call's were.
        config: the call's whole `GenerationConfig`, the model's own and the defaults merged in.
        model_inputs: what its forwards would get beside the ids: attention_mask (None: all ones), position_ids, ...
    """

    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    config: Any
    model_inputs: Mapping[str, Any] = field(repr=False)


def prepare(model: Any, arguments: Mapping[str, Any], generate: Callable[..., Any] | None = None) -> Prepared | None:
    """Ask Transformers what a call of `generate` would do, without running the model.

    `generate` hands everything it has prepared to a `custom_generate` function, so the model's generation config (EOS
    ids, repetition penalty, top-k, ...) and every option that `generate` knows are honoured by its own code.

    Args:
        arguments: of the call, by name.
        generate: the function to ask; None: `model.generate`.

    Returns:
        None where a `generate` of the model's own does not get so far, or does something with what was decoded.

    Raises:
        ValueError: as `generate` itself, for example for an option that it does not know.
    """
    inquiry, result = _ask(model, arguments, generate)
    return inquiry.found if inquiry.untouched(result) else None


def _ask(model: Any, arguments: Mapping[str, Any], generate: Callable[..., Any] | None) -> tuple[Inquiry, Any]:
    """What `generate` had ready, and what it made of an answer without new tokens."""
    arguments = dict(arguments)
    arguments["stopping_criteria"] = _with_stop_strings(model, arguments)
    inquiry = Inquiry()
    return inquiry, (model.generate if generate is None else generate)(**arguments, custom_generate=inquiry)


class Inquiry:
    """A `custom_generate` function that decodes nothing and remembers what it was given."""

    def __init__(self) -> None:
        self.found: Prepared | None = None
        self._answer: Tensor | None = None
        self._calls = 0

    def __call__(
        self,
        _model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_inputs: Any,
    ) -> Tensor:
        self.found = Prepared(input_ids, logits_processor, stopping_criteria, generation_config, model_inputs)
        self._answer = input_ids.clone()  # whoever writes into an answer shall not write into a prompt
        self._calls += 1
        return self._answer

    def untouched(self, result: Any) -> bool:
        """Whether `generate` asked once, and gave what it got as its result."""
        found, answer = self.found, self._answer
        if found is None or answer is None or self._calls != 1:
            return False
        return result is answer and torch.equal(answer, found.input_ids)


def _with_stop_strings(model: Any, arguments: dict[str, Any]) -> StoppingCriteriaList:
    """The call's criteria, one for its stop strings among them; those are taken out of `arguments`.

    To a `custom_generate` function Transformers gives no tokenizer, and without one it refuses stop strings.
    """
    criteria = StoppingCriteriaList(arguments.get("stopping_criteria") or [])
    tokenizer, given = arguments.pop("tokenizer", None), arguments.get("generation_config")
    of_the_model = getattr(model.generation_config, "stop_strings", None)
    of_the_call = None if given is None else getattr(given, "stop_strings", None)
    found = arguments.pop("stop_strings") if "stop_strings" in arguments else (of_the_call or of_the_model)
    if given is not None and of_the_call is not None:
        arguments["generation_config"] = given = copy.deepcopy(given)
        given.stop_strings = None
    if of_the_model is not None:
        arguments["stop_strings"] = None
    if found is not None:
        if tokenizer is None:
            raise ValueError("stop_strings: expected a tokenizer beside them, got none")
        criteria.append(StopStringCriteria(tokenizer, found))
    return criteria


def plan_decoding(
    model: Any, input_ids: Tensor, *, max_new_tokens: int, do_sample: bool, tokenizer: Any = None, **options: Any
) -> DecodePlan:
    """Ask Transformers for the processors and stopping criteria of this prompt; see `prepare`.

    Processors that look at the prompt see ALL of it, dropped tokens too.

    Raises:
        ValueError: an option that `generate` does not know, beams, or several sequences per prompt.
    """
    # Without a mask, generate would take pad ids inside the prompt for padding.
    options.setdefault("attention_mask", torch.ones_like(input_ids))
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "tokenizer": tokenizer, **options}
    # What a generate of the model's own does with a result does not matter: the answer is the loop's.
    prepared = _ask(model, {"inputs": input_ids, **arguments}, None)[0].found
    if prepared is None:
        raise ValueError(f"base: expected a model with Transformers' own generate, got {type(model).__name__}")
    config = prepared.config
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(config, name, None) or 1) != 1:
            raise ValueError(f"{name}: expected 1, got {getattr(config, name)}")
    return DecodePlan(prepared.logits_processor, prepared.stopping_criteria, bool(config.do_sample))


def decode(plan: DecodePlan, input_ids: Tensor, logits: Tensor, step: Callable[[Tensor], Tensor]) -> Iterator[int]:
    """Yield tokens until a stopping criterion is met. The first one needs no forward beyond the prefill.

    Args:
        input_ids: [1, T], the whole prompt: what processors and criteria look at.
        logits: [1, V] of the prefill's last token.
        step: feeds a token [1, 1] and returns the next logits.
    """
    while True:
        with torch.no_grad():
            scores = plan.logits_processor(input_ids, logits)
            if plan.do_sample:
                token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
            else:
                token = torch.argmax(scores, dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=-1)
            finished = bool(plan.stopping_criteria(input_ids, None).all())
        yield int(token)
        if finished:
            return
        logits = step(token)


class PieceDecoder:
    """Turns tokens into text pieces as they come, and never cuts a character in two.

    A piece is what the newest tokens add to the text of the few before them, so that spaces and merges come out as in
    the whole text. Nothing is held back to a word's end, only while a multi-byte character is incomplete.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0  # tokens from here on are decoded, to give the new ones their left neighbour
        self._done = 0  # tokens before this are in the pieces already

    def _text(self, start: int, end: int | None = None) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)
        return text

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete or the token has no text."""
        self._tokens.append(token)
        before, now = self._text(self._context, self._done), self._text(self._context)
        if now.endswith("\N{REPLACEMENT CHARACTER}") or len(now) <= len(before):
            return ""
        self._context, self._done = self._done, len(self._tokens)
        return now[len(before) :]

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character."""
        before, now = self._text(self._context, self._done), self._text(self._context)
        self._context = self._done = len(self._tokens)
        return now[len(before) :]
