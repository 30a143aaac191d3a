"""In the server's own process: between the request as the client sees it and the request as the engine sees it.

vLLM's output side is told the whole prompt, so that usage, echo and statistics count it. What goes on to the engine is
taken apart here: the kept token ids, and their positions among the extra arguments.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import logging
from typing import Any

from specprefill_kernels.integrations.vllm.positions import KEY, Positions
from specprefill_kernels.integrations.vllm.reports import Reports
from specprefill_kernels.integrations.vllm.selection import Chats, Outcome, PromptSelector
from specprefill_kernels.integrations.vllm.settings import BadRequest, RequestOptions, ServerSettings, request_options
from specprefill_kernels.integrations.vllm.support import engine_problem, request_problem

logger = logging.getLogger("vllm.specprefill")  # so that the server's own handler shows it

# What the chat template is not told, or is told in another way.
_NOT_FOR_TEMPLATES = {"tokenize", "return_dict", "tools", "chat_template"}


def install(settings: ServerSettings, reports: Reports) -> None:
    """Make every engine that this process starts prune its prompts."""
    from vllm.renderers import hf
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    if hasattr(AsyncLLM, "of_specprefill"):
        return
    chats = Chats()
    hf.safe_apply_chat_template = _remembering(hf.safe_apply_chat_template, chats)
    for engine_class in (AsyncLLM, LLMEngine):
        _install(engine_class, settings, chats, reports)


def _install(engine_class: Any, settings: ServerSettings, chats: Chats, reports: Reports) -> None:
    start, stop = engine_class.__init__, getattr(engine_class, "shutdown", None)

    @functools.wraps(start)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.specprefill = FrontEnd(self, settings, chats, reports)

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
        engine: an `AsyncLLM` or `LLMEngine`, as it stands when its own constructor is done.
    """

    def __init__(self, engine: Any, settings: ServerSettings, chats: Chats, reports: Reports) -> None:
        from vllm import __version__

        self._engine = engine
        self._settings = settings
        self._reports = reports
        self._selector: PromptSelector | None = None
        self._status: asyncio.Future[str | None] | None = None
        self._problem: str | None = "no speculator: SPECPREFILL_VLLM_SPECULATOR names one"
        if settings.speculator is not None:
            problem = engine_problem(engine.vllm_config, __version__, any_version=settings.any_version)
            tokenizer = engine.renderer.tokenizer
            if problem is None and tokenizer is None:
                problem = "no tokenizer in the server"
            self._problem = problem
            if problem is None:
                self._selector = PromptSelector(settings, tokenizer, chats)
            else:
                logger.warning("speculative prefill: every request will run dense: %s", problem)
        client = engine.engine_core
        self._client = client
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
        output_processor = self._engine.output_processor
        try:
            pruned = await self._pruned_async(request)
        except BaseException:
            # It stands in the output side already, and nobody else knows where it went wrong.
            output_processor.abort_requests([request.request_id], internal=True)
            raise
        # Aborted meanwhile: the engine has never heard of it.
        if request.request_id in output_processor.request_states:
            await self._send_async(pruned)

    def _add(self, request: Any) -> None:
        try:
            pruned = self._pruned(request)
        except BaseException:
            self._engine.output_processor.abort_requests([request.request_id], internal=True)
            raise
        self._send(pruned)

    async def _pruned_async(self, request: Any) -> Any:
        options = self._asked(request)
        if options is None:
            return request
        outcome = self._dense(request)
        if outcome is None:
            problem = await self._engine_status_async()
            assert self._selector is not None
            if problem is not None:
                outcome = self._dense(request, problem)
            else:
                waiting = self._selector.submit(request.prompt_token_ids, self._text(request), options)
                try:
                    outcome = await asyncio.wrap_future(waiting)
                except asyncio.CancelledError:
                    raise
                except Exception as error:
                    outcome = self._failed(request, error)
        assert outcome is not None
        return self._prune(request, outcome)

    def _pruned(self, request: Any) -> Any:
        options = self._asked(request)
        if options is None:
            return request
        outcome = self._dense(request)
        if outcome is None:
            problem = self._engine_status()
            assert self._selector is not None
            if problem is not None:
                outcome = self._dense(request, problem)
            else:
                try:
                    outcome = self._selector.submit(request.prompt_token_ids, self._text(request), options).result()
                except Exception as error:
                    outcome = self._failed(request, error)
        assert outcome is not None
        return self._prune(request, outcome)

    # ---- what happens to one request ----

    def _asked(self, request: Any) -> RequestOptions | None:
        """The request's options where it is to be pruned, by its own wish or the server's default."""
        params = request.sampling_params
        try:
            options = request_options(None if params is None else params.extra_args)
        except BadRequest as error:
            raise _client_error(error) from error
        wanted = self._settings.by_default if options.wanted is None else options.wanted
        return options if wanted else None

    def _dense(self, request: Any, problem: str | None = None) -> Outcome | None:
        problem = problem or self._problem or request_problem(request)
        return None if problem is None else Outcome.dense(problem, len(request.prompt_token_ids or ()))

    def _failed(self, request: Any, error: Exception) -> Outcome:
        if isinstance(error, BadRequest):
            raise _client_error(error) from error
        logger.error("request %s: the selection failed", request.request_id, exc_info=error)
        outcome = self._dense(request, f"the selection failed: {type(error).__name__}: {error}")
        assert outcome is not None
        return outcome

    def _text(self, request: Any) -> str | None:
        state = self._engine.output_processor.request_states.get(request.request_id)
        return None if state is None else state.prompt

    def _prune(self, request: Any, outcome: Outcome) -> Any:
        """The request as the engine gets it. The one that came stays whole: the output side holds on to it."""
        name = request.external_req_id or request.request_id
        if outcome.mode == "sparse" and request.sampling_params.repetition_penalty != 1.0:
            outcome = copy.copy(outcome)
            object.__setattr__(outcome, "reason", f"{outcome.reason}; repetition_penalty counts kept tokens only")
        self._reports.add(name, outcome)
        state = self._engine.output_processor.request_states.get(request.request_id)
        if state is not None:
            state.specprefill = outcome
        logger.info("request %s: %s prefill: %s", name, outcome.mode, outcome.reason)
        if outcome.mode == "dense":
            return request
        ids = request.prompt_token_ids
        positions = Positions(len(ids), outcome.spans)
        pruned = copy.copy(request)
        pruned.prompt_token_ids = [token for start, end in outcome.spans for token in ids[start:end]]
        pruned.sampling_params = copy.copy(request.sampling_params)
        # The engine stops where indices reach max_model_len. Positions get there earlier, and no further.
        room = self._engine.vllm_config.model_config.max_model_len - len(ids)
        pruned.sampling_params.max_tokens = min(request.sampling_params.max_tokens, room)
        pruned.sampling_params.extra_args = {**(request.sampling_params.extra_args or {}), KEY: positions.to_wire()}
        return pruned

    # ---- whether scheduler and workers know positions ----

    async def _engine_status_async(self) -> str | None:
        """Asked once, when the first request is to be pruned; requests that come meanwhile wait for the same answer."""
        if self._status is None:
            self._status = asyncio.ensure_future(self._ask_async())
        return await asyncio.shield(self._status)

    async def _ask_async(self) -> str | None:
        try:
            return self._heard(await self._client.call_utility_async("specprefill_status"))
        except Exception as error:
            return self._heard([f"the engine does not know the plugin ({error})"])

    def _engine_status(self) -> str | None:
        if not hasattr(self, "_known_status"):
            try:
                core = getattr(self._client, "engine_core", None)
                ask = getattr(core, "specprefill_status", None)
                answer = ask() if ask is not None else self._client.call_utility("specprefill_status")
            except Exception as error:
                answer = [f"the engine does not know the plugin ({error})"]
            self._known_status = self._heard(answer)
        return self._known_status

    def _heard(self, answers: Any) -> str | None:
        problem = next((answer for answer in answers if answer is not None), None)
        if problem is not None:
            logger.warning("speculative prefill: every request will run dense: %s", problem)
        return problem


def _client_error(error: BadRequest) -> Exception:
    """vLLM's own error for a bad request: status 400 over HTTP."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error), parameter="vllm_xargs")
