"""Whether scheduler and workers of an engine know positions: asked by the server before the first prompt is pruned."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("vllm.specprefill")  # so that the server's own handler shows it

_METHOD = "specprefill_status"


class EngineStatus:
    """The answer of one engine, asked once.

    Args:
        client: vLLM's client of the engine core.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._answer: tuple[str | None] | None = None
        self._asking: asyncio.Task[str | None] | None = None

    def problem(self) -> str | None:
        """Why this engine can run no pruned prompt, or None. Waits for the engine's answer."""
        if self._answer is None:
            core: Any = getattr(self._client, "engine_core", None)  # in this process
            try:
                if hasattr(core, _METHOD):
                    self._heard(core.specprefill_status())
                else:
                    self._heard(self._client.call_utility(_METHOD))
            except Exception as error:
                return self._failed(error)
        assert self._answer is not None
        return self._answer[0]

    async def problem_async(self) -> str | None:
        """The same without blocking. Whoever comes while it is asked waits for the same answer."""
        if self._answer is not None:
            return self._answer[0]
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> str | None:
        try:
            return self._heard(await self._client.call_utility_async(_METHOD))
        except Exception as error:
            return self._failed(error)
        finally:
            self._asking = None

    def _heard(self, answers: Sequence[str | None]) -> str | None:
        problem = next((answer for answer in answers if answer is not None), None)
        if problem is not None:
            logger.warning("speculative prefill: every request will run dense: %s", problem)
        self._answer = (problem,)
        return problem

    def _failed(self, error: Exception) -> str | None:
        if _METHOD in str(error):  # a process without the plugin has no such method, and never will
            return self._heard([f"the engine does not know the plugin ({error})"])
        logger.warning("speculative prefill: the engine did not say whether it knows the plugin: %s", error)
        return f"the engine did not say whether it knows the plugin ({error})"
