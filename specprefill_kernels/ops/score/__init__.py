"""Score: attention of look-ahead queries over the prompt, pooled, its maximum kept over heads and layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specprefill_kernels import _backends, _checks
from specprefill_kernels._ops import ops
from specprefill_kernels.ops.score.options import (
    KEY_SHAPES,
    LAYOUTS,
    NORMALIZE_OVER,
    POOL_EDGES,
    POOL_ORDERS,
    QUERIES,
    head_axis,
    token_axis,
)

MAX_HEAD_DIM = 65536  # far above any model's; a larger one is a tensor that was expanded or transposed by mistake

__all__ = ["new_state", "score_layer_", "score_layers_", "score_workspace_size"]


def new_state(batch: int, look_ahead: int, max_len: int, device: torch.device | str | None = None) -> Tensor:
    """Zeros [batch, look_ahead, max_len], fp32: the running maximum that `score_layer_` updates.

    Give `look_ahead=1` when the rows are to be reduced by their maximum: `score_layer_` then folds all rows into one.
    That is the same as `finalize_importance(..., reduce="max")` over all rows where pooling comes before the maximum;
    with `pool_order="after_max"` each row is pooled by itself there, and one row would be pooled after their maximum.
    """
    for name, value in (("batch", batch), ("look_ahead", look_ahead), ("max_len", max_len)):
        _checks.integer(name, value, 1)
    return torch.zeros(batch, look_ahead, max_len, dtype=torch.float32, device=device)


def score_workspace_size(
    look_ahead: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_len: int,
    *,
    pool_kernel_size: int = 13,
    batch: int = 1,
    layers: int = 1,
    backend: str = "cpu",
) -> int:
    """Bytes of `workspace` that `score_layers_` needs on a backend. For several layers take the largest of each size,
    but the smallest `num_kv_heads`.

    "cpu": one fp32 row of weights per look-ahead row and query head of ONE KV head, rounded up to vectors (16 rows
    on AVX-512), for one sequence at a time, and a small tile per thread, at torch's present number of threads. With
    more than this the backend scores several heads between two meetings of its threads.
    "triton": 8 bytes per row and stretch of keys, of every layer of a launch and every sequence, on the current device.
    "cuda": partial sums of the rows of every layer and sequence, on the current device.
    """
    sizes = {
        "look_ahead": look_ahead,
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_len": max_len,
        "batch": batch,
        "layers": layers,
    }
    for name, value in sizes.items():
        _checks.integer(name, value, 1)
    _checks.odd("pool_kernel_size", pool_kernel_size)
    _checks.choice("backend", backend, ("cpu", "triton", "cuda"))
    size = _backends.implementation_of("score_layers", "score_workspace_size", backend)
    return int(size(batch, look_ahead, num_q_heads, num_kv_heads, head_dim, max_len, layers, pool_kernel_size))


def score_layer_(
    state: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    layout: str = "bhtd",
    seq_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    num_look_ahead: Tensor | None = None,
    queries: str = "look_ahead",
    normalize_over: str = "prompt",
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    lse: Tensor | None = None,
    key_scale: float | Tensor | None = None,
    pool_kernel_size: int = 13,
    pool_edge: str = "zero",
    pool_order: str = "before_max",
    backend: str = "auto",
    workspace: Tensor | None = None,
) -> Tensor:
    """Fold one layer's attention into `state`: QK^T, softmax, pooling and the maximum over heads, in place.

    ``state[b, n, t] = max(state[b, n, t], max_h pool(softmax_t(query[b, n, h] . key[b, h // G, t] * scale)))``,
    with G = Hq / Hkv, everything accumulated in fp32 (Liu, Chen, Zhang, arXiv 2502.02789, section 3). Positions from
    a sequence's length on and rows from its `num_look_ahead` on are left as they are.

    Args:
        state: [B, N, T] fp32, last dimension contiguous; or [B, 1, T] to fold the maximum over rows too.
        query: [B, N, Hq, D] fp32, fp16 or bf16, after RoPE. Row 0 is the last prompt token's.
        key: after RoPE; fp32, fp16, bf16, or fp8 (e4m3fn, e5m2) with `key_scale`; any strides, never copied. By
            `layout`: "bhtd" [B, Hkv, T, D]; "bthd" [B, T, Hkv, D]; "packed" [sum T, Hkv, D] with `cu_seqlens`;
            "paged_nhd" [num_blocks, block_size, Hkv, D] and "paged_hnd" [num_blocks, Hkv, block_size, D], both with
            `block_table` and `seq_lens`. May hold more tokens than the prompt.
        seq_lens: [B] integers, each prompt's length, at least 1. Default: all T of the state (dense), the differences
            of `cu_seqlens` (packed).
        cu_seqlens: [B + 1] integers, start of each sequence in a packed key.
        block_table: [B, max_blocks] integers, the blocks of each sequence in order.
        num_look_ahead: [B] integers in [1, N], valid rows of each sequence. Default: N.
        queries: "look_ahead": row n stands at position length - 1 + n and sees the whole prompt.
            "observation_window": the m valid rows are the prompt's last m tokens, each seeing keys up to itself.
        normalize_over: "prompt": softmax over prompt keys. "visible": a look-ahead row's softmax also counts the
            look-ahead keys it saw, which follow the prompt in `key`.
        scale: factor on the dot product. Default: D ** -0.5.
        softcap: c > 0: scores become c * tanh(score / c).
        window: w >= 1: the row at position p sees only keys after p - w (a sliding-window layer).
        lse: [B, N, Hq] fp32, natural log of each row's sum of exponentials, if attention already returned it: saves
            the normalisation pass, and decides what the weights are normalised over.
        key_scale: a key's value is what is stored times this: a number, or a tensor of 1 or Hkv elements.
        pool_kernel_size: odd number of positions averaged.
        pool_edge: "zero": always divide by `pool_kernel_size`; "valid": by the positions inside the prompt.
        pool_order: "before_max" as in the paper; "after_max": `state` takes unpooled weights, and
            `finalize_importance(pool_kernel_size=...)` pools them.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        workspace: uint8 scratch memory of at least `score_workspace_size(...)` bytes; without it the backend allocates.

    Returns:
        `state`, the same tensor.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came. On CPU tensors also for
            lengths or block ids beyond the buffers, and NaN or +Inf among a valid row's attention weights; `state` is
            then undefined. On CUDA tensors contents are never read on the host: what lies beyond a buffer counts as
            absent, and a row whose weights are not finite leaves NaN or Inf in `state`, which nothing later removes.
            With `lse`, a single weight that is not finite marks the positions around it, at most 32.
        BackendUnavailable: a backend asked for by name cannot run.

    Example:
        >>> state = spk.new_state(1, 8, 4096)
        >>> for query, key in zip(queries_per_layer, keys_per_layer):
        ...     spk.score_layer_(state, query, key, seq_lens=torch.tensor([4096]))
    """
    score_layers_(
        state,
        [query],
        [key],
        layout=layout,
        seq_lens=seq_lens,
        cu_seqlens=cu_seqlens,
        block_table=block_table,
        num_look_ahead=num_look_ahead,
        queries=queries,
        normalize_over=normalize_over,
        scale=scale,
        softcap=softcap,
        window=window,
        lse=None if lse is None else [lse],
        key_scale=None if key_scale is None else [key_scale],
        pool_kernel_size=pool_kernel_size,
        pool_edge=pool_edge,
        pool_order=pool_order,
        backend=backend,
        workspace=workspace,
        _names=("query", "key", "lse", "key_scale"),
    )
    return state


def score_layers_(
    state: Tensor,
    queries_per_layer: Sequence[Tensor],
    keys_per_layer: Sequence[Tensor],
    *,
    layout: str = "bhtd",
    seq_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    num_look_ahead: Tensor | None = None,
    queries: str = "look_ahead",
    normalize_over: str = "prompt",
    scale: float | None = None,
    softcap: float | None = None,
    window: int | Sequence[int | None] | None = None,
    lse: Sequence[Tensor] | None = None,
    key_scale: Sequence[float | Tensor] | None = None,
    pool_kernel_size: int = 13,
    pool_edge: str = "zero",
    pool_order: str = "before_max",
    backend: str = "auto",
    workspace: Tensor | None = None,
    _names: tuple[str, str, str, str] | None = None,
) -> Tensor:
    """`score_layer_` for a list of layers in one call; equal to calling it layer by layer, bit for bit.

    Args:
        queries_per_layer: one [B, N, Hq, D] tensor per layer; heads and D may differ between layers.
        keys_per_layer: one key tensor per layer, all of one `layout`.
        window: one for all layers, or one (or None) per layer.
        lse: one [B, N, Hq] tensor per layer.
        key_scale: one number or tensor per layer.

    All else, and what is raised, as in `score_layer_`.
    """
    _backends.check_name(backend)
    _check_options(layout, queries, normalize_over, scale, softcap, pool_kernel_size, pool_edge, pool_order)
    _check_state(state)
    for name, value in (("queries_per_layer", queries_per_layer), ("keys_per_layer", keys_per_layer)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name}: expected a list of tensors, got {type(value).__name__}")
    layers = len(queries_per_layer)
    if layers == 0:
        _checks.fail("queries_per_layer", "at least one layer", "an empty list")
    for name, per_layer in (("keys_per_layer", keys_per_layer), ("lse", lse), ("key_scale", key_scale)):
        if per_layer is not None and len(per_layer) != layers:
            _checks.fail(name, f"{layers} entries, one per layer", f"{len(per_layer)}")
    windows = list(window) if isinstance(window, Sequence) else [window] * layers
    if len(windows) != layers:
        _checks.fail("window", f"{layers} entries, one per layer", f"{len(windows)}")
    scales = []
    for i in range(layers):
        q_name, k_name, lse_name, scale_name = _names or (
            f"queries_per_layer[{i}]",
            f"keys_per_layer[{i}]",
            f"lse[{i}]",
            f"key_scale[{i}]",
        )
        query, key = queries_per_layer[i], keys_per_layer[i]
        _check_layer(q_name, query, k_name, key, state, layout)
        if query.shape[1] != queries_per_layer[0].shape[1]:
            _checks.fail(q_name, f"{queries_per_layer[0].shape[1]} rows, as the first layer has", query.shape[1])
        if windows[i] is not None:
            _checks.integer("window" if not isinstance(window, Sequence) else f"window[{i}]", windows[i], 1)
        if lse is not None:
            _checks.tensor(
                lse_name,
                lse[i],
                ndim=3,
                dtypes=(torch.float32,),
                device=state.device,
                sizes=query.shape[:3],
                what="[B, N, Hq]",
            )
        if key_scale is not None:
            scales.append(_key_scale(scale_name, key_scale[i], key, layout))
    _check_sequences(state, keys_per_layer[0], layout, seq_lens, cu_seqlens, block_table, num_look_ahead)
    if workspace is not None:
        _checks.tensor("workspace", workspace, ndim=1, dtypes=(torch.uint8,), device=state.device)
        if workspace.stride(0) != 1 or workspace.shape[0] == 0:
            _checks.fail("workspace", "a contiguous tensor that is not empty", f"shape {_checks.shape(workspace)}")
    ops.score_layers_(
        state,
        list(queries_per_layer),
        list(keys_per_layer),
        seq_lens,
        cu_seqlens,
        block_table,
        num_look_ahead,
        [0 if w is None else w for w in windows],
        [] if lse is None else list(lse),
        scales,
        workspace,
        layout,
        queries,
        normalize_over,
        None if scale is None else float(scale),
        None if softcap is None else float(softcap),
        pool_kernel_size,
        pool_edge,
        pool_order,
        backend,
    )
    return state


def _check_options(
    layout: str,
    queries: str,
    normalize_over: str,
    scale: float | None,
    softcap: float | None,
    pool_kernel_size: int,
    pool_edge: str,
    pool_order: str,
) -> None:
    _checks.choice("layout", layout, LAYOUTS)
    _checks.choice("queries", queries, QUERIES)
    _checks.choice("normalize_over", normalize_over, NORMALIZE_OVER)
    _checks.choice("pool_edge", pool_edge, POOL_EDGES)
    _checks.choice("pool_order", pool_order, POOL_ORDERS)
    _checks.odd("pool_kernel_size", pool_kernel_size)
    if scale is not None:
        _checks.number("scale", scale, fp32=True)
    if softcap is not None:
        _checks.number("softcap", softcap, above=0.0, fp32=True)


def _check_state(state: Tensor) -> None:
    _checks.tensor("state", state, ndim=3, dtypes=(torch.float32,), what="[B, N, T]")
    _checks.supported_device("state", state)
    for name, size in zip(("sequence", "row", "position"), state.shape):
        if size == 0:
            _checks.fail("state", f"at least one {name}", f"shape {_checks.shape(state)}")
    if state.shape[2] > 1 and state.stride(2) != 1:
        _checks.fail("state", "a contiguous last dimension", f"strides {tuple(state.stride())}")


def _check_layer(q_name: str, query: Tensor, k_name: str, key: Tensor, state: Tensor, layout: str) -> None:
    batch, rows, _ = state.shape
    _checks.tensor(
        q_name,
        query,
        ndim=4,
        dtypes=_checks.FLOATS,
        device=state.device,
        sizes=(batch, None if rows == 1 else rows, None, None),
        what="[B, N, Hq, D]",
    )
    dense = layout in ("bhtd", "bthd")
    head_dim = query.shape[3]
    sizes = (batch if dense else None, *[None] * (len(_axes_of(layout)) - 2), head_dim)
    _checks.tensor(
        k_name,
        key,
        ndim=len(sizes),
        dtypes=(*_checks.FLOATS, *_checks.FP8),
        device=state.device,
        sizes=sizes,
        what=KEY_SHAPES[layout],
    )
    if query.shape[1] == 0 or query.shape[2] == 0 or head_dim == 0:
        _checks.fail(q_name, "no empty dimension", f"shape {_checks.shape(query)}")
    if head_dim > MAX_HEAD_DIM:
        _checks.fail(q_name, f"head_dim at most {MAX_HEAD_DIM}", head_dim)
    if any(size == 0 for size in key.shape):
        _checks.fail(k_name, "no empty dimension", f"shape {_checks.shape(key)}")
    kv_heads = key.shape[head_axis(layout)]
    if query.shape[2] % kv_heads:
        _checks.fail(q_name, f"a number of heads that is a multiple of {k_name}'s {kv_heads}", query.shape[2])


def _axes_of(layout: str) -> list[str]:
    return KEY_SHAPES[layout].strip("[]").split(", ")


def _key_scale(name: str, value: float | Tensor, key: Tensor, layout: str) -> Tensor:
    if not isinstance(value, Tensor):
        _checks.number(name, value, fp32=True)
        return torch.full((1,), float(value), dtype=torch.float32, device=key.device)
    _checks.tensor(name, value, ndim=(0, 1), dtypes=(torch.float32,), device=key.device)
    kv_heads = key.shape[head_axis(layout)]
    if value.numel() not in (1, kv_heads):
        _checks.fail(name, f"1 or {kv_heads} elements, one per KV head", value.numel())
    return value.reshape(-1)


def _check_sequences(
    state: Tensor,
    key: Tensor,
    layout: str,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    block_table: Tensor | None,
    num_look_ahead: Tensor | None,
) -> None:
    batch, _, capacity = state.shape
    _checks.per_sequence("seq_lens", seq_lens, batch, state.device)
    _checks.per_sequence("num_look_ahead", num_look_ahead, batch, state.device)
    if (cu_seqlens is not None) != (layout == "packed"):
        wanted = "a tensor" if layout == "packed" else "None"
        _checks.fail("cu_seqlens", f"{wanted} with layout {layout!r}", type(cu_seqlens).__name__)
    if cu_seqlens is not None:
        _checks.per_sequence("cu_seqlens", cu_seqlens, batch + 1, state.device)
    paged = layout.startswith("paged")
    if (block_table is not None) != paged:
        wanted = "a tensor" if paged else "None"
        _checks.fail("block_table", f"{wanted} with layout {layout!r}", type(block_table).__name__)
    if block_table is not None:
        sizes = (batch, None)
        _checks.tensor(
            "block_table",
            block_table,
            ndim=2,
            dtypes=_checks.INTEGERS,
            device=state.device,
            sizes=sizes,
            what="[B, max_blocks]",
        )
        if seq_lens is None:
            _checks.fail("seq_lens", f"a tensor with layout {layout!r}", "None")
    if layout in ("bhtd", "bthd") and seq_lens is None and key.shape[token_axis(layout)] < capacity:
        _checks.fail("key", f"at least the state's {capacity} positions, or seq_lens", key.shape[token_axis(layout)])
