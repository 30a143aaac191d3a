"""What the server's environment says, and what one request says."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.integrations.vllm.positions import KEY

SPECULATOR = "SPECPREFILL_VLLM_SPECULATOR"
DEFAULT = "SPECPREFILL_VLLM_DEFAULT"
CONFIG = "SPECPREFILL_VLLM_CONFIG"
DEVICE = "SPECPREFILL_VLLM_DEVICE"
DTYPE = "SPECPREFILL_VLLM_DTYPE"
TIMEOUT = "SPECPREFILL_VLLM_TIMEOUT"
ANY_VERSION = "SPECPREFILL_VLLM_ANY_VERSION"

DTYPES = ("float32", "bfloat16", "float16")

# What one request may ask to be looked for: more would keep others waiting.
MOST_PASSAGES = 64
MOST_SPANS = 1024

_WORDS = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}


class BadSetting(ValueError):
    """A variable of the server's environment is wrong."""


class BadRequest(ValueError):
    """An argument of a request is wrong; the message names it."""


def _bad(name: str, expected: str, got: Any) -> BadRequest:
    return BadRequest(f"{name}: expected {expected}, got {reprlib.repr(got)}")


@dataclass(frozen=True)
class ServerSettings:
    """From the environment of the server.

    Attributes:
        speculator: SPECPREFILL_VLLM_SPECULATOR: what `specprefill_kernels.models.load` takes; None: no speculator, and
            every request runs dense.
        by_default: SPECPREFILL_VLLM_DEFAULT: whether requests that say nothing are pruned; "off" if it is not set.
        config: SPECPREFILL_VLLM_CONFIG: a JSON object of `SpecPrefillConfig`'s fields, and "preset" ("default").
        device: SPECPREFILL_VLLM_DEVICE: the speculator's; "cuda" where there is one, else "cpu".
        dtype: SPECPREFILL_VLLM_DTYPE: what the speculator computes in, one of `DTYPES`; None: what `models.load` takes.
        timeout: SPECPREFILL_VLLM_TIMEOUT: seconds after which a request that waits for its selection runs dense; 120.
        any_version: SPECPREFILL_VLLM_ANY_VERSION: try versions of vLLM that this was not tested with.
    """

    speculator: str | None = None
    by_default: bool = False
    config: SpecPrefillConfig = field(default_factory=lambda: SpecPrefillConfig.preset("default"))
    device: str | None = None
    dtype: str | None = None
    timeout: float = 120.0
    any_version: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> ServerSettings:
        """
        Raises:
            BadSetting: a variable's value is wrong; the message names the variable.
        """
        given = os.environ if environment is None else environment
        return cls(
            speculator=given.get(SPECULATOR) or None,
            by_default=_switch(given, DEFAULT),
            config=_config(given.get(CONFIG)),
            device=given.get(DEVICE) or None,
            dtype=_dtype(given.get(DTYPE)),
            timeout=_seconds(given.get(TIMEOUT)),
            any_version=_switch(given, ANY_VERSION),
        )


def _switch(given: Mapping[str, str], name: str) -> bool:
    word = given.get(name, "").strip().lower()
    if word and word not in _WORDS:
        raise BadSetting(f"{name}: expected on or off, got {given[name]!r}")
    return _WORDS.get(word, False)


def _dtype(text: str | None) -> str | None:
    if text and text not in DTYPES:
        raise BadSetting(f"{DTYPE}: expected one of {', '.join(DTYPES)}, got {text!r}")
    return text or None


def _seconds(text: str | None) -> float:
    if not text:
        return 120.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise BadSetting(f"{TIMEOUT}: expected seconds above 0, got {text!r}")
    return seconds


def _config(text: str | None) -> SpecPrefillConfig:
    if not text:
        return SpecPrefillConfig.preset("default")
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadSetting(f"{CONFIG}: expected a JSON object, got {text!r} ({error})") from None
    if not isinstance(fields, dict):
        raise BadSetting(f"{CONFIG}: expected a JSON object, got {text!r}")
    preset = fields.pop("preset", "default")
    if isinstance(fields.get("score_layers"), list):
        fields["score_layers"] = tuple(fields["score_layers"])
    try:
        return SpecPrefillConfig.preset(preset, **fields)
    except (TypeError, ValueError) as error:
        raise BadSetting(f"{CONFIG}: {error}") from None


@dataclass(frozen=True)
class RequestOptions:
    """What one request asks for.

    Attributes:
        keep_ratio: `keep_ratio`, instead of the server's budget.
        passages: strings of `protect`: passages of the prompt's text that survive, in all their occurrences.
        spans: (start, end) token positions of `protect_spans` that survive, end exclusive.
    """

    keep_ratio: float | None = None
    passages: tuple[str, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()

    def budget(self, config: SpecPrefillConfig) -> SpecPrefillConfig:
        """The server's configuration with this request's budget."""
        if self.keep_ratio is None:
            return config
        return config.replace(keep_ratio=self.keep_ratio, keep_tokens=None, keep_mass=None)


def request_options(arguments: Mapping[str, Any] | None, *, by_default: bool = False) -> RequestOptions | None:
    """Read a request's extra arguments (`SamplingParams.extra_args`, `vllm_xargs` over HTTP).

    `specprefill` says whether the prompt is to be pruned; where it says nothing, `by_default` does. The other names are
    only read where it is, as they are not ours alone. Over HTTP a value can only be text, a number, or a list of those;
    hence `protect_spans` = [start, end, start, ...].

    Returns:
        None where nothing is to be pruned.

    Raises:
        BadRequest: an argument is wrong, or one that only the server may give.
    """
    given = arguments or {}
    if KEY in given:
        raise _bad(KEY, "no such argument from outside", given[KEY])
    wanted = _wanted(given.get("specprefill"))
    if not (by_default if wanted is None else wanted):
        return None
    return RequestOptions(
        keep_ratio=_keep_ratio(given.get("keep_ratio")),
        passages=_passages(given.get("protect")),
        spans=_spans(given.get("protect_spans")),
    )


def _wanted(value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    word = str(value).strip().lower() if isinstance(value, (int, str)) else ""
    if word not in _WORDS:
        raise _bad("specprefill", "true or false", value)
    return _WORDS[word]


def _keep_ratio(value: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:
        raise _bad("keep_ratio", "a number in (0, 1]", value)
    return float(value)


def _passages(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not all(isinstance(passage, str) and passage for passage in given):
        raise _bad("protect", "a passage of the prompt or a list of passages", value)
    if len(given) > MOST_PASSAGES:
        raise BadRequest(f"protect: expected at most {MOST_PASSAGES} passages, got {len(given)}")
    return tuple(dict.fromkeys(given))


def _spans(value: Any) -> tuple[tuple[int, int], ...]:
    if value is None:
        return ()
    whole = isinstance(value, (list, tuple)) and all(type(edge) is int for edge in value)
    if not whole or len(value) % 2:
        raise _bad("protect_spans", "token positions [start, end, start, end, ...]", value)
    if len(value) > 2 * MOST_SPANS:
        raise BadRequest(f"protect_spans: expected at most {MOST_SPANS} spans, got {len(value) // 2}")
    return tuple(zip(value[0::2], value[1::2]))
