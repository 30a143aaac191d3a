"""The definition of the score, in plain PyTorch: what every other backend is held against.

A = softmax over the visible keys of (q . k * scale)      per query head, fp32
P = A averaged over a centred window of pool_kernel_size positions
state[b, n, t] = max(state[b, n, t], max over heads of P)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from specprefill_kernels import _checks
from specprefill_kernels.ops.score.options import (
    ScoreOptions,
    Sequences,
    head_axis,
    look_ahead_rows,
    sequence_bounds,
)


def score_layers_(
    state: Tensor,
    queries: list[Tensor],
    keys: list[Tensor],
    sequences: Sequences,
    windows: list[int],
    lse: list[Tensor],
    key_scales: list[Tensor],
    workspace: Tensor | None,
    options: ScoreOptions,
) -> None:
    for i, (query, key) in enumerate(zip(queries, keys)):
        layer_lse = lse[i] if lse else None
        key_scale = key_scales[i] if key_scales else None
        _score_layer_(state, query, key, sequences, windows[i], layer_lse, key_scale, options)


def _score_layer_(
    state: Tensor,
    query: Tensor,
    key: Tensor,
    sequences: Sequences,
    window: int,
    lse: Tensor | None,
    key_scale: Tensor | None,
    options: ScoreOptions,
) -> None:
    look_ahead = query.shape[1]
    scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale
    for b, (start, length, readable, n) in enumerate(_bounds(state, query.shape[1], key, sequences, options)):
        k = sequence_keys(key, b, start, readable, options.layout, sequences.block_table).float()  # [Hkv, t, D]
        if key_scale is not None:
            k = k * key_scale.reshape(-1, 1, 1)
        q = query[b, :n].float().unflatten(1, (k.shape[0], -1))  # [n, Hkv, G, D]
        s = torch.einsum("nhgd,htd->hgnt", q, k) * scale
        if options.softcap is not None:
            s = options.softcap * torch.tanh(s / options.softcap)
        seen = visible(n, length, readable, window, options, s.device)
        s = s.masked_fill(~seen, -torch.inf)
        if lse is None:
            norm = s.logsumexp(-1, keepdim=True).masked_fill(s.amax(-1, keepdim=True) == -torch.inf, 0.0)
        else:
            norm = lse[b, :n].float().unflatten(1, (k.shape[0], -1)).permute(1, 2, 0)[..., None]
        weights = torch.exp(s - norm).masked_fill(~seen, 0.0)[..., :length]  # [Hkv, G, n, length]
        if state.device.type == "cpu" and not bool((torch.isfinite(weights) & (norm < torch.inf)).all()):
            _fail_not_finite(b, lse is not None)
        if options.pool_order == "before_max":
            weights = pool(weights, options.pool_kernel_size, options.pool_edge)
        best = weights.amax((0, 1))
        target = state[b, :n, :length] if state.shape[1] == look_ahead else state[b, :1, :length]
        target.copy_(torch.maximum(target, best if target.shape[0] == n else best.amax(0, keepdim=True)))


def _bounds(
    state: Tensor, look_ahead: int, key: Tensor, sequences: Sequences, options: ScoreOptions
) -> list[tuple[int, int, int, int]]:
    """(start, prompt length, readable length, valid rows) of each sequence, checked as `sequence_bounds` does."""
    rows = look_ahead_rows(len(state), look_ahead, sequences.num_look_ahead)
    extra = [n - 1 for n in rows] if options.extra_keys else None
    bounds = sequence_bounds(len(state), state.shape[2], options.layout, key, sequences, extra)
    for b, (_, length, _) in enumerate(bounds):
        if options.queries == "observation_window" and rows[b] > length:
            expected = f"at most the prompt's {length} tokens, as an observation window"
            _checks.fail(f"num_look_ahead[{b}]", expected, rows[b])
    return [(*bound, n) for bound, n in zip(bounds, rows)]


def check_contents(
    state: Tensor, look_ahead: int, keys: list[Tensor], sequences: Sequences, options: ScoreOptions
) -> list[tuple[int, int]]:
    """(prompt length, valid rows) of each sequence; what is wrong with the contents of CPU tensors is refused."""
    bounds = [_bounds(state, look_ahead, key, sequences, options) for key in keys]
    return [(length, n) for _, length, _, n in bounds[0]]


def check_scores(state: Tensor, bounds: list[tuple[int, int]], given_lse: bool) -> None:
    """Refuses NaN or Inf among the attention weights, which stays in the state that they were folded into."""
    for b, (length, n) in enumerate(bounds):
        if not bool(torch.isfinite(state[b, :n, :length]).all()):
            _fail_not_finite(b, given_lse)


def _fail_not_finite(b: int, given_lse: bool) -> None:
    cause = "lse, query or key" if given_lse else "query or key"
    _checks.fail(f"{cause} of sequence {b}", "finite attention weights", "NaN or Inf")


def sequence_keys(
    key: Tensor, b: int, start: int, length: int, layout: str, block_table: Tensor | None
) -> Tensor:  # [Hkv, length, D]
    """The keys of sequence b, whatever the layout."""
    if layout == "packed":
        return key[start : start + length].transpose(0, 1)
    if block_table is None:
        return (key[b] if layout == "bhtd" else key[b].transpose(0, 1))[:, :length]
    blocks = key.movedim(head_axis(layout), 1)  # [num_blocks, Hkv, block_size, D]
    count = -(-length // blocks.shape[2])
    used = blocks.view(torch.uint8) if blocks.dtype in _checks.FP8 else blocks  # fp8 has no indexing kernel
    taken = used[block_table[b, :count].long()].transpose(0, 1).flatten(1, 2)[:, :length]
    return taken.view(blocks.dtype) if blocks.dtype in _checks.FP8 else taken


def visible(
    rows: int, length: int, readable: int, window: int, options: ScoreOptions, device: torch.device
) -> Tensor:  # bool [rows, readable]
    """Which keys each row's softmax runs over."""
    t = torch.arange(readable, device=device)
    row = torch.arange(rows, device=device)[:, None]
    position = length - 1 + row if options.queries == "look_ahead" else length - rows + row
    seen = t <= position
    if not options.extra_keys:
        seen = seen & (t < length)
    if window > 0:
        seen = seen & (t > position - window)
    return seen


def pool(x: Tensor, kernel_size: int, edge: str) -> Tensor:
    """Average of a centred window over the last dimension, same length."""
    flat = x.reshape(1, -1, x.shape[-1])
    width = min(kernel_size, 2 * x.shape[-1] - 1)  # a wider window holds everything wherever it is centred
    pooled = F.avg_pool1d(flat, width, 1, width // 2, count_include_pad=edge == "zero")
    return pooled.view(x.shape) * (width / kernel_size if edge == "zero" else 1.0)
