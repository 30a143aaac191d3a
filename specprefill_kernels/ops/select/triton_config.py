"""How the kernels of chunk selection are launched.

Nothing here depends on the batch, so that a batch equals its sequences alone.
"""

from dataclasses import dataclass

from specprefill_kernels._triton import Target


@dataclass(frozen=True)
class KeysConfig:
    """Chunk means.

    Attributes:
        tokens: positions per program: whole chunks, or a piece of one that is longer.
        num_warps: warps per program.
    """

    tokens: int
    num_warps: int


@dataclass(frozen=True)
class RankConfig:
    """The search of one sequence, by one program.

    Attributes:
        block: chunks that it looks at at a time.
        held: all chunks fit one block, so each is loaded once and stays in registers.
        num_warps: warps per program.
    """

    block: int
    held: bool
    num_warps: int


@dataclass(frozen=True)
class ExpandConfig:
    """Chunk ids to token positions: `block` positions per program."""

    block: int
    num_warps: int


# Eight positions a thread: two 16-byte loads of importance, and fp64 sums of a quarter of a chunk each. 128K tokens are
# 128 programs, one per processor of a large GPU.
KEYS = KeysConfig(tokens=1024, num_warps=4)
KEYS_INTERPRETER = KeysConfig(tokens=65536, num_warps=1)

# Ranks: the smallest block that holds all chunks. A round is one reduction over the block, and most of its time goes
# to the shuffles and the barrier, so few warps: 16 keys a thread.
RANK_HELD = (
    RankConfig(block=1024, held=True, num_warps=4),
    RankConfig(block=4096, held=True, num_warps=8),
    RankConfig(block=8192, held=True, num_warps=16),
)
# Beyond, keys are read again every round, most of them out of the first-level cache: 1M tokens in chunks of 32 have
# 128 KiB of them. 8 keys a thread: with 16, some architectures spill.
RANK_TILED = RankConfig(block=2048, held=False, num_warps=8)
RANK_TILED_MASS = RankConfig(block=1024, held=False, num_warps=4)
# A chunk with its mass takes 3 registers.
MOST_HELD_WITH_MASS = 4096
RANK_INTERPRETER = tuple(RankConfig(block, held=True, num_warps=1) for block in (512, 8192, 32768))

# Four positions a thread: one 16-byte store.
EXPAND = ExpandConfig(block=1024, num_warps=8)
EXPAND_INTERPRETER = ExpandConfig(block=32768, num_warps=1)

CONFIGS = (KEYS, *RANK_HELD, RANK_TILED, RANK_TILED_MASS, EXPAND)


def choose_keys(target: Target) -> KeysConfig:
    return KEYS_INTERPRETER if target.interpreted else KEYS


def choose_rank(target: Target, num_chunks: int, by_mass: bool) -> RankConfig:
    """
    Args:
        num_chunks: of the longest prompt that the buffers can hold.
        by_mass: whether chunks are held with their masses.
    """
    for config in RANK_INTERPRETER if target.interpreted else RANK_HELD:
        if num_chunks <= config.block and not (by_mass and config.block > MOST_HELD_WITH_MASS):
            return config
    return RANK_TILED_MASS if by_mass else RANK_TILED


def choose_expand(target: Target) -> ExpandConfig:
    return EXPAND_INTERPRETER if target.interpreted else EXPAND
