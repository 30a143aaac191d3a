"""Speculative prefill in vLLM, as a plugin that an unmodified server loads by itself.

    settings    what the server's environment and a request say
    support     whether an engine, and a request, can be pruned; if not, why
    selection   the speculator, in a thread of the server                      server process
    frontend    the request: whole towards the client, pruned towards the engine   "
    handshake   whether the engine's processes have this plugin too             "
    reports     what became of it, in the response                              "
    positions   what travels with a pruned request
    core        prefix caching that knows positions                            scheduler's process
    worker      positions for the model, indices for everything else           workers' processes

vLLM loads plugins in each of its processes and calls `register`. None of this needs a change of vLLM; all of it wraps
functions that are not its public interface, so versions that this was not tested with are left alone (see `support`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger("vllm.specprefill")  # so that the server's own handler shows it


def register() -> None:
    """Entry point of the group "vllm.general_plugins". May be called more than once.

    Raises:
        BadSetting: a variable of the environment is wrong.
    """
    from specprefill_kernels.integrations.vllm import core, frontend, reports, worker
    from specprefill_kernels.integrations.vllm.settings import ServerSettings

    settings = ServerSettings.from_environment()
    _install("prefix caching", core.install)
    _install("model runners", worker.install)
    _install("responses", reports.install)
    _install("requests", lambda: frontend.install(settings))


def _install(what: str, install: Callable[[], None]) -> None:
    """Another version has other insides. A part that is missing is found out before any prompt is pruned."""
    from vllm import __version__

    try:
        install()
    except (ImportError, AttributeError) as error:
        logger.warning("speculative prefill: %s of vLLM %s are not known: %s", what, __version__, error)
