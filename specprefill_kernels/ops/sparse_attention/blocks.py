"""What the backends share: where blocks lie, how many a query block attends to, and the checks of lists of them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specprefill_kernels import _checks

# A block is one tile of a kernel or a few: below 16 tensor cores have nothing to do, above 256 a choice is too coarse.
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 16, 256
# A tile's accumulator is head_dim wide and stays in registers.
MAX_HEAD_DIM = 256


class AttentionBlocks(NamedTuple):
    """The earlier key blocks that each query block attends to, beside its own.

    Attributes:
        indices: [B, Hq, R, W] int32, ascending, padded with -1.
        counts: [B, Hq, R] int32.
    """

    indices: Tensor
    counts: Tensor


@dataclass(frozen=True)
class BlockBudget:
    """Which blocks a query block attends to; see `select_attention_blocks`."""

    block_size: int
    keep_blocks: int
    sink_blocks: int
    local_blocks: int

    def width(self, total: int) -> int:
        """W: room for the earlier blocks of any query block among `total` positions."""
        return max(1, min(self.keep_blocks, -(-total // self.block_size)) - 1)


def row_blocks(rows: int, total: int, block_size: int) -> tuple[int, int]:
    """(first, count) of the blocks that the last `rows` of `total` positions touch."""
    first = (total - rows) // block_size
    return first, -(-total // block_size) - first


def check_lists(indices: Tensor, counts: Tensor, first: int) -> None:
    """Lists in CPU tensors name earlier blocks only, in ascending order.

    Args:
        first: the first query block's index.
    """
    own = torch.arange(first, first + counts.shape[2], dtype=torch.int32)
    bad = (counts < 0) | (counts > indices.shape[3])
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        _checks.fail(f"blocks.counts{list(at)}", f"a count in [0, {indices.shape[3]}]", int(counts[at]))
    slot = torch.arange(indices.shape[3])
    listed = slot < counts[..., None]
    low = torch.where(slot > 0, indices.roll(1, -1), -1)
    bad = listed & ((indices <= low) | (indices >= own[:, None]))
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        expected = f"an ascending list of blocks in [0, {int(own[at[2]])}), those before the query block"
        _checks.fail(f"blocks.indices{list(at)}", expected, int(indices[at]))
