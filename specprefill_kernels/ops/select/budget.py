"""How many chunks a budget is worth, in one place, so that every backend and every shape agrees.

A ratio is read as the decimal that the user wrote: 0.7 of 10 chunks is 7, although 0.7 * 10 is 7.000000000000001 in
binary. So a product within `ROUNDING_SLACK * max(1, n)` of an integer counts as that integer.
"""

import math
from dataclasses import dataclass

ROUNDING_SLACK = 1e-9
# keep_mass stops as soon as the kept mass is this close to the wanted fraction, relative to the whole
MASS_SLACK = 1e-9


@dataclass(frozen=True)
class Budget:
    """Exactly one of keep_ratio, keep_tokens and keep_mass is set."""

    keep_ratio: float | None
    keep_tokens: int | None
    keep_mass: float | None
    chunk_size: int
    rounding: str
    sink: int
    tail: int

    def chunks(self, num_chunks: int) -> int:
        """Chunks to keep of `num_chunks`, at least 1; all of them for keep_mass, whose count follows the content."""
        if self.keep_ratio is not None:
            wanted = round_budget(self.keep_ratio * num_chunks, num_chunks, self.rounding)
        elif self.keep_tokens is not None:
            up = self.rounding == "ceil"
            wanted = (
                (self.keep_tokens + self.chunk_size - 1) // self.chunk_size
                if up
                else self.keep_tokens // self.chunk_size
            )
        else:
            wanted = num_chunks
        return min(max(wanted, 1), num_chunks)

    def width(self, max_len: int, protect: bool) -> int:
        """Tokens that fit any selection from prompts of at most `max_len` tokens: K of `Selection.indices`."""
        if protect or self.keep_mass is not None:
            return max_len
        num_chunks = -(-max_len // self.chunk_size)
        forced = -(-self.sink // self.chunk_size) + (1 + -(-self.tail // self.chunk_size) if self.tail else 0)
        return min(max_len, max(self.chunks(num_chunks), forced) * self.chunk_size)


def round_budget(product: float, num_chunks: int, rounding: str) -> int:
    nearest = round(product)
    if abs(product - nearest) <= ROUNDING_SLACK * max(1, num_chunks):
        return int(nearest)
    return math.ceil(product) if rounding == "ceil" else math.floor(product)
