"""What a speculator remembers of a prompt, so that the next turn of a conversation computes only what is new."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from specprefill_kernels.loop.cache import layers_of


class SpeculatorMemory:
    """Token ids and the dense cache of one prompt, for `Speculator.score(memory=...)`.

    It serves one conversation and one call at a time. A speculator that reads other layers, or another model, starts it
    anew. A call that fails leaves it with what that call had found reusable.
    """

    def __init__(self) -> None:
        self._ids = torch.empty(0, dtype=torch.int64)
        self._cache: Cache | None = None
        self._needs: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        """Tokens that it holds of the prompt."""
        return self._ids.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that it shows; buffers may be larger, for tokens to come."""
        layers = [] if self._cache is None else layers_of(self._cache)
        return sum(int(x.nbytes) for layer in layers for x in (layer.keys, layer.values) if x is not None)

    def clear(self) -> None:
        """Forget everything and free the cache."""
        self._ids, self._cache, self._needs = self._ids[:0], None, None

    @contextmanager
    def extended(
        self,
        input_ids: Tensor,
        needs: tuple[Any, ...],
        rows: int,
        room: int,
        new_cache: Callable[[], Cache],
        unaffected: Callable[[int], int] | None = None,
    ) -> Iterator[tuple[Cache, int]]:
        """The cache, cut back to what it shares with a new prompt; inside, the rest is computed behind that.

        Afterwards the memory stands for the new prompt, without the tokens that were decoded behind it; where
        `unaffected` is given, also without those that a longer prompt would read otherwise.

        Args:
            input_ids: [1, T].
            needs: the model, and how it runs (layers, decoding, attention): caches of others do not fit.
            rows: last prompt tokens that have to run in any case, for their queries.
            room: tokens that will be decoded.
            new_cache: makes an empty one.
            unaffected: how many of a prompt's first n tokens, without the last `rows`, are read alike in every prompt
                that begins with them, whatever follows. None: all, the last `rows` too.

        Yields:
            The cache, and how many of the prompt's first tokens it holds.
        """
        ids = input_ids[0].to("cpu", copy=True)
        if self._cache is None or self._needs is None or self._needs[0] is not needs[0] or self._needs[1:] != needs[1:]:
            self.clear()
        reused = max(0, min(_common_prefix(self._ids, ids), ids.shape[0] - rows))
        if unaffected is not None:
            reused = unaffected(reused)
        if reused == 0:
            self.clear()
        cache = new_cache() if self._cache is None else self._cache
        self._cache, self._needs, self._ids = cache, needs, ids[:reused]
        for layer in layers_of(cache):
            layer.truncate(reused)
            layer.reserve(ids.shape[0] + room)
        try:
            yield cache, reused
        except BaseException:
            if reused == 0:
                self.clear()
            for layer in layers_of(cache):
                layer.truncate(reused)
            raise
        held = ids.shape[0] if unaffected is None else unaffected(max(0, ids.shape[0] - rows))
        for layer in layers_of(cache):
            layer.truncate(held)
        self._ids = ids[:held]


def _common_prefix(a: Tensor, b: Tensor) -> int:
    """How many first ids are the same. Both on the CPU."""
    size = min(a.shape[0], b.shape[0])
    different = (a[:size] != b[:size]).nonzero()
    return int(different[0]) if different.shape[0] else size
