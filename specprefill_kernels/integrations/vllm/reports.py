"""What became of a request, in its response: `usage.specprefill` over HTTP, `RequestOutput.specprefill` offline.

`usage.prompt_tokens` is the whole prompt, as without the plugin; `usage.specprefill.kept_tokens` what the engine read.
A stream carries usage in its last chunk, where the client asks for it (`stream_options.include_usage`).
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from specprefill_kernels.integrations.vllm.selection import Outcome


def install() -> None:
    """Make this process's responses carry what the outputs of their requests say."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.v1.engine.output_processor import RequestState

    if hasattr(RequestState, "of_specprefill"):
        return
    RequestState.of_specprefill = True
    RequestState._new_request_output = _with_outcome(RequestState._new_request_output)
    chat, completion = OpenAIServingChat, OpenAIServingCompletion
    chat.chat_completion_full_generator = _reporting_later(chat.chat_completion_full_generator)
    chat.chat_completion_stream_generator = _reporting_stream(chat.chat_completion_stream_generator)
    completion.request_output_to_completion_response = _reporting(completion.request_output_to_completion_response)
    completion.completion_stream_generator = _reporting_stream(completion.completion_stream_generator)


class Outcomes:
    """The outcomes of one response's requests, by the index of their prompt."""

    def __init__(self) -> None:
        self._found: dict[int, Outcome] = {}

    def see(self, output: Any, index: int = 0) -> None:
        outcome = getattr(output, "specprefill", None)
        if outcome is not None:
            self._found[index] = outcome

    async def seeing(self, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The same outputs; those of a completion come with the index of their prompt."""
        async for one in outputs:
            if isinstance(one, tuple):
                self.see(one[1], one[0])
            else:
                self.see(one)
            yield one

    def report(self) -> dict[str, Any] | None:
        """In JSON's words, or None where nobody asked for speculative prefill."""
        outcomes = [outcome for _, outcome in sorted(self._found.items())]
        if len(outcomes) <= 1:
            return outcomes[0].to_json() if outcomes else None
        modes = {outcome.mode for outcome in outcomes}
        return {
            "mode": modes.pop() if len(modes) == 1 else "mixed",
            "reason": "see prompts",
            "prompt_tokens": sum(outcome.prompt_tokens for outcome in outcomes),
            "kept_tokens": sum(outcome.kept_tokens for outcome in outcomes),
            "prompts": [outcome.to_json() for outcome in outcomes],
        }


def _with_outcome(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def _new_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = make(self, *args, **kwargs)
        outcome = getattr(self, "specprefill", None)
        if outcome is not None:
            output.specprefill = outcome
        return output

    return _new_request_output


def _watched(write: Callable[..., Any], outcomes: Outcomes, args: Any, kwargs: Any) -> inspect.BoundArguments:
    """The call with a `result_generator` that shows its outputs to `outcomes`."""
    call = inspect.signature(write).bind(*args, **kwargs)
    call.arguments["result_generator"] = outcomes.seeing(call.arguments["result_generator"])
    return call


def _add(response: Any, report: dict[str, Any] | None) -> Any:
    usage = getattr(response, "usage", None)  # an error has none
    if usage is not None and report is not None:
        usage.specprefill = report
    return response


def _reporting(write: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(write)
    def written(*args: Any, **kwargs: Any) -> Any:
        outcomes = Outcomes()
        outputs = inspect.signature(write).bind(*args, **kwargs).arguments["final_res_batch"]
        for index, output in enumerate(outputs):
            outcomes.see(output, index)
        return _add(write(*args, **kwargs), outcomes.report())

    return written


def _reporting_later(write: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(write)
    async def written(*args: Any, **kwargs: Any) -> Any:
        outcomes = Outcomes()
        call = _watched(write, outcomes, args, kwargs)
        return _add(await write(*call.args, **call.kwargs), outcomes.report())

    return written


def _reporting_stream(write: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(write)
    async def written(*args: Any, **kwargs: Any) -> AsyncIterator[str]:
        outcomes = Outcomes()
        call = _watched(write, outcomes, args, kwargs)
        async for event in write(*call.args, **call.kwargs):
            # With continuous usage every event has some; the last one has no choices.
            last = '"usage":{' in event and '"choices":[]' in event
            report = outcomes.report() if last else None
            yield event if report is None else _with_report(event, report)

    return written


def _with_report(event: str, report: dict[str, Any]) -> str:
    start = event.index("{")
    chunk, length = json.JSONDecoder().raw_decode(event, start)
    chunk["usage"]["specprefill"] = report
    return event[:start] + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")) + event[length:]
