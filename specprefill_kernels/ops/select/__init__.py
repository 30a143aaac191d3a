"""Select: the chunks of each prompt that are worth prefilling."""

from typing import NamedTuple

import torch
from torch import Tensor

from specprefill_kernels import _backends, _checks
from specprefill_kernels._ops import ops
from specprefill_kernels.ops.select.budget import Budget

__all__ = ["Selection", "select_chunks"]

ROUNDINGS = ("ceil", "floor")


class Selection(NamedTuple):
    """Kept tokens of each sequence.

    Attributes:
        indices: [B, K] int32, kept positions in ascending order, -1 behind the last.
        num_kept: [B] int32, how many of them are valid.
        overflow: [B] bool, whether the protected chunks alone exceed the budget (they are all kept even then).
    """

    indices: Tensor
    num_kept: Tensor
    overflow: Tensor

    def spans(self, b: int) -> list[tuple[int, int]]:
        """Kept stretches [start, end) of sequence b, touching ones merged. Copies the indices to the host."""
        kept = self.indices[b, : int(self.num_kept[b])].tolist()
        spans: list[tuple[int, int]] = []
        for position in kept:
            if spans and spans[-1][1] == position:
                spans[-1] = (spans[-1][0], position + 1)
            else:
                spans.append((position, position + 1))
        return spans

    def mask(self, max_len: int) -> Tensor:
        """[B, max_len] bool: which positions are kept."""
        _checks.integer("max_len", max_len, 1)
        kept = torch.zeros(self.indices.shape[0], max_len + 1, dtype=torch.bool, device=self.indices.device)
        # padding goes to a column of its own, which is cut off: a scatter whose shape depends on nothing
        where = torch.where(self.indices < 0, max_len, self.indices).long()
        return kept.scatter_(1, where.clamp_(max=max_len), True)[:, :max_len]


def select_chunks(
    importance: Tensor,
    seq_lens: Tensor | None = None,
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    keep_mass: float | None = None,
    chunk_size: int = 32,
    rounding: str = "ceil",
    protect: Tensor | None = None,
    sink: int = 0,
    tail: int = 0,
    backend: str = "auto",
) -> Selection:
    """Keep the chunks of largest mean importance, ties to the lower index; their tokens in ascending order.

    A chunk is `chunk_size` consecutive tokens; the last may be shorter and is averaged over its own length (Liu, Chen,
    Zhang, arXiv 2502.02789, section 3). Means are summed in fp64 and compared in fp32.

    Args:
        importance: [B, T] fp32; NaN and Inf are errors on CPU tensors. CUDA tensors are not read on the host: there
            NaN ranks above every number, as in torch.topk. To force tokens in, use `protect`.
        seq_lens: [B] integers in [1, T]. Default: T. On CUDA tensors a longer one counts as T, and a slot with 0 or
            less keeps nothing.
        keep_ratio: fraction of chunks KEPT, in (0, 1]: ceil(keep_ratio * n_chunks) chunks. A product within 1e-9 of
            an integer counts as that integer, so 0.7 of 10 chunks is 7.
        keep_tokens: tokens kept, rounded to chunks by `rounding`.
        keep_mass: p in (0, 1]: the fewest chunks that hold at least this fraction of the summed importance; chunks are
            then ranked by their sum. Importance must not be negative. Exactly one of the three budgets is given; at
            least one chunk is always kept.
        chunk_size: tokens per chunk.
        rounding: "ceil" as in the paper, or "floor".
        protect: [B, T] bool, tokens that must survive. A chunk that holds one is kept whole and paid from the budget
            first. Where protected chunks exceed the budget they are all kept, and `overflow` says so.
        sink: the first `sink` tokens are protected.
        tail: the last `tail` tokens are protected.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        Selection. K depends on shapes alone: the budget of T tokens; T when `protect` or `keep_mass` is given.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    _backends.check_name(backend)
    check_importance(importance, seq_lens)
    budget = check_budget(keep_ratio, keep_tokens, keep_mass, chunk_size, rounding, sink, tail)
    check_protect(protect, importance.shape[0], importance.shape[1], importance.device)
    return Selection(
        *ops.select_chunks(
            importance,
            seq_lens,
            protect,
            budget.keep_ratio,
            budget.keep_tokens,
            budget.keep_mass,
            chunk_size,
            rounding,
            sink,
            tail,
            backend,
        )
    )


def check_importance(importance: Tensor, seq_lens: Tensor | None) -> None:
    _checks.tensor("importance", importance, ndim=2, dtypes=(torch.float32,), what="[B, T]")
    _checks.supported_device("importance", importance)
    if any(size == 0 for size in importance.shape):
        _checks.fail("importance", "no empty dimension [B, T]", f"shape {_checks.shape(importance)}")
    _checks.per_sequence("seq_lens", seq_lens, importance.shape[0], importance.device)


def check_protect(protect: Tensor | None, batch: int, max_len: int, device: torch.device) -> None:
    if protect is not None:
        sizes = (batch, max_len)
        _checks.tensor("protect", protect, ndim=2, dtypes=(torch.bool,), device=device, sizes=sizes, what="[B, T]")


def check_budget(
    keep_ratio: float | None,
    keep_tokens: int | None,
    keep_mass: float | None,
    chunk_size: int,
    rounding: str,
    sink: int,
    tail: int,
) -> Budget:
    given = [
        name
        for name, value in (("keep_ratio", keep_ratio), ("keep_tokens", keep_tokens), ("keep_mass", keep_mass))
        if value is not None
    ]
    if len(given) != 1:
        _checks.fail("keep_ratio, keep_tokens, keep_mass", "exactly one of them", " and ".join(given) or "none")
    if keep_ratio is not None:
        _checks.fraction("keep_ratio", keep_ratio)
        keep_ratio = float(keep_ratio)
    if keep_tokens is not None:
        _checks.integer("keep_tokens", keep_tokens, 1)
    if keep_mass is not None:
        _checks.fraction("keep_mass", keep_mass)
        keep_mass = float(keep_mass)
    _checks.integer("chunk_size", chunk_size, 1)
    _checks.choice("rounding", rounding, ROUNDINGS)
    _checks.integer("sink", sink, 0)
    _checks.integer("tail", tail, 0)
    return Budget(keep_ratio, keep_tokens, keep_mass, chunk_size, rounding, sink, tail)
