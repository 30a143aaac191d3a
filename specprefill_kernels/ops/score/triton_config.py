"""Launch heuristics of the score kernels, as data.

The key is the target's shared memory and the bytes of one key row there, since a stage of the pipeline is one tile of
keys, and what makes registers scarce: fp32 operands, and keys that cannot be read 16 bytes at a time. None of the
numbers has been timed on a GPU yet; each follows from the limits that its comment names, and the ahead-of-time check
shows that it fits.
"""

from __future__ import annotations

from dataclasses import dataclass

from specprefill_kernels._triton import Target


@dataclass(frozen=True)
class Tile:
    """How one kernel walks over the keys.

    Attributes:
        block_t: keys of a tile, a power of two.
        tiles: tiles that one program walks over. A constant for a target and shape class, never a function of the
            batch: each row's sum is then split at the same places, alone or in a batch.
        num_warps: warps of a program.
        num_stages: tiles of keys in flight.
    """

    block_t: int
    tiles: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ScoreConfig:
    """One configuration of the two kernels that read keys.

    Attributes:
        block_m: rows of a tile: look-ahead rows of a GQA group, at least the 16 of one tensor-core instruction.
        normalize: of the kernel that sums each row's exponentials.
        pool: of the kernel that weighs, pools and keeps the maximum.
    """

    block_m: int
    normalize: Tile
    pool: Tile


MIN_BLOCK_M = 16
# 64 rows of logits, weights and pooled weights are 3 x 64 x 64 fp32: 48 registers a thread at 8 warps, beside the
# query's own. Above that they spill.
MAX_BLOCK_M = 64
# Of fp32 operands, multiplied in two TF32 halves each, and of keys that are not read 16 bytes at a time, so that they
# pass through registers on their way to shared memory.
MAX_BLOCK_M_HEAVY = 32

# Shared memory of a block in KiB, by compute capability; gfx942 has 64 KiB of LDS.
_SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
_SMALL, _MEDIUM, _LARGE, _LDS = "small", "medium", "large", "lds"

# (memory class, row bytes up to) -> (normalize, pool) as (block_t, tiles, num_stages).
# normalize: 512 to 1024 keys a program: 128 programs a head at 128K tokens fill any GPU, and their partial sums are 8
#   bytes a row against 128 KiB of keys and more.
# pool: block_t 64, as pooling multiplies by a 64 x 64 band, 4 * block_t operations a weight beside the 2 * D of the
#   dot: with 128 the band would cost more than the dot at D = 128; with 32 a halo of 12 keys would be read for each 20.
# num_stages: a tile is 8 to 32 KiB; two CTAs per SM with 2 of them in flight each cover the latency of HBM (about
#   700 ns at 25 bytes per ns and SM, 18 KiB), more where shared memory is there for nothing else.
_TILES: dict[tuple[str, int], tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    (_LARGE, 128): ((128, 8, 4), (64, 8, 4)),
    (_LARGE, 256): ((128, 8, 3), (64, 8, 3)),
    (_LARGE, 512): ((64, 8, 3), (64, 8, 2)),
    # sm_80: as above, but fp8 keys are converted in registers, and with 128 keys of D = 128 one register was spilled.
    (_MEDIUM, 128): ((128, 8, 4), (64, 8, 4)),
    (_MEDIUM, 256): ((64, 16, 4), (64, 8, 3)),
    (_MEDIUM, 512): ((64, 8, 3), (64, 8, 2)),
    (_SMALL, 128): ((128, 8, 3), (64, 8, 3)),
    (_SMALL, 256): ((64, 16, 3), (64, 8, 2)),
    (_SMALL, 512): ((64, 8, 2), (32, 16, 2)),
    # gfx942: 64 KiB of LDS a workgroup, all that two tiles may take.
    (_LDS, 128): ((128, 8, 2), (64, 8, 2)),
    (_LDS, 256): ((64, 8, 2), (64, 8, 2)),
    (_LDS, 512): ((32, 16, 2), (32, 16, 2)),
}
# Operands in fp32 are read in parts of 32 dimensions (see PARTS), so that a row has 128 bytes whatever head_dim is;
# their halves leave registers for tiles half as large.
_FP32 = ((64, 16, 3), (32, 16, 2))
# Keys that are not contiguous or not aligned to 16 bytes, and heads beyond 256 dimensions: a path that has to be right,
# not fast. The smallest tiles, as keys pass through registers.
_NARROW = ((32, 16, 2), (32, 16, 2))
# The interpreter pays for each operation, not for each element: one tile holds all that tests have.
_INTERPRETED = (Tile(128, 2, 4, 1), Tile(128, 2, 4, 1))

# Second-level cache in MiB, by compute capability: of the A100 (40), GA102 (6), AD102 (72), H100 (50), B200 (126) and
# GB202 (96); gfx942 has 256 MiB behind its own.
_CACHE_MIB = {80: 40, 86: 6, 89: 72, 90: 50, 100: 126, 120: 96, 942: 256}
# Layers that one launch takes: beyond 16, its arguments cost more than another launch. Fewer are padded to one of these
# numbers, so that there are three kernels to compile, not sixteen.
LAYER_SLOTS = (1, 4, 16)


