"""Both models' work on one prompt, timed by the library's own parts; of a model too large, by its first layers.

    base         seconds = outside + layers * L / k       measured at the borders of the k layers of one forward
    speculator   seconds = high + (high - low) / (k - j) * (L - k)    each stage, timed with k and with j < k layers

The base's k layers run the whole forward, so what lies outside (embedding, last norm, the head on one token) is timed
by itself and counted once. A speculator's forward ends early in its last layer, which is a larger part of k layers than
of L: the difference of two depths has no such end in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.ttft_models import Sizes
from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.attention import attention_configs
from specprefill_kernels.loop.budgets import keep_tokens, spans_of_mask
from specprefill_kernels.loop.cache import full_cache, layers_of
from specprefill_kernels.loop.capture import Capture
from specprefill_kernels.loop.chunks import chunk_lengths
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.prefill import BaseRun
from specprefill_kernels.loop.scoring import Speculation
from specprefill_kernels.loop.speculator import Speculator
from specprefill_kernels.loop.support import decoder_layers, head_options

OUTSIDE, LAYERS = "outside", "layers"
# What is not weights may take so much of the free memory in one forward; longer prompts are read in chunks.
_FORWARD_SHARE = 0.3
_CHUNKS = (16384, 8192, 4096, 2048, 1024, 512)
_RESERVE = 0.9  # of the free memory is used: allocators keep some, libraries have workspaces
MOST_LAYERS = 4  # of a model that does not fit: more tell nothing new and take as much longer


class BaseLayers:
    """The first k layers of a base of `whole` layers.

    Args:
        model: k layers with embedding and head.
        chunk: tokens of one forward, for the full prompt and for the kept tokens alike; None: all at once, through
            the loop's own `BaseRun`.
    """

    def __init__(self, model: Any, whole: int, chunk: int | None) -> None:
        layers = decoder_layers(model)
        if not layers:
            raise ValueError("base: expected a model with a list of decoder layers")
        self.model, self.whole, self.chunk = model, whole, chunk
        self.measured = len(layers)
        self._first, self._last = layers[0], layers[-1]
        self._configs = attention_configs(model)
        self._head = head_options(model)

    def seconds(self, ids: Tensor, positions: Tensor, prompt_len: int, *, sparse: bool) -> float:
        """Of a prefill of ids [1, K] at positions [K] by the whole model."""
        return self.scaled(self.parts(ids, positions, prompt_len, sparse=sparse)[0])

    def scaled(self, parts: Mapping[str, float]) -> float:
        return parts[OUTSIDE] + parts[LAYERS] * self.whole / self.measured

    def parts(
        self, ids: Tensor, positions: Tensor, prompt_len: int, *, sparse: bool
    ) -> tuple[dict[str, float], Tensor]:
        """(seconds outside and inside the k layers, logits [1, V])."""
        clock = StageClock(self.model.device)
        hooks = [
            self._first.register_forward_pre_hook(lambda *_: clock.switch(LAYERS), prepend=True),
            self._last.register_forward_hook(lambda *_: clock.switch(OUTSIDE)),
        ]
        try:
            with clock.stage(OUTSIDE):
                if self.chunk is None or ids.shape[1] <= self.chunk:
                    logits = BaseRun(self.model, prompt_len, sparse=sparse, room=1).prefill(ids, positions)
                else:
                    logits = self._in_chunks(ids, positions)
                int(logits.argmax())
        finally:
            for hook in hooks:
                hook.remove()
        return clock.seconds, logits

    @torch.no_grad()
    def _in_chunks(self, ids: Tensor, positions: Tensor) -> Tensor:
        """As the loop's speculator reads a long prompt: each chunk behind the ones in the cache."""
        capture = Capture(self._configs, frozenset())
        cache = full_cache(self.measured, room=1)
        for layer in layers_of(cache):
            layer.reserve(ids.shape[1])
        lengths = chunk_lengths(ids.shape[1], self.chunk, 1)
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            arguments = {
                "input_ids": ids[:, part],
                "position_ids": positions[None, part],
                "past_key_values": cache,
                "use_cache": True,
            }
            with capture.running(0, behind=start > 0):
                if start + length < ids.shape[1]:
                    self.model.base_model(**arguments)
                else:
                    output = self.model(**arguments, **self._head)
            start += length
        logits: Tensor = output.logits[:, -1].to(copy=True, dtype=torch.float32)
        return logits


