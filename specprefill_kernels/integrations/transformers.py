"""Transformers: `model.generate` itself becomes speculative, and with it `pipeline(...)` and the streamers.

    enable(model, speculator, tokenizer=tokenizer)
    model.generate(**inputs, max_new_tokens=64)      # as before, from here on with a fraction of the prompt
    last_result(model).reason                        # what ran, and why
    disable(model)

`generate` is asked first what it would do (`prepare`, no model runs): lengths, processors, stopping criteria, seeds'
use, everything is its own. Then one of two ways:

- sparse: the loop's selection, prefill and decoding, with those processors and criteria. A batch runs row by row.
- dense: the ordinary `generate` with the very arguments of the call. So does every call that asks for something that
  the loop cannot do (see `call_problem` and `plan_problem`), and every prompt of which all would be kept.

Threads: calls of several threads on one model are correct. Sparse ones run one after the other, on a lock that the
models have in common with every other enabled model that they are part of; dense ones do not wait.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.integrations._transformers_rows import (
    Row,
    call_problem,
    padding_id,
    plan_problem,
    row_arguments,
)
from specprefill_kernels.loop import CostModel, GenerationResult, PromptSelection, SelectionCache, SpecPrefill
from specprefill_kernels.loop.decoding import Inquiry, Prepared, prepare

__all__ = ["CallResult", "disable", "enable", "last_result"]

logger = logging.getLogger("specprefill_kernels")

_said: set[str] = set()  # what was logged
_MOST_SAID = 256
_UNKNOWN = "what generate would do could not be found out"
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()
# Whose ordinary `generate` is running here.
_inside: ContextVar[frozenset[int]] = ContextVar("specprefill_inside_generate", default=frozenset())

# What an enabled `generate` takes beside its own arguments.
_OURS = ("protect", "messages", "template_options")


@dataclass(frozen=True)
class CallResult:
    """How one call of an enabled `generate` ran.

    Attributes:
        mode: "sparse" when at least one prompt was, else "dense".
        reason: why it is dense; for "sparse" what was kept, in words.
        rows: each prompt's own result: ids, text, seconds of each stage, TTFT. () when the ordinary `generate` ran.
        selections: what was selected of each prompt; () when nothing was, as the call could not be sparse.
    """

    mode: str
    reason: str
    rows: tuple[GenerationResult, ...] = ()
    selections: tuple[PromptSelection, ...] = ()


def enable(
    model: Any,
    speculator: Any = None,
    config: SpecPrefillConfig | None = None,
    *,
    tokenizer: Any = None,
    speculator_tokenizer: Any = None,
    self_layers: int | tuple[int, int] | None = None,
    costs: CostModel | None = None,
    selection_cache: SelectionCache | None = None,
) -> None:
    """Make `model.generate` speculative, until `disable(model)`.

    It takes what it took before, and three keywords more, for one call:

        protect: what must survive, as `SpecPrefill.select` takes it: (start, end) spans of the prompt's tokens (without
            padding), passages, or `Characters`. For a batch one such list (or None) per row;
            a batch of one may leave the outer list out, in `messages` too.
        messages: the chat that the ids were made of, so that the parts of its template survive (`config.protect`); for
            a batch a list of chats. It must give the very ids of the call. Seldom needed: with `tokenizer` most chats
            are recognized by their ids.
        template_options: what the chat template was given beside `messages`: {"tools": [...]}.

    Args:
        model: a Transformers causal language model: the base.
        speculator, config, speculator_tokenizer, self_layers, costs, selection_cache: as in `SpecPrefill`.
        tokenizer: the base's. Without it no chat template's parts survive, and results have no text. Needed with
            `speculator_tokenizer`, for `messages` and for passages.

    Raises:
        TypeError: `model` is no Transformers model that generates.
        ValueError: it is enabled already, or an argument is wrong.

    Example:
        >>> enable(model, speculator, SpecPrefillConfig(keep_ratio=0.2))  # doctest: +SKIP
        >>> model.generate(**tokenizer(report, return_tensors="pt"), max_new_tokens=64)  # doctest: +SKIP
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(f"model: expected a Transformers model that generates, got {type(model).__name__}")
    if _enabled(model) is not None:
        raise ValueError("model: expected one that is not enabled yet, got one that is; disable(model) comes first")
    loop = SpecPrefill(
        model,
        speculator,
        config,
        tokenizer=tokenizer,
        speculator_tokenizer=speculator_tokenizer,
        self_layers=self_layers,
        costs=costs,
        selection_cache=selection_cache,
    )
    vars(model)["generate"] = _Generate(model, loop, [model] if speculator is None else [model, speculator])


