"""A key/value cache that keeps every token of every layer and does not copy itself at each decode step."""

from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """A layer that writes new tokens behind the old ones into a buffer, and hands out views of it.

    `DynamicLayer` concatenates: eight look-ahead steps over a 128K prompt would copy the whole cache eight times.

    Args:
        room: tokens to reserve beyond the first call's.
        keep_values: False for a layer whose attention never runs, only its keys are scored.
    """

    def __init__(self, room: int = 256, *, keep_values: bool = True) -> None:
        super().__init__()
        self._room = room
        self._keep_values = keep_values
        self._reserved = 0
        self._length = 0
        self._buffers: tuple[Tensor, Tensor | None] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._length, self._length + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            values_grown = self._grown(value_states, end, 1) if self._keep_values else None
            self._buffers = (self._grown(key_states, end, 0), values_grown)
        keys, values = self._buffers
        keys[..., start:end, :] = key_states
        if values is not None:
            values[..., start:end, :] = value_states
        self._show(end)
        return keys[..., :end, :], value_states if values is None else values[..., :end, :]

    def reserve(self, tokens: int) -> None:
        """Make the next growth large enough for `tokens` in all, so that it is the only one until then."""
        self._reserved = tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. Nothing moves: views handed out before stay as they are until new
        tokens are written over what they show."""
        if self._buffers is not None and length < self._length:
            self._show(length)

    def crop(self, tokens_to_remove: int) -> None:
        """As Transformers has it: a negative number is how many last tokens to forget, 0 changes nothing.

        Raises:
            ValueError: a positive number, which was a length in some versions; `truncate` takes that.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a negative number or 0, got {tokens_to_remove}")
        self.truncate(max(0, self._length + tokens_to_remove))

    def release(self) -> None:
        """Give the buffers back. Views handed out before keep theirs alive; the layer is empty, as if new."""
        self.keys = self.values = self._buffers = None
        self._length, self.is_initialized = 0, False

    def reset(self) -> None:
        self.release()

    def _show(self, length: int) -> None:
        assert self._buffers is not None
        keys, values = self._buffers
        self._length = length
        self.keys = keys[..., :length, :]
        if values is not None:
            self.values = values[..., :length, :]

    def _grown(self, new: Tensor, end: int, which: int) -> Tensor:
        batch, heads, _, dim = new.shape
        # Half as much again: a long decode copies the cache a logarithmic number of times.
        capacity = max(self._reserved, end + max(self._room, self._length // 2))
        buffer = torch.empty(batch, heads, capacity, dim, dtype=new.dtype, device=new.device)
        old = None if self._buffers is None else self._buffers[which]
        if old is not None:
            buffer[..., : self._length, :] = old[..., : self._length, :]
        return buffer


def full_cache(num_layers: int, room: int, *, keys_only: int | None = None) -> Cache:
    """A cache with one slot per token in EVERY layer, sliding-window layers too.

    `DynamicCache(config)` drops what a sliding-window layer can no longer see, counting slots. With gaps between the
    positions that is too early, and the score needs every key.

    Args:
        room: tokens to reserve beyond the first call's.
        keys_only: a layer whose values nobody needs.
    """
    return Cache(layers=[GrowingLayer(room, keep_values=i != keys_only) for i in range(num_layers)])


def layers_of(cache: Cache) -> list[GrowingLayer]:
    """The layers of a `full_cache`, as what they are."""
    return cast(list[GrowingLayer], cache.layers)
