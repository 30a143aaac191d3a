"""What one score call was asked to do, checked once and handed to every backend."""

from dataclasses import dataclass

from torch import Tensor

from specprefill_kernels import _checks

LAYOUTS = ("bhtd", "bthd", "packed", "paged_nhd", "paged_hnd")
QUERIES = ("look_ahead", "observation_window")
NORMALIZE_OVER = ("prompt", "visible")
POOL_EDGES = ("zero", "valid")
POOL_ORDERS = ("before_max", "after_max")


@dataclass(frozen=True)
class ScoreOptions:
    """Options of `score_layer_`; see there for what each means."""

    layout: str = "bhtd"
    queries: str = "look_ahead"
    normalize_over: str = "prompt"
    scale: float | None = None
    softcap: float | None = None
    pool_kernel_size: int = 13
    pool_edge: str = "zero"
    pool_order: str = "before_max"

    @property
    def paged(self) -> bool:
        return self.layout.startswith("paged")

    @property
    def extra_keys(self) -> bool:
        """Whether the softmax also runs over keys behind the prompt, so that they must be in the buffer."""
        return self.queries == "look_ahead" and self.normalize_over == "visible"


@dataclass(frozen=True)
class Sequences:
    """Where each sequence of the batch lies. Tensors are int32 on the state's device."""

    seq_lens: Tensor | None
    cu_seqlens: Tensor | None
    block_table: Tensor | None
    num_look_ahead: Tensor | None


# layout -> positions of (heads, tokens) in the key's shape
_AXES = {"bhtd": (1, 2), "bthd": (2, 1), "packed": (1, 0), "paged_nhd": (2, 1), "paged_hnd": (1, 2)}
KEY_SHAPES = {
    "bhtd": "[B, Hkv, T, D]",
    "bthd": "[B, T, Hkv, D]",
    "packed": "[sum T, Hkv, D]",
    "paged_nhd": "[num_blocks, block_size, Hkv, D]",
    "paged_hnd": "[num_blocks, Hkv, block_size, D]",
}


def head_axis(layout: str) -> int:
    return _AXES[layout][0]


def token_axis(layout: str) -> int:
    return _AXES[layout][1]


def sequence_bounds(
    batch: int, capacity: int, layout: str, key: Tensor, sequences: Sequences, extra: list[int] | None = None
) -> list[tuple[int, int, int]]:
    """(start, prompt length, readable length) of each sequence, all checked against the buffers. CPU tensors only.

    Args:
        capacity: positions that the state has.
        extra: keys behind the prompt that must be readable too, per sequence.
    """
    extra = extra or [0] * batch
    tokens = key.shape[token_axis(layout)]
    if layout == "packed":
        offsets = [] if sequences.cu_seqlens is None else _checks.cu_seqlens_values(sequences.cu_seqlens, tokens)
        room = [offsets[b + 1] - offsets[b] for b in range(batch)]
        starts = offsets
    elif layout.startswith("paged"):
        width = sequences.block_table.shape[1] if sequences.block_table is not None else 0
        room, starts = [width * tokens] * batch, [0] * batch
    else:
        room, starts = [tokens] * batch, [0] * batch
    if sequences.seq_lens is not None:
        lengths: list[int] = sequences.seq_lens.tolist()
    elif layout == "packed":
        lengths = room
    else:
        lengths = [capacity] * batch
    for b in range(batch):
        limit = min(capacity, room[b] - extra[b])
        if not 1 <= lengths[b] <= limit:
            behind = f" ({extra[b]} look-ahead keys must follow the prompt)" if extra[b] else ""
            _checks.fail(f"seq_lens[{b}]", f"1 <= length <= {limit}{behind}", lengths[b])
    if sequences.block_table is not None:
        readable = [lengths[b] + extra[b] for b in range(batch)]
        _checks.block_table_values(sequences.block_table, readable, tokens, key.shape[0])
    return [(starts[b], lengths[b], lengths[b] + extra[b]) for b in range(batch)]


def look_ahead_rows(batch: int, look_ahead: int, num_look_ahead: Tensor | None) -> list[int]:
    """Valid rows of each sequence, each in [1, N]. CPU tensors only."""
    return _checks.length_values(num_look_ahead, look_ahead, batch, name="num_look_ahead")
