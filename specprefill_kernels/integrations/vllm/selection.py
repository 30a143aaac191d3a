"""The speculator inside the server: loaded once, in a thread of its own, where it reads one prompt at a time.

The server's event loop and the engine, which is another process, go on meanwhile.
"""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from specprefill_kernels.integrations.vllm.settings import BadRequest, RequestOptions, ServerSettings

logger = logging.getLogger("vllm.specprefill")  # so that the server's own handler shows it

_CHATS = 256  # rendered chats that are remembered until their request comes


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        mode: "sparse" or "dense".
        reason: why it is dense; for "sparse" what was kept.
        prompt_tokens, kept_tokens: T and K.
        spans: the kept tokens as (start, end) pairs, end exclusive.
        seconds: stage -> seconds of the selection.
        backend: which implementation of the ops ran, "none" when none did.
        cached: the selection was known; no speculator ran.
    """

    mode: str
    reason: str
    prompt_tokens: int
    kept_tokens: int
    spans: tuple[tuple[int, int], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    backend: str = "none"
    cached: bool = False

    @classmethod
    def dense(cls, reason: str, prompt_tokens: int) -> Outcome:
        return cls("dense", reason, prompt_tokens, prompt_tokens)

    def to_json(self) -> dict[str, Any]:
        """What a response says of it."""
        return {
            "mode": self.mode,
            "reason": self.reason,
            "prompt_tokens": self.prompt_tokens,
            "kept_tokens": self.kept_tokens,
            "seconds": {stage: round(seconds, 4) for stage, seconds in self.seconds.items()},
            "backend": self.backend,
            "cached": self.cached,
        }


class Chats:
    """The last chats that the server rendered, by what came out: text, or token ids.

    A request arrives as ids. With its messages, system prompt, tool definitions and role markers can be told from the
    rest and protected.
    """

    def __init__(self) -> None:
        self._chats: OrderedDict[Any, tuple[Sequence[Any], Mapping[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, rendered: str | Sequence[int], messages: Sequence[Any], options: Mapping[str, Any]) -> None:
        with self._lock:
            self._chats[_key(rendered)] = (messages, options)
            while len(self._chats) > _CHATS:
                self._chats.popitem(last=False)

    def take(self, text: str | None, ids: Sequence[int]) -> tuple[Sequence[Any], Mapping[str, Any]] | None:
        """The chat that this came from, which is forgotten with that."""
        with self._lock:
            found = None if text is None else self._chats.pop(_key(text), None)
            return found or self._chats.pop(_key(ids), None)


def _key(rendered: str | Sequence[int]) -> Any:
    return rendered if isinstance(rendered, str) else tuple(rendered)


def _renamed(message: str, passages: int) -> str:
    """An error of `find_protection` in the words of a request, which has two lists: protect[2] is protect_spans[0]."""
    name = re.match(r"protect\[(\d+)\]", message)
    if name is None or int(name[1]) < passages:
        return message
    return f"protect_spans[{int(name[1]) - passages}]{message[name.end() :]}"


class PromptSelector:
    """Selects what the engine reads of each prompt.

    Args:
        settings: of the server.
        tokenizer: the engine's; copied, as tokenizers are not thread-safe.
        chats: what the server rendered.
    """

    def __init__(self, settings: ServerSettings, tokenizer: Any, chats: Chats) -> None:
        self._settings = settings
        self._chats = chats
        self._tokenizer = copy.deepcopy(tokenizer)
        self._last: tuple[Sequence[int], RequestOptions, Future[Outcome]] | None = None
        self.problem: str | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="specprefill")
        self._thread.submit(self._load)

    def submit(
        self, ids: Sequence[int], text: str | None, options: RequestOptions, salt: str | None = None
    ) -> Future[Outcome]:
        """Select in the speculator's thread; may be cancelled until its turn comes.

        Args:
            ids: the prompt's. The children of a request (n > 1) share one list: they get one selection.
            text: what the ids came from, if known.
            salt: `cache_salt`: nobody with another one learns that this selection is known already.

        The result raises BadRequest where `protect` names what the prompt has not.
        """
        known = self._last
        if known is not None and known[0] is ids and known[1] == options and not known[2].cancelled():
            return known[2]
        selecting = self._thread.submit(self._select, ids, text, options, salt)
        self._last = (ids, options, selecting)
        return selecting

    def close(self) -> None:
        """Wait for nothing: what has not begun never will."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self) -> None:
        try:
            self._load_speculator()
        except Exception as error:
            self.problem = f"the speculator {self._settings.speculator!r} could not be loaded: {error}"
            logger.exception("every request will run dense: %s", self.problem)

    def _load_speculator(self) -> None:
        from specprefill_kernels import models
        from specprefill_kernels.loop.prompts import TokenBridge, same_tokens
        from specprefill_kernels.loop.selection_cache import SelectionCache, identity
        from specprefill_kernels.loop.speculator import Speculator
        from specprefill_kernels.loop.support import speculator_problem

        settings = self._settings
        assert settings.speculator is not None
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
        model, tokenizer = models.load(settings.speculator, dtype, device)
        self.problem = speculator_problem(model)
        if self.problem is not None:
            self.problem = f"unsupported speculator ({type(model).__name__}): {self.problem}"
            logger.warning("every request will run dense: %s", self.problem)
            return
        self._bridge = None if same_tokens(self._tokenizer, tokenizer) else TokenBridge(self._tokenizer, tokenizer)
        self._speculator = Speculator(model, settings.config)
        self._cache = SelectionCache()
        self._identity = lambda config, salt: identity(model, config, salt)
        where = f"{settings.speculator} on {device}, {str(model.dtype).removeprefix('torch.')},"
        logger.info("speculative prefill: %s selects for this server", where)

    @torch.inference_mode()
    def _select(self, ids: Sequence[int], text: str | None, options: RequestOptions, salt: str | None) -> Outcome:
        from specprefill_kernels.loop.clock import StageClock
        from specprefill_kernels.loop.protection import find_protection
        from specprefill_kernels.loop.selecting import Selector

        if self.problem is not None:
            return Outcome.dense(self.problem, len(ids))
        config = options.budget(self._settings.config)
        device = torch.device("cpu")
        clock = StageClock(self._speculator.model.device)
        with clock.stage("tokenize"):
            prompt = self._read(ids, text)
            try:
                protection = find_protection(prompt, [*options.passages, *options.spans], self._tokenizer, config)
            except ValueError as error:
                raise BadRequest(_renamed(str(error), len(options.passages))) from error
        selector = Selector(self._speculator, self._bridge, config, None, device)
        selection = self._cache.choose(
            self._identity(config, salt),
            prompt,
            protection,
            clock,
            device,
            lambda: selector.select(prompt, protection, clock),
            by_text=self._bridge is not None,
        )
        return Outcome(
            selection.mode,
            selection.reason,
            selection.prompt_tokens,
            selection.kept_tokens,
            selection.spans,
            selection.seconds,
            selection.backend,
            selection.cached,
        )

    def _read(self, ids: Sequence[int], text: str | None) -> Any:
        """The prompt with its messages, where a chat renders to just these ids; else the ids alone."""
        from specprefill_kernels.loop.prompts import read_prompt
        from specprefill_kernels.loop.recognizing import recognize

        chat = self._chats.take(text, ids)
        if chat is not None:
            try:
                prompt = read_prompt(list(chat[0]), self._tokenizer, chat[1])
            except Exception as error:  # a template of the server's own, which says no in its own words
                logger.warning("protect: the chat could not be rendered again: %s", error)
            else:
                if prompt.input_ids[0].tolist() == list(ids):
                    return prompt
        prompt = read_prompt(list(ids), self._tokenizer)
        # A client may have applied the template itself.
        return recognize(prompt.input_ids, self._tokenizer) or prompt
