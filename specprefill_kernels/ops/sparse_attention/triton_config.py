"""Launch heuristics of the block-sparse attention kernels, as data.

The key is the target's shared memory, the bytes of one key row, and whether operands are fp32. None of the numbers has
been timed on a GPU yet; each follows from the limits that its comment names, and the ahead-of-time check shows that it
fits.
"""

from __future__ import annotations

from dataclasses import dataclass

from specprefill_kernels._triton import Target
from specprefill_kernels.ops.score.triton_config import memory_class, power_of_2


@dataclass(frozen=True)
class AttentionConfig:
    """How the attention kernel walks over the listed blocks.

    Attributes:
        block_m: query rows of a program; a larger query block is split, and its parts share one list.
        block_n: keys of a tile; a larger key block is several tiles.
        num_warps: warps of a program.
        num_stages: tiles of keys and values in flight.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (memory class, row bytes up to) -> AttentionConfig, for 16-bit operands.
# block_m x block_n logits and block_m x head_dim sums are fp32 in registers: 128 x 64 and 128 x 128 are 96 registers a
#   thread at 8 warps. For each key, 4 * head_dim * block_m operations and 4 * head_dim bytes: 128 rows are 128
#   operations a byte, which L2 can feed; 64 would not do on sm_90.
# num_stages: K and V tiles of 64 rows are 2 * 64 * row bytes: 16 KiB at D = 64, 32 KiB at 128, 64 KiB at 256.
_TILES: dict[tuple[str, int], AttentionConfig] = {
    ("large", 128): AttentionConfig(128, 64, 8, 3),
    ("large", 256): AttentionConfig(128, 64, 8, 3),
    ("large", 512): AttentionConfig(128, 32, 8, 2),
    ("medium", 128): AttentionConfig(128, 64, 8, 3),
    ("medium", 256): AttentionConfig(128, 64, 8, 2),
    ("medium", 512): AttentionConfig(64, 32, 8, 2),
    # 128 x 32 and 64 x 64 at D = 128 spilled on sm_120.
    ("small", 128): AttentionConfig(128, 64, 8, 3),
    ("small", 256): AttentionConfig(64, 32, 4, 2),
    ("small", 512): AttentionConfig(64, 32, 8, 1),
    ("lds", 128): AttentionConfig(128, 64, 4, 1),
    ("lds", 256): AttentionConfig(128, 32, 4, 1),
    ("lds", 512): AttentionConfig(64, 32, 4, 1),
}
# Operands in fp32 are multiplied in two TF32 halves each, which take registers; and keys that are not contiguous or
# aligned to 16 bytes pass through registers on their way: paths that have to be right, not fast.
# (head_dim up to) -> AttentionConfig: the largest that spill nowhere.
_HEAVY = {
    64: AttentionConfig(32, 32, 8, 1),
    128: AttentionConfig(16, 16, 8, 1),
    256: AttentionConfig(16, 16, 8, 1),
}
# Above 64 dimensions of such operands, queries do not fit in registers: 16 x 256 in two halves are 256 of them in every
# warp. They are read again beside each tile of keys, in parts of so many dimensions.
QUERY_PART = 32
# The interpreter pays for each operation, not for each element.
_INTERPRETED = AttentionConfig(256, 256, 4, 1)

# Query blocks and key blocks of one tile of scores, and dimensions of a part of their dot product; 64 of each spilled
# on sm_80.
SCORE_TILE, SCORE_PART = 32, 32
# Scores that are kept at once, 256 MiB: more query blocks are ranked in another launch.
SCORES_AT_ONCE = 1 << 26
# Key blocks that one program ranks in registers, 4M tokens in blocks of 128: 64 numbers a thread at 16 warps.
MAX_RANKED = 1 << 15


def choose(target: Target, head_dim: int, dot_bytes: int, wide_loads: bool) -> AttentionConfig:
    """
    Args:
        dot_bytes: of an element, 2 or 4.
        wide_loads: whether keys and values can be read 16 bytes at a time.
    """
    if target.interpreted:
        return _INTERPRETED
    if dot_bytes == 4 or not wide_loads:
        return next(config for most, config in _HEAVY.items() if head_dim <= most)
    row_bytes = next(size for size in (128, 256, 512) if head_dim * dot_bytes <= size)
    return _TILES[memory_class(target), row_bytes]


def query_part(config: AttentionConfig, head_dim: int) -> int:
    """Dimensions of a part of the queries, 0 for all at once."""
    return QUERY_PART if config in _HEAVY.values() and head_dim > 64 else 0


def ranked_rows(width: int) -> int:
    """Query blocks that one program ranks: 4 numbers a thread of one warp where there are few blocks."""
    return max(1, 128 // width)


def rank_warps(width: int) -> int:
    """Warps that rank `width` blocks in registers, 16 to 64 numbers a thread."""
    return min(max(width // 512, 1), 16)


def configs(target: Target) -> tuple[AttentionConfig, ...]:
    """All that `choose` may return."""
    if target.interpreted:
        return (_INTERPRETED,)
    kind = memory_class(target)
    return (*(tile for (memory, _), tile in _TILES.items() if memory == kind), *_HEAVY.values())


__all__ = ["AttentionConfig", "choose", "configs", "power_of_2", "rank_warps"]