def disable(model: Any) -> None:
    """Give `model.generate` back as it was before `enable`.

    Raises:
        ValueError: the model is not enabled, or something else has taken the place of its `generate` since.
    """
    enabled = _enabled(model)
    if enabled is None:
        raise ValueError("model: expected one that is enabled, got one whose generate is not ours")
    del vars(model)["generate"]
    if enabled.own is not None:
        vars(model)["generate"] = enabled.own


def last_result(model: Any) -> CallResult | None:
    """How the enabled model's last call ran, whichever thread's ended last; None before the first.

    Raises:
        ValueError: the model is not enabled.
    """
    enabled = _enabled(model)
    if enabled is None:
        raise ValueError("model: expected one that is enabled, got one whose generate is not ours")
    return enabled.last


def _enabled(model: Any) -> _Generate | None:
    found = vars(model).get("generate") if hasattr(model, "__dict__") else None
    return found if isinstance(found, _Generate) else None


class _Generate:
    """Stands in a model's `generate`.

    Attributes:
        own: a `generate` that the model itself, and not its class, had before.
    """

    def __init__(self, model: Any, loop: SpecPrefill, models: list[Any]) -> None:
        self.own = model.__dict__.get("generate")
        self.last: CallResult | None = None
        self._model = model
        self._loop = loop
        self._models = models
        self._ordinary = model.generate
        functools.update_wrapper(self, self._ordinary)  # signature and docstring, for whoever looks at them

    def __reduce__(self) -> Any:
        """A copied or pickled model has its class's `generate`: locks and a second model do not go with it."""
        return getattr, (self._model, "generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ours = {name: kwargs.pop(name, None) for name in _OURS}
        run_dense = functools.partial(self._run_dense, args, kwargs)
        arguments = _by_name(self._model, args, kwargs)
        if arguments is None or isinstance(arguments.get("custom_generate"), Inquiry) or id(self) in _inside.get():
            return self._ordinary(*args, **kwargs)  # which says what is wrong with them, or what it would do
        reason = self._loop.base_problem or call_problem(self._model, arguments)
        if reason is not None:
            return run_dense(reason)
        arguments, device = self._on_the_models_device(arguments)
        streamer = arguments.pop("streamer", None)
        try:
            prepared = prepare(self._model, arguments, self._run_ordinary)
        except Exception as error:  # the ordinary call says it itself, or knows how to go on
            return run_dense(f"{_UNKNOWN}: {error}", said=_UNKNOWN)
        if prepared is None:
            return run_dense(f"{type(self._model).__name__} has a generate of its own")
        reason = plan_problem(arguments, prepared, streamed=streamer is not None)
        if reason is not None:
            return run_dense(reason)
        try:
            apart = self._apart(arguments, prepared)
        except Exception as error:
            return run_dense(f"{_UNKNOWN} for one prompt of the batch: {error}", said=_UNKNOWN)
        if apart is None:
            return run_dense(f"{type(self._model).__name__} has a generate of its own, and does not take one prompt")
        with _alone(self._models):
            rows = self._rows(apart, ours)
            selections = [row.begin() for row in rows]
            known = tuple(selection for selection in selections if selection is not None)
            if len(known) < len(rows) or any(selection.mode == "sparse" for selection in known):
                results = tuple(row.run(streamer) for row in rows)
                found = tuple(result.selection for result in results)
                mode = "sparse" if any(selection.mode == "sparse" for selection in found) else "dense"
                self.last = CallResult(mode, _reason_of(found), results, found)
                return _output(prepared, rows, results, device)
        return run_dense(_reason_of(known), known, said="")

    def _run_dense(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reason: str,
        selections: tuple[PromptSelection, ...] = (),
        *,
        said: str | None = None,
    ) -> Any:
        """The ordinary call; the reason is logged once for all calls, and not where the call itself raises.

        Args:
            said: what stands for the reason when it comes again, if its words differ from call to call; "" logs
                nothing, as the loop has its own log of selections.
        """
        output = self._run_ordinary(*args, **kwargs)
        said = reason if said is None else said
        if said and said not in _said:
            if len(_said) >= _MOST_SAID:  # a reason may name what a call was given
                _said.clear()
            _said.add(said)
            logger.warning("generate runs dense: %s", reason)
        self.last = CallResult("dense", reason, (), selections)
        return output

    def _run_ordinary(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` calls itself for some options (token healing), and is not to meet us then."""
        token = _inside.set(_inside.get() | {id(self)})
        try:
            return self._ordinary(*args, **kwargs)
        finally:
            _inside.reset(token)

    def _on_the_models_device(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], torch.device | None]:
        """Processors are made for the device that they will run on; the answer goes back to the ids' own."""
        moved, device = dict(arguments), None
        for name in ("inputs", "input_ids", "attention_mask"):
            if isinstance(moved.get(name), Tensor):
                device = moved[name].device if name != "attention_mask" else device
                moved[name] = moved[name].to(self._model.device)
        return moved, device

    def _apart(self, arguments: dict[str, Any], prepared: Prepared) -> list[Prepared] | None:
        """The call for each of its prompts alone; None where a generate of the class's own does not get so far."""
        count = prepared.input_ids.shape[0]
        if count == 1:
            return [prepared]
        found = []
        for index in range(count):
            one = prepare(self._model, row_arguments(arguments, prepared, index), self._run_ordinary)
            if one is None:
                return None
            found.append(one)
        return found

    def _rows(self, prepared: list[Prepared], ours: dict[str, Any]) -> list[Row]:
        given = {name: _each(name, ours[name], len(prepared)) for name in ("protect", "messages")}
        options = ours["template_options"]
        if options is not None and ours["messages"] is None:
            raise ValueError("messages: expected the chat that template_options belong to, got None")
        return [
            Row(self._loop, one, messages, options, protect)
            for one, messages, protect in zip(prepared, given["messages"], given["protect"])
        ]


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """A call's arguments by name; None where they do not fit `generate`."""
    signature = inspect.signature(type(model).generate)
    if [parameter.kind for parameter in signature.parameters.values()][1:2] == [inspect.Parameter.VAR_POSITIONAL]:
        signature = inspect.signature(GenerationMixin.generate)  # a class that passes on what it gets, by place
    try:
        arguments = dict(signature.bind(model, *args, **kwargs).arguments)
    except TypeError:
        return None
    del arguments[next(iter(arguments))]  # the model
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


def _each(name: str, value: Any, count: int) -> list[Any]:
    """What a call gives for each of its prompts."""
    if count == 1:
        return list(value) if _is_batch_of_one(value) else [value]
    if value is None:
        return [None] * count
    if not isinstance(value, (list, tuple)) or len(value) != count or any(isinstance(one, dict) for one in value):
        raise ValueError(f"{name}: expected a list with one entry (or None) for each of {count} prompts, got {value!r}")
    return list(value)


def _is_batch_of_one(value: Any) -> bool:
    """Whether it is [what a call says of its only prompt], and not that itself: a list of spans, texts or messages."""
    if not isinstance(value, (list, tuple)) or len(value) != 1:
        return False
    (one,) = value
    is_span = isinstance(one, (list, tuple)) and len(one) > 0 and all(hasattr(edge, "__index__") for edge in one)
    return one is None or (isinstance(one, (list, tuple)) and not is_span)


def _reason_of(selections: tuple[PromptSelection, ...]) -> str:
    if len(selections) == 1:
        return selections[0].reason
    return "; ".join(f"prompt {index}: {selection.reason}" for index, selection in enumerate(selections))


def _output(prepared: Prepared, rows: list[Row], results: tuple[GenerationResult, ...], device: Any) -> Any:
    """What `generate` returns: [B, T + new] ids on `device`, or its dataclass of those and each step's scores."""
    config, prompts = prepared.config, prepared.input_ids
    longest = max(len(result.tokens) for result in results)
    answers = torch.full((len(rows), longest), padding_id(config) or 0, dtype=torch.int64, device=prompts.device)
    for answer, result in zip(answers, results):
        answer[: len(result.tokens)] = torch.tensor(result.tokens)
    sequences = torch.cat([prompts, answers], dim=-1).to(device)
    if not config.return_dict_in_generate:
        return sequences
    # No past_key_values: a cache with gaps would be read as one of the whole prompt.
    scores, logits = ([one.to(device) for one in steps] for steps in (rows[0].scores, rows[0].logits))
    made_of: Any = GenerateDecoderOnlyOutput
    return made_of(
        sequences=sequences,
        scores=tuple(scores) if config.output_scores else None,
        logits=tuple(logits) if config.output_logits else None,
    )


@contextmanager
def _alone(models: list[Any]) -> Iterator[None]:
    """No other thread runs the loop on one of these models meanwhile: its hooks are in their configs."""
    with _locks_lock:
        locks = {id(model): _locks.setdefault(model, threading.RLock()) for model in models}
    with ExitStack() as stack:
        for _, lock in sorted(locks.items()):  # one order for all, so that no two wait for each other
            stack.enter_context(lock)
        yield
