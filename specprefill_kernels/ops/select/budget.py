"""How many chunks a budget is worth, in one place, so that every backend and every shape agrees.

A ratio is read as the number that the user meant: 0.7 of 10 chunks is 7, although 0.7 * 10 is 7.000000000000001 in
binary, and 2/3 of 3 is 2. So a product within n * 1e-9 of an integer counts as that integer. The arithmetic is that of
integers: the same in every language, and symbolic under torch.compile.
"""

from dataclasses import dataclass

RATIO_UNITS = 10**12  # a ratio is a whole number of these
RATIO_SLACK = 10**3  # per chunk: 1e-9
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
            wanted = ratio_chunks(self.keep_ratio, num_chunks, self.rounding)
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


def ratio_chunks(keep_ratio: float, num_chunks: int, rounding: str) -> int:
    """keep_ratio * num_chunks, rounded to whole chunks."""
    product, slack = round(keep_ratio * RATIO_UNITS) * num_chunks, RATIO_SLACK * num_chunks
    if rounding == "ceil":
        return (product - slack + RATIO_UNITS - 1) // RATIO_UNITS
    return (product + slack) // RATIO_UNITS
