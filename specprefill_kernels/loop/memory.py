"""What a speculator remembers of a prompt, so that the next turn of a conversation computes only what is new."""

from transformers.cache_utils import Cache


class SpeculatorMemory:
    """Token ids and the dense cache of one prompt, for `Speculator.score(memory=...)`."""

    def __init__(self) -> None:
        self.ids: tuple[int, ...] = ()
        self.cache: Cache | None = None

    def clear(self) -> None:
        """Forget everything and free the cache."""
        self.ids, self.cache = (), None
