"""What became of a request, in its response: `usage.specprefill` over HTTP, `RequestOutput.specprefill` offline.

`usage.prompt_tokens` is the whole prompt, as without the plugin; `usage.specprefill.kept_tokens` what the engine read.
A stream carries usage in its last chunk, where the client asks for it (`stream_options.include_usage`).
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Any

from specprefill_kernels.integrations.vllm.selection import Outcome

_REMEMBERED = 4096  # requests; each is taken out when its response is written


class Reports:
    """Outcomes by request id, until the response is written."""

    def __init__(self) -> None:
        self._outcomes: OrderedDict[str, Outcome] = OrderedDict()

    def add(self, request_id: str, outcome: Outcome) -> None:
        self._outcomes[request_id] = outcome
        while len(self._outcomes) > _REMEMBERED:
            self._outcomes.popitem(last=False)

    def take(self, request_id: str) -> dict[str, Any] | None:
        """The report of a response, in JSON's words, or None where nobody asked for speculative prefill.

        A completion of several prompts has several requests, `request_id`-0, -1, ...; their reports come as "prompts".
        """
        if request_id in self._outcomes:
            return self._outcomes.pop(request_id).to_json()
        parts = re.compile(re.escape(request_id) + r"-(\d+|.*-beam-\d+)")
        mine = [name for name in self._outcomes if parts.fullmatch(name)]
        outcomes = [self._outcomes.pop(name) for name in mine]
        # Beam search sends as many requests as there are tokens to try; one stands for all.
        if len(outcomes) <= 1 or "-beam-" in mine[0]:
            return outcomes[0].to_json() if outcomes else None
        modes = {outcome.mode for outcome in outcomes}
        return {
            "mode": modes.pop() if len(modes) == 1 else "mixed",
            "reason": "see prompts",
            "prompt_tokens": sum(outcome.prompt_tokens for outcome in outcomes),
            "kept_tokens": sum(outcome.kept_tokens for outcome in outcomes),
            "prompts": [outcome.to_json() for outcome in outcomes],
        }


def install(reports: Reports) -> None:
    """Make this process's responses carry the reports."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.v1.engine.output_processor import RequestState

    if hasattr(RequestState, "of_specprefill"):
        return
    RequestState.of_specprefill = True
    RequestState._new_request_output = _with_outcome(RequestState._new_request_output)
    chat, completion = OpenAIServingChat, OpenAIServingCompletion
    chat.chat_completion_full_generator = _reporting_later(chat.chat_completion_full_generator, reports)
    chat.chat_completion_stream_generator = _reporting_stream(chat.chat_completion_stream_generator, reports)
    completion.request_output_to_completion_response = _reporting(
        completion.request_output_to_completion_response, reports
    )
    completion.completion_stream_generator = _reporting_stream(completion.completion_stream_generator, reports)


def _with_outcome(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def _new_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = make(self, *args, **kwargs)
        outcome = getattr(self, "specprefill", None)
        if outcome is not None:
            output.specprefill = outcome
        return output

    return _new_request_output


def _request_id(function: Callable[..., Any], args: Any, kwargs: Any) -> str:
    found: str = inspect.signature(function).bind(*args, **kwargs).arguments["request_id"]
    return found


def _add(response: Any, report: dict[str, Any] | None) -> Any:
    usage = getattr(response, "usage", None)  # an error has none
    if usage is not None and report is not None:
        usage.specprefill = report
    return response


def _reporting(write: Callable[..., Any], reports: Reports) -> Callable[..., Any]:
    @functools.wraps(write)
    def written(*args: Any, **kwargs: Any) -> Any:
        return _add(write(*args, **kwargs), reports.take(_request_id(write, args, kwargs)))

    return written


def _reporting_later(write: Callable[..., Any], reports: Reports) -> Callable[..., Any]:
    @functools.wraps(write)
    async def written(*args: Any, **kwargs: Any) -> Any:
        response = await write(*args, **kwargs)
        return _add(response, reports.take(_request_id(write, args, kwargs)))

    return written


def _reporting_stream(write: Callable[..., Any], reports: Reports) -> Callable[..., Any]:
    @functools.wraps(write)
    async def written(*args: Any, **kwargs: Any) -> AsyncIterator[str]:
        request_id = _request_id(write, args, kwargs)
        report = None
        async for event in write(*args, **kwargs):
            # With continuous usage every event has some; the last one has no choices.
            if '"usage":{' in event and '"choices":[]' in event:
                report = reports.take(request_id)
                yield event if report is None else _with_report(event, report)
            else:
                yield event
        if report is None:
            reports.take(request_id)  # nobody asked to see it

    return written


def _with_report(event: str, report: dict[str, Any]) -> str:
    start = event.index("{")
    chunk, length = json.JSONDecoder().raw_decode(event, start)
    chunk["usage"]["specprefill"] = report
    return event[:start] + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")) + event[length:]
