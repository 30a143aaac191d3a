"""A key/value cache that keeps every token of every layer and does not copy itself at each decode step."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """A layer that writes new tokens behind the old ones into a buffer, and hands out views of it.

    `DynamicLayer` concatenates: eight look-ahead steps over a 128K prompt would copy the whole cache eight times.
    """

    def __init__(self, room: int = 256) -> None:
        super().__init__()
        self._room = room
        self._length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._length, self._length + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            grown = (self._grown(key_states, end, 0), self._grown(value_states, end, 1))
            self._buffers = grown
        keys, values = self._buffers
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self._length = end
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def _grown(self, new: Tensor, end: int, which: int) -> Tensor:
        batch, heads, _, dim = new.shape
        # Half as much again: a long decode copies the cache a logarithmic number of times.
        capacity = end + max(self._room, self._length // 2)
        buffer = torch.empty(batch, heads, capacity, dim, dtype=new.dtype, device=new.device)
        if self._buffers is not None:
            buffer[..., : self._length, :] = self._buffers[which][..., : self._length, :]
        return buffer


def full_cache(num_layers: int, room: int) -> Cache:
    """A cache with one slot per token in EVERY layer, sliding-window layers too.

    `DynamicCache(config)` drops what a sliding-window layer can no longer see, counting slots. With gaps between the
    positions that is too early, and the score needs every key.

    Args:
        room: tokens to reserve beyond the first call's.
    """
    return Cache(layers=[GrowingLayer(room) for _ in range(num_layers)])