def layers_per_launch(target: Target, key_bytes: int, passes: int) -> int:
    """Layers that go into one launch of each pass, so that the second pass finds the first one's keys in the cache.

    Half of it: the rest is for the other data under way. A layer that is larger is a launch by itself: its end still is
    in the cache, as the second pass goes backwards, and it takes long enough to hide the next one's launch.

    Args:
        key_bytes: of one layer.
        passes: over the keys; with one of them, as many layers as a launch takes.
    """
    if passes == 1 or target.interpreted:
        return LAYER_SLOTS[-1]
    room = _CACHE_MIB.get(target.arch, 32) * 2**20 // 2
    return max(size for size in LAYER_SLOTS if size == 1 or size * key_bytes <= room)


# Stretches of keys whose sums `join_sums` reads at once: 32 x 64 rows are 16 registers a thread at 4 warps.
JOINED_AT_ONCE = 32

# fp8 e4m3 is converted by an instruction from sm_89 on; below, and on other vendors, by integer arithmetic.
NATIVE_FP8_FROM = 89


# What does not fit in registers as a whole is read again beside each tile of keys, in parts of so many dimensions, by
# bytes of an element: 32 rows of 256 bf16 are 128 registers in every warp; of 64 fp32, in two halves, as many. Keys in
# narrow loads take half of the registers themselves.
WHOLE_HEAD = {2: 256, 4: 0}
WHOLE_HEAD_NARROW = 128
PARTS = {2: 64, 4: 32}


@dataclass(frozen=True)
class HeadSplit:
    """A head's dimensions as dots see them: `first` and `rest` at once, or `part` after `part` unless that is 0."""

    first: int
    rest: int
    part: int


def power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def split_head(head_dim: int, dot_bytes: int, wide_loads: bool) -> HeadSplit:
    """80 = 64 + 16, 96 = 64 + 32, 192 = 128 + 64: powers of two of at least 16 dimensions, as dots want them."""
    if head_dim > min(WHOLE_HEAD[dot_bytes], WHOLE_HEAD[2] if wide_loads else WHOLE_HEAD_NARROW):
        return HeadSplit(0, 0, PARTS[dot_bytes])
    first = max(1 << (head_dim.bit_length() - 1), 16)
    rest = max(power_of_2(head_dim - first), 16) if head_dim > first else 0
    return HeadSplit(first, rest, 0)


def memory_class(target: Target) -> str:
    if target.vendor == "hip":
        return _LDS
    shared = _SHARED_KIB.get(target.arch, 99)  # an architecture that is not in the table is taken for a small one
    return _SMALL if shared <= 99 else _MEDIUM if shared <= 163 else _LARGE


def native_fp8(target: Target) -> bool:
    return target.vendor == "cuda" and target.arch >= NATIVE_FP8_FROM


def dot_precision(target: Target) -> str:
    """How fp32 operands are multiplied: by three TF32 products each on NVIDIA (error about 2^-21), else exactly."""
    return "tf32x3" if target.vendor == "cuda" else "ieee"


def choose(target: Target, head_dim: int, dot_bytes: int, rows: int, wide_loads: bool) -> ScoreConfig:
    """
    Args:
        dot_bytes: of an element as dots read it, 2 or 4.
        rows: look-ahead rows of a GQA group, padded.
        wide_loads: whether keys can be read 16 bytes at a time.
    """
    heavy = dot_bytes == 4 or not wide_loads or head_dim > WHOLE_HEAD[2]
    block_m = min(max(rows, MIN_BLOCK_M), MAX_BLOCK_M_HEAVY if heavy else MAX_BLOCK_M)
    if target.interpreted:
        return ScoreConfig(block_m, *_INTERPRETED)
    if heavy:
        return _config(block_m, *(_FP32 if dot_bytes == 4 and wide_loads else _NARROW))
    row_bytes = next(size for size in (128, 256, 512) if head_dim * dot_bytes <= size)
    return _config(block_m, *_TILES[memory_class(target), row_bytes])


def pool_stages(target: Target, tile: Tile, wide: bool) -> int:
    """Stages of the pooling kernel. For windows wider than a tile and a head split in two, AMD's compiler (Triton 3.6,
    3.7) fails on more than one."""
    return 1 if wide and target.vendor == "hip" else tile.num_stages


def _config(block_m: int, normalize: tuple[int, int, int], pool: tuple[int, int, int]) -> ScoreConfig:
    warps = 8 if block_m == MAX_BLOCK_M else 4
    (n_block, n_tiles, n_stages), (p_block, p_tiles, p_stages) = normalize, pool
    return ScoreConfig(block_m, Tile(n_block, n_tiles, warps, n_stages), Tile(p_block, p_tiles, warps, p_stages))


def configs(target: Target) -> tuple[ScoreConfig, ...]:
    """All that `choose` may return."""
    light, heavy = (16, 32, MAX_BLOCK_M), (16, MAX_BLOCK_M_HEAVY)
    if target.interpreted:
        return tuple(ScoreConfig(block_m, *_INTERPRETED) for block_m in light)
    kind = memory_class(target)
    tiles = [tiles for (memory, _), tiles in _TILES.items() if memory == kind]
    return (
        *(_config(block_m, *tile) for tile in tiles for block_m in light),
        *(_config(block_m, *tile) for tile in (_FP32, _NARROW) for block_m in heavy),
    )
