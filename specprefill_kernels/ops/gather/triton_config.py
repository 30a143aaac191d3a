"""How the gathering kernels are launched."""

from dataclasses import dataclass

from specprefill_kernels._triton import Target


@dataclass(frozen=True)
class Config:
    """A tile that one program copies.

    Attributes:
        slots: kept tokens.
        inner: words of each token.
        num_warps: warps per program.
    """

    slots: int
    inner: int
    num_warps: int


# 16 words a thread: eight 16-byte loads in flight where words are 8 bytes, which 16 resident programs per processor
# make 256 KiB in flight, more than the latency of HBM needs (700 ns at 25 bytes per ns and processor: 18 KiB). Ids and
# small rows take 8: their slots are few, and more programs start earlier than wide ones end.
# The row is padded to a power of two, so the steps decide how many lanes idle; 512 words are 4 KiB, one page of DRAM.
TILES = (
    Config(slots=1024, inner=1, num_warps=4),
    Config(slots=256, inner=4, num_warps=4),
    Config(slots=128, inner=16, num_warps=4),
    Config(slots=64, inner=32, num_warps=4),
    Config(slots=32, inner=64, num_warps=4),
    Config(slots=16, inner=128, num_warps=4),
    Config(slots=4, inner=512, num_warps=4),
)
INTERPRETER = tuple(Config(slots=max(1, 8192 // inner), inner=inner, num_warps=1) for inner in (1, 16, 128, 1024))

CONFIGS = TILES


def choose(target: Target, inner: int) -> Config:
    """
    Args:
        inner: words per token.
    """
    table = INTERPRETER if target.interpreted else TILES
    return next((config for config in table if inner <= config.inner), table[-1])
