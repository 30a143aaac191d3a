"""In the server's own process: between the request as the client sees it and the request as the engine sees it.

vLLM's output side is told the whole prompt, so that usage and echo show it. What goes on to the engine is taken apart
here: the kept token ids, and their positions among the extra arguments.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import logging
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from specprefill_kernels.integrations.vllm.handshake import EngineStatus
from specprefill_kernels.integrations.vllm.positions import KEY, Positions
from specprefill_kernels.integrations.vllm.selection import Chats, Outcome, PromptSelector
from specprefill_kernels.integrations.vllm.settings import BadRequest, RequestOptions, ServerSettings, request_options
from specprefill_kernels.integrations.vllm.support import engine_problem, request_problem

logger = logging.getLogger("vllm.specprefill")  # so that the server's own handler shows it

# What the chat template is not told, or is told in another way.
_NOT_FOR_TEMPLATES = {"tokenize", "return_dict", "tools", "chat_template"}


def install(settings: ServerSettings) -> None:
    """Make every engine that this process starts prune its prompts."""
    from vllm.renderers import hf
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    if hasattr(AsyncLLM, "of_specprefill"):
        return
    chats = Chats()
    if settings.speculator is not None:
        hf.safe_apply_chat_template = _remembering(hf.safe_apply_chat_template, chats)
    for engine_class in (AsyncLLM, LLMEngine):
        _install(engine_class, settings, chats)


def _install(engine_class: Any, settings: ServerSettings, chats: Chats) -> None:
    start, stop = engine_class.__init__, getattr(engine_class, "shutdown", None)

    @functools.wraps(start)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.specprefill = FrontEnd(self, settings, chats)

    engine_class.__init__ = __init__
    engine_class.of_specprefill = True
    if stop is None:
        return

    @functools.wraps(stop)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        front = self.__dict__.pop("specprefill", None)
        if front is not None:
            front.close()
        return stop(self, *args, **kwargs)

    engine_class.shutdown = shutdown


def _remembering(render: Any, chats: Chats) -> Any:
    @functools.wraps(render)
    def safe_apply_chat_template(model_config: Any, tokenizer: Any, conversation: Any, **options: Any) -> Any:
        rendered = render(model_config, tokenizer, conversation, **options)
        own = {name: value for name, value in options.items() if name not in _NOT_FOR_TEMPLATES}
        own |= {name: options[name] for name in ("tools", "chat_template") if options.get(name)}
        chats.remember(rendered, conversation, own)
        return rendered

    return safe_apply_chat_template


class FrontEnd:
    """Takes the place of one engine client's `add_request`.

    Args:
        engine: an `AsyncLLM` or `LLMEngine`, as it stands when its own constructor is done. It is not held: vLLM's
            tasks hold the client, and an engine that is dropped must go.
    """

    def __init__(self, engine: Any, settings: ServerSettings, chats: Chats) -> None:
        self._settings = settings
        self._output_processor = engine.output_processor
        self._max_model_len = engine.vllm_config.model_config.max_model_len
        self._selector, self._problem = _selector(engine, settings, chats)
        self._status = EngineStatus(engine.engine_core)
        client = engine.engine_core
        # Every client has both methods; the one that is not its way in raises.
        if inspect.iscoroutinefunction(engine.add_request):
            self._send_async = client.add_request_async
            client.add_request_async = self._add_async
        else:
            self._send = client.add_request
            client.add_request = self._add

    def close(self) -> None:
        if self._selector is not None:
            self._selector.close()

    # ---- the two ways in ----

    async def _add_async(self, request: Any) -> None:
        options = self._asked(request)
        if options is None:
            await self._send_async(request)
            return
        try:
            outcome = self._known(request)
            if outcome is None:
                outcome = await self._select_async(request, options)
            pruned = self._prune(request, outcome)
        except BaseException:
            self._withdraw(request)
            raise
        # Aborted meanwhile: the engine has never heard of it.
        if self._registered(request):
            await self._send_async(pruned)

    def _add(self, request: Any) -> None:
        options = self._asked(request)
        if options is None:
            self._send(request)
            return
        try:
            outcome = self._known(request)
            if outcome is None:
                outcome = self._select(request, options)
            pruned = self._prune(request, outcome)
        except BaseException:
            self._withdraw(request)
            raise
        self._send(pruned)

    async def _select_async(self, request: Any, options: RequestOptions) -> Outcome:
        problem = await self._status.problem_async()
        if problem is not None:
            return _dense(request, problem)
        try:
            waiting = asyncio.wrap_future(self._submit(request, options))
            return await asyncio.wait_for(waiting, self._settings.timeout)
        except asyncio.TimeoutError:
            return _dense(request, f"no selection within {self._settings.timeout:g} s")
        except Exception as error:
            return self._failed(request, error)

    def _select(self, request: Any, options: RequestOptions) -> Outcome:
        problem = self._status.problem()
        if problem is not None:
            return _dense(request, problem)
        try:
            return self._submit(request, options).result()  # nobody else is waiting
        except Exception as error:
            return self._failed(request, error)

    # ---- what happens to one request ----

    def _registered(self, request: Any) -> bool:
        return request.request_id in self._output_processor.request_states

    def _withdraw(self, request: Any) -> None:
        """It stands in the output side already, and nobody else knows where it went wrong."""
        self._output_processor.abort_requests([request.request_id], internal=True)

    def _asked(self, request: Any) -> RequestOptions | None:
        """The request's options where it is to be pruned, by its own wish or the server's default.

        What no client waits for is vLLM's own: the end of a prompt that came in pieces, a transfer that was refused.
        """
        if request.sampling_params is None or request.abort_immediately or not self._registered(request):
            return None
        try:
            return request_options(request.sampling_params.extra_args, by_default=self._settings.by_default)
        except BadRequest as error:
            self._withdraw(request)
            raise _client_error(error) from error

    def _known(self, request: Any) -> Outcome | None:
        """What is known without asking anybody: that it runs dense."""
        problem = self._problem or request_problem(request)
        return None if problem is None else _dense(request, problem)

    def _submit(self, request: Any, options: RequestOptions) -> Future[Outcome]:
        assert self._selector is not None
        state = self._output_processor.request_states.get(request.request_id)
        text = None if state is None else state.prompt
        return self._selector.submit(request.prompt_token_ids, text, options, request.cache_salt)

    def _failed(self, request: Any, error: Exception) -> Outcome:
        if isinstance(error, BadRequest):
            raise _client_error(error) from error
        logger.error("request %s: the selection failed", request.request_id, exc_info=error)
        return _dense(request, f"the selection failed: {type(error).__name__}: {error}")

    def _prune(self, request: Any, outcome: Outcome) -> Any:
        """The request as the engine gets it. The one that came stays whole: the output side holds on to it."""
        params = request.sampling_params
        if outcome.mode == "sparse" and params.repetition_penalty != 1.0:
            outcome = replace(outcome, reason=f"{outcome.reason}; repetition_penalty counts kept tokens only")
        state = self._output_processor.request_states.get(request.request_id)
        if state is not None:
            state.specprefill = outcome
        name = request.external_req_id or request.request_id
        logger.info("request %s: %s prefill: %s", name, outcome.mode, outcome.reason)
        if outcome.mode == "dense":
            return request
        ids = request.prompt_token_ids
        positions = Positions(len(ids), outcome.spans)
        pruned = copy.copy(request)
        pruned.prompt_token_ids = [token for start, end in outcome.spans for token in ids[start:end]]
        pruned.sampling_params = copy.copy(params)
        # The engine stops where indices reach max_model_len. Positions get there earlier, and no further.
        room = self._max_model_len - len(ids)
        pruned.sampling_params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        pruned.sampling_params.extra_args = {**(params.extra_args or {}), KEY: positions.to_wire()}
        return pruned


def _selector(engine: Any, settings: ServerSettings, chats: Chats) -> tuple[PromptSelector | None, str | None]:
    """What selects for this engine, or why nothing does."""
    from vllm import __version__

    if settings.speculator is None:
        return None, "no speculator: SPECPREFILL_VLLM_SPECULATOR names one"
    try:
        problem = engine_problem(engine.vllm_config, __version__, any_version=settings.any_version)
        if problem is None and engine.renderer.tokenizer is None:
            problem = "no tokenizer in the server"
        if problem is None:
            return PromptSelector(settings, engine.renderer.tokenizer, chats), None
    except (
        Exception
    ) as error:  # a configuration of a kind that nobody has thought of: the server must start all the same
        problem = f"this engine's configuration could not be read: {type(error).__name__}: {error}"
    logger.warning("speculative prefill: every request will run dense: %s", problem)
    return None, problem


def _dense(request: Any, problem: str) -> Outcome:
    return Outcome.dense(problem, len(request.prompt_token_ids or ()))


def _client_error(error: BadRequest) -> Exception:
    """vLLM's own error for a bad request: status 400 over HTTP."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error), parameter="vllm_xargs")
