"""Checks of what callers hand in. Every error reads "<argument>: expected <what>, got <what came>".

Three kinds live here. Checks of shapes and options read only metadata, so they trace under torch.compile and cost no
device sync. Checks of memory (`writable`, `disjoint`) need real tensors, so they run inside the op. Checks of values
(`*_values`) read tensors' contents; ops call them on CPU tensors only.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int32, torch.int64)
FP32 = torch.finfo(torch.float32)


def fail(name: str, expected: str, got: object) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def shape(x: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in x.shape) + "]"


def choice(name: str, value: object, options: Sequence[str]) -> None:
    if value not in options:
        fail(name, f"one of {tuple(options)}", repr(value))


def integer(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(name, "an int", f"{value!r} ({type(value).__name__})")
    if value < minimum:  # type: ignore[operator]
        fail(name, f"at least {minimum}", value)


def number(name: str, value: object, *, above: float | None = None, fp32: bool = False) -> None:
    """A finite number; with `fp32` one that fp32 holds without becoming 0, subnormal or Inf (0 itself is fine)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(name, "a number", f"{value!r} ({type(value).__name__})")
    if not (float("-inf") < value < float("inf")):  # type: ignore[operator]
        fail(name, "a finite number", value)
    if above is not None and not value > above:  # type: ignore[operator]
        fail(name, f"a number above {above:g}", value)
    if fp32 and value != 0 and not FP32.tiny <= abs(value) <= FP32.max:  # type: ignore[arg-type]
        fail(name, f"a magnitude in [{FP32.tiny:.3g}, {FP32.max:.3g}], as fp32 holds it", value)


def fraction(name: str, value: object) -> None:
    number(name, value)
    if not 0 < value <= 1:  # type: ignore[operator]
        fail(name, "a fraction in (0, 1]", value)


def odd(name: str, value: object) -> None:
    integer(name, value, 1)
    if value % 2 == 0:  # type: ignore[operator]
        fail(name, "an odd number (a centred window)", value)


def tensor(
    name: str,
    x: object,
    *,
    ndim: int | tuple[int, ...] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    sizes: Sequence[int | None] | None = None,
    what: str = "",
) -> None:
    """`sizes` gives the wanted size of each dimension, None for any; `what` names the dimensions, "[B, N, Hq, D]"."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        fail(name, "a dense (strided) tensor", str(x.layout))
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if ranks is not None and x.ndim not in ranks:
        fail(name, f"{' or '.join(map(str, ranks))} dimensions{' ' + what if what else ''}", f"shape {shape(x)}")
    if dtypes is not None and x.dtype not in dtypes:
        fail(name, f"dtype {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}", str(x.dtype))
    if device is not None and x.device != device:
        fail(name, f"a tensor on {device}", f"one on {x.device}")
    if sizes is not None:
        for dim, size in enumerate(sizes):
            if size is not None and x.shape[dim] != size:
                wanted = "[" + ", ".join("*" if n is None else str(n) for n in sizes) + "]"
                fail(name, f"shape {wanted}{' ' + what if what else ''}", f"shape {shape(x)}")


def supported_device(name: str, x: Tensor) -> None:
    if x.device.type not in ("cpu", "cuda"):
        fail(name, "a tensor on cpu or cuda", f"one on {x.device}")


def per_sequence(name: str, x: object, batch: int, device: torch.device) -> None:
    """seq_lens, num_look_ahead: one integer per sequence."""
    if x is not None:
        tensor(name, x, ndim=1, dtypes=INTEGERS, device=device, sizes=(batch,), what="[B]")


def writable(name: str, x: Tensor) -> None:
    """An output whose elements share memory would be written twice."""
    if not _no_two_share(x.shape, x.stride()):
        fail(name, "a tensor whose elements do not share memory", f"strides {tuple(x.stride())}")


def _no_two_share(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether each stride steps over all that the smaller ones reach: then no two elements are one."""
    reach = 0
    for stride, size in sorted(zip(strides, sizes)):
        if size > 1:
            if stride <= reach:
                return False
            reach += (size - 1) * stride
    return True


def _extent(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def disjoint(name: str, out: Tensor, others: Iterable[tuple[str, Tensor]]) -> None:
    """`out`, which is written, shares no memory with the others. By address: two storages may be one memory."""
    low, high = _extent(out)
    for other_name, other in others:
        # Most are told apart by where they start.
        if other.data_ptr() >= high or other.numel() == 0:
            continue
        if low < _extent(other)[1] and not _interleaved(out, other):
            fail(name, f"memory that does not overlap {other_name}", "tensors that overlap")


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Whether b is a shifted by a distance that fits between a's strides: keys and values that share one buffer."""
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    distance, rest = divmod(abs(a.data_ptr() - b.data_ptr()), a.element_size())
    return rest == 0 and _no_two_share((*a.shape, 2), (*a.stride(), distance))


def length_values(seq_lens: Tensor | None, capacity: int, batch: int, *, name: str = "seq_lens") -> list[int]:
    """Lengths of CPU tensors as ints, each in [1, capacity]."""
    if seq_lens is None:
        return [int(capacity)] * batch
    lengths: list[int] = seq_lens.tolist()
    for b, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            fail(f"{name}[{b}]", f"1 <= length <= {capacity}", length)
    return lengths


def cu_seqlens_values(cu_seqlens: Tensor, total: int) -> list[int]:
    """Offsets of packed sequences: start at 0 or later, grow, and end inside the packed buffer."""
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] < 0:
        fail("cu_seqlens[0]", "at least 0", offsets[0])
    for b in range(len(offsets) - 1):
        if offsets[b + 1] <= offsets[b]:
            fail(f"cu_seqlens[{b + 1}]", f"more than cu_seqlens[{b}] = {offsets[b]}", offsets[b + 1])
    if offsets[-1] > total:
        fail(f"cu_seqlens[{len(offsets) - 1}]", f"at most {total}, the packed tokens", offsets[-1])
    return offsets


def block_table_values(
    block_table: Tensor,
    lengths: Sequence[int],
    block_size: int,
    num_blocks: int,
    *,
    name: str = "block_table",
    exclusive: bool = False,
) -> None:
    """Block ids that a sequence of this length really uses; entries behind them may be anything.

    `exclusive`: the blocks are written, so no two of them may be the same.
    """
    rows = block_table.tolist()
    seen: set[int] = set()
    for b, length in enumerate(lengths):
        for i in range(-(-length // block_size)):
            block = rows[b][i]
            if not 0 <= block < num_blocks:
                fail(f"{name}[{b}, {i}]", f"a block id in [0, {num_blocks})", block)
            if exclusive and block in seen:
                fail(f"{name}[{b}, {i}]", "a block that no other entry names", block)
            seen.add(block)


def finite_values(name: str, x: Tensor, b: int) -> None:
    """x, the valid part of sequence b, holds neither NaN nor Inf."""
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        fail(f"{name}[{', '.join(map(str, (b, *at)))}]", "a finite value", float(x[at]))