class SpeculatorLayers:
    """The first k layers of a speculator of `whole` layers, run by the loop's `Speculator`."""

    def __init__(self, model: Any, whole: int, config: SpecPrefillConfig) -> None:
        self.model, self.whole = model, whole
        self.measured = int(model.config.num_hidden_layers)
        if self.measured < whole and self.measured < 2:
            raise ValueError(f"speculator layers: expected at least 2 of {whole}, got {self.measured}")
        depths = [self.measured] if self.measured == whole else [self.measured, max(1, self.measured // 2)]
        self._runs = []
        for depth in depths:
            with _depth(model, depth):
                self._runs.append((depth, Speculator(model, config)))

    def seconds(self, ids: Tensor) -> tuple[dict[str, float], Speculation]:
        """(stage -> seconds of the whole model, what the measured layers found)."""
        found, speculation = {}, None
        for depth, speculator in self._runs:
            clock = StageClock(self.model.device)
            with _depth(self.model, depth):
                result = speculator.score(ids, clock)
            speculation = speculation or result
            found[depth] = dict(clock.seconds)
        assert speculation is not None
        return extrapolated(found, self.whole), speculation


@contextmanager
def _depth(model: Any, layers: int) -> Iterator[None]:
    """Transformers' forwards run `config.num_hidden_layers` of their layers."""
    before = model.config.num_hidden_layers
    model.config.num_hidden_layers = layers
    try:
        yield
    finally:
        model.config.num_hidden_layers = before


def extrapolated(seconds: Mapping[int, Mapping[str, float]], whole: int) -> dict[str, float]:
    """depth -> stage -> seconds, of one or two depths, as the whole depth's: every stage is linear in the layers."""
    high, low = max(seconds), min(seconds)
    found = {}
    for stage, value in seconds[high].items():
        # Noise must not make more layers take less time.
        slope = max(0.0, value - seconds[low][stage]) / (high - low) if high > low else 0.0
        found[stage] = value + slope * (whole - high)
    return found


def select(importance: Tensor, config: SpecPrefillConfig, ids: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """(seconds of "select" and "gather", kept ids [1, K], kept positions [K]), as the loop selects."""
    clock = StageClock(ids.device)
    with clock.stage("select"):
        mask = keep_tokens(importance, None, config).mask
        kept = mask.nonzero()[:, 0]
        spans_of_mask(mask)
    with clock.stage("gather"):
        packed = ids[:, kept]
    return clock.seconds, packed, kept


@dataclass(frozen=True)
class Plan:
    """How a pair fits into memory.

    Attributes:
        base_layers, speculator_layers: measured ones.
        chunk: tokens of one forward of the base; None: the whole prompt.
        bytes: what is needed at most, both models and their work.
    """

    base_layers: int
    speculator_layers: int
    chunk: int | None
    bytes: int


class TooLarge(ValueError):
    """Not even the fewest layers fit."""


def fit(
    base: Sizes,
    speculator: Sizes,
    tokens: int,
    kept: int,
    itemsize: int,
    memory: int,
    *,
    base_layers: int | None = None,
    speculator_layers: int | None = None,
    prefill_chunk: int | None = 4096,
) -> Plan:
    """Layers and chunk for `memory` free bytes, before anything is allocated.

    All layers of both, if they fit; else all of the speculator's and up to MOST_LAYERS of the base's; else as many of
    the speculator's too.

    Args:
        kept: most kept tokens.
        base_layers, speculator_layers: so many and no other number.
        prefill_chunk: the speculator's.

    Raises:
        TooLarge: it does not fit.
        ValueError: layers that the models do not have.
    """
    for name, asked, least, whole in (
        ("layers", base_layers, 1, base.layers),
        ("speculator layers", speculator_layers, min(2, speculator.layers), speculator.layers),
    ):
        if asked is not None and not least <= asked <= whole:
            raise ValueError(f"{name}: expected {least} to {whole}, got {asked}")
    usable = int(_RESERVE * memory)
    room = int(_FORWARD_SHARE * usable)
    fitting = (size for size in (tokens, *_CHUNKS) if base.activation_bytes(size, itemsize) <= room)
    chunk = next(fitting, _CHUNKS[-1])
    read = min(tokens, prefill_chunk or tokens)

    def needed(of_base: int, of_speculator: int) -> int:
        weights = base.weight_bytes(of_base, itemsize) + speculator.weight_bytes(of_speculator, itemsize)
        # Never at the same time: the speculator's cache is gone when the base reads.
        working = (
            base.activation_bytes(min(chunk, tokens), itemsize) + base.cache_bytes(of_base, tokens, itemsize),
            speculator.activation_bytes(read, itemsize) + speculator.cache_bytes(of_speculator, tokens, itemsize),
        )
        return weights + max(working)

    few = min(MOST_LAYERS, base.layers)
    wanted_base = (base.layers, *range(few, 0, -1)) if base_layers is None else (base_layers,)
    fewer = range(min(MOST_LAYERS, speculator.layers), 1, -1)
    wanted_speculator = (speculator.layers, *fewer) if speculator_layers is None else (speculator_layers,)
    for of_speculator in wanted_speculator:
        for of_base in wanted_base:
            if needed(of_base, of_speculator) <= usable:
                whole = chunk >= tokens
                return Plan(of_base, of_speculator, None if whole else chunk, needed(of_base, of_speculator))
    least = needed(wanted_base[-1], wanted_speculator[-1])
    raise TooLarge(
        f"memory: expected {least / 2**30:.1f} GiB for {wanted_base[-1]} of {base.layers} layers of the base and "
        f"{wanted_speculator[-1]} of {speculator.layers} of the speculator at {tokens} tokens, "
        f"got {usable / 2**30:.1f} GiB ({_RESERVE:.0%} of what is free); fewer tokens or --layers need less"
    )


def free_memory(device: str) -> int:
    """Bytes that can be had on the device now."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    free = []
    with open("/proc/meminfo", encoding="ascii") as file:
        free += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")]
    try:  # a container's own limit
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as now:
            free.append(int(most.read()) - int(now.read()))
    except (OSError, ValueError):
        pass
    return min(free)
