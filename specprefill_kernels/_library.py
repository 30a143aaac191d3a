"""The ops as PyTorch sees them: schemas, dispatch to a backend, and shapes for torch.compile.

`define` and `impl` are used rather than `torch.library.custom_op`: a call costs a third. No op has a derivative: the
Autograd key falls through, so results never require grad.

The ops trust what they are given: shapes and options are checked by the public functions, which are the way in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels import _backends, _checks, _native
from specprefill_kernels._ops import add_op_namespace_prefix
from specprefill_kernels.ops.score.options import ScoreOptions, Sequences, token_axis
from specprefill_kernels.ops.select.budget import Budget
from specprefill_kernels.ops.sparse_attention.blocks import BlockBudget, row_blocks

SCHEMAS = (
    "score_layers_(Tensor(a!) state, Tensor[] queries_per_layer, Tensor[] keys_per_layer, Tensor? seq_lens, "
    "Tensor? cu_seqlens, Tensor? block_table, Tensor? num_look_ahead, int[] window, Tensor[] lse, Tensor[] key_scale, "
    "Tensor(b!)? workspace, str layout, str queries, str normalize_over, float? scale, float? softcap, "
    "int pool_kernel_size, str pool_edge, str pool_order, str backend) -> ()",
    "finalize_importance(Tensor state, Tensor? seq_lens, Tensor? num_look_ahead, str reduce, int pool_kernel_size, "
    "str pool_edge, str backend) -> Tensor",
    "select_chunks(Tensor importance, Tensor? seq_lens, Tensor? protect, float? keep_ratio, SymInt? keep_tokens, "
    "float? keep_mass, int chunk_size, str rounding, int sink, int tail, str backend) -> (Tensor, Tensor, Tensor)",
    "gather_tokens(Tensor x, Tensor indices, Tensor num_kept, Tensor? cu_seqlens, int token_dim, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    "gather_kv(Tensor key_cache, Tensor value_cache, Tensor indices, Tensor num_kept, str layout, "
    "Tensor? block_table, Tensor? cu_seqlens, str backend) -> (Tensor, Tensor)",
    "gather_kv_out_(Tensor(a!) out_key, Tensor(b!) out_value, Tensor key_cache, Tensor value_cache, Tensor indices, "
    "Tensor num_kept, str layout, Tensor? block_table, Tensor? cu_seqlens, Tensor? out_block_table, str backend) -> ()",
    "select_tokens(Tensor state, Tensor x, Tensor? seq_lens, Tensor? num_look_ahead, Tensor? protect, str reduce, "
    "float? keep_ratio, SymInt? keep_tokens, float? keep_mass, int chunk_size, str rounding, int sink, int tail, "
    "int token_dim, int pool_kernel_size, str pool_edge, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "select_attention_blocks(Tensor query, Tensor key, int block_size, int keep_blocks, int sink_blocks, "
    "int local_blocks, str backend) -> (Tensor, Tensor)",
    "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor counts, int block_size, "
    "float? scale, str backend) -> Tensor",
)

_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")


_INT32 = torch.iinfo(torch.int32)


def _int32(x: Tensor | None, name: str = "") -> Tensor | None:
    """Lengths and tables as the kernels read them: int32 and contiguous. They are small; nothing else is copied.

    With a `name`, every entry counts, and one of a CPU tensor that does not fit is an error.
    """
    if x is None:
        return None
    if x.dtype != torch.int32:
        if name and x.device.type == "cpu":
            for i, value in enumerate(x.tolist()):
                if not _INT32.min <= value <= _INT32.max:
                    _checks.fail(f"{name}[{i}]", "an integer of 32 bits", value)
        x = x.clamp(_INT32.min, _INT32.max)  # what does not fit must stay out of range, not wrap into it
    return x.to(torch.int32).contiguous()


def _table(x: Tensor | None) -> Tensor | None:
    """A block table as the kernels read it: int32, rows of any stride. Engines hand over slices of a larger one."""
    return x if x is not None and x.dtype == torch.int32 and x.stride(1) == 1 else _int32(x)


def _written(*outputs: Tensor) -> None:
    """Kernels write behind autograd's back; whoever saved one of these for a backward pass must be told."""
    for output in outputs:
        if not output.is_inference():
            torch.autograd.graph.increment_version(output)


def _score_layers_(
    state: Tensor,
    queries: list[Tensor],
    keys: list[Tensor],
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    block_table: Tensor | None,
    num_look_ahead: Tensor | None,
    window: list[int],
    lse: list[Tensor],
    key_scale: list[Tensor],
    workspace: Tensor | None,
    layout: str,
    queries_kind: str,
    normalize_over: str,
    scale: float | None,
    softcap: float | None,
    pool_kernel_size: int,
    pool_edge: str,
    pool_order: str,
    backend: str,
) -> None:
    options = ScoreOptions(
        layout, queries_kind, normalize_over, scale, softcap, pool_kernel_size, pool_edge, pool_order
    )
    sequences = Sequences(
        _int32(seq_lens, "seq_lens"),
        _int32(cu_seqlens, "cu_seqlens"),
        _table(block_table),
        _int32(num_look_ahead, "num_look_ahead"),
    )
    _checks.writable("state", state)
    read = [
        (f"{name} of layer {i}", tensor)
        for name, tensors in (("query", queries), ("key", keys), ("lse", lse), ("key_scale", key_scale))
        for i, tensor in enumerate(tensors)
    ]
    _checks.disjoint("state", state, read)
    if workspace is not None:
        _checks.disjoint("workspace", workspace, [("state", state), *read])
    run = _backends.implementation("score_layers", "score_layers_", backend, state.device.type)
    run(state, queries, keys, sequences, window, lse, key_scale, workspace, options)
    _written(state)


def _finalize_importance(
    state: Tensor,
    seq_lens: Tensor | None,
    num_look_ahead: Tensor | None,
    reduce: str,
    pool_kernel_size: int,
    pool_edge: str,
    backend: str,
) -> Tensor:
    run = _backends.implementation("finalize_importance", "finalize_importance", backend, state.device.type)
    importance: Tensor = run(
        state,
        _int32(seq_lens, "seq_lens"),
        _int32(num_look_ahead, "num_look_ahead"),
        reduce,
        pool_kernel_size,
        pool_edge,
    )
    return importance


def _select_chunks(
    importance: Tensor, seq_lens: Tensor | None, protect: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *budget, backend = rest
    run = _backends.implementation("select_chunks", "select_chunks", backend, importance.device.type)
    selected: tuple[Tensor, Tensor, Tensor] = run(importance, _int32(seq_lens, "seq_lens"), protect, Budget(*budget))
    return selected


def _gather_tokens(
    x: Tensor, indices: Tensor, num_kept: Tensor, cu_seqlens: Tensor | None, token_dim: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    run = _backends.implementation("gather_tokens", "gather_tokens", backend, x.device.type)
    packed: tuple[Tensor, Tensor, Tensor] = run(x, indices, num_kept, _int32(cu_seqlens, "cu_seqlens"), token_dim)
    return packed


def _gather_kv(
    key_cache: Tensor,
    value_cache: Tensor,
    indices: Tensor,
    num_kept: Tensor,
    layout: str,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    outs = [_native.prefer_huge_pages(_new_cache(cache, indices, layout)).zero_() for cache in (key_cache, value_cache)]
    out_block_table = None
    if block_table is not None:
        batch = indices.shape[0]
        blocks = torch.arange(outs[0].shape[0], dtype=torch.int32, device=indices.device)
        out_block_table = blocks.view(batch, -1)
    tables = (block_table, cu_seqlens, out_block_table)
    _gather_kv_out_(outs[0], outs[1], key_cache, value_cache, indices, num_kept, layout, *tables, backend)
    return outs[0], outs[1]


def _new_cache(cache: Tensor, indices: Tensor, layout: str) -> Tensor:
    """A cache in `layout` with room for the selection's K tokens per sequence."""
    batch, width = indices.shape
    shape = list(cache.shape)
    if layout.startswith("paged"):
        shape[0] = batch * (-(-width // shape[token_axis(layout)]))
    else:
        shape[token_axis(layout)] = batch * width if layout == "packed" else width
    return torch.empty(shape, dtype=cache.dtype, device=cache.device)


def _gather_kv_out_(
    out_key: Tensor,
    out_value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    indices: Tensor,
    num_kept: Tensor,
    layout: str,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    out_block_table: Tensor | None,
    backend: str,
) -> None:
    caches = [("key_cache", key_cache), ("value_cache", value_cache)]
    for i, out in enumerate((out_key, out_value)):
        _checks.writable(f"out[{i}]", out)
        _checks.disjoint(f"out[{i}]", out, caches)
    _checks.disjoint("out[1]", out_value, [("out[0]", out_key)])
    run = _backends.implementation("gather_kv", "gather_kv", backend, key_cache.device.type)
    tables = (_table(block_table), _int32(cu_seqlens, "cu_seqlens"), _table(out_block_table))
    run((key_cache, value_cache), (out_key, out_value), indices, num_kept, layout, *tables)
    _written(out_key, out_value)


def _select_tokens(
    state: Tensor,
    x: Tensor,
    seq_lens: Tensor | None,
    num_look_ahead: Tensor | None,
    protect: Tensor | None,
    reduce: str,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *budget, token_dim, pool_kernel_size, pool_edge, backend = rest
    run = _backends.implementation("select_tokens", "select_tokens", backend, state.device.type)
    lengths, rows = _int32(seq_lens, "seq_lens"), _int32(num_look_ahead, "num_look_ahead")
    selected: tuple[Tensor, ...] = run(
        state, x, lengths, rows, protect, reduce, pool_kernel_size, pool_edge, Budget(*budget), token_dim
    )
    return selected


def _select_attention_blocks(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *budget, backend = rest
    run = _backends.implementation("select_attention_blocks", "select_attention_blocks", backend, query.device.type)
    selected: tuple[Tensor, Tensor] = run(query, key, BlockBudget(*budget))
    return selected


def _block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_size: int,
    scale: float | None,
    backend: str,
) -> Tensor:
    run = _backends.implementation("block_sparse_attention", "block_sparse_attention", backend, query.device.type)
    factor = query.shape[3] ** -0.5 if scale is None else scale
    output: Tensor = run(query, key, value, indices.contiguous(), counts.contiguous(), block_size, factor)
    return output


# What follows says shapes and dtypes alone, for torch.compile and meta tensors.


def _fake_finalize(state: Tensor, *_: Any) -> Tensor:
    return state.new_empty(state.shape[0], state.shape[2])


def _fake_select(importance: Tensor, _: Any, protect: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, max_len = importance.shape
    width = Budget(*rest[:-1]).width(max_len, protect is not None)
    return (
        importance.new_empty(batch, width, dtype=torch.int32),
        importance.new_empty(batch, dtype=torch.int32),
        importance.new_empty(batch, dtype=torch.bool),
    )


def _fake_gather_tokens(
    x: Tensor, indices: Tensor, _: Any, cu_seqlens: Tensor | None, token_dim: int, *__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    axis = token_dim - 1
    rest = x.shape[axis + (1 if cu_seqlens is not None else 2) :]
    tokens = indices.shape[0] * indices.shape[1]
    return (
        x.new_empty([*x.shape[:axis], tokens, *rest]),
        x.new_empty(tokens, dtype=torch.int64),
        x.new_empty(indices.shape[0] + 1, dtype=torch.int32),
    )


def _fake_gather_kv(
    key_cache: Tensor, value_cache: Tensor, indices: Tensor, _: Any, layout: str, *__: Any
) -> tuple[Tensor, Tensor]:
    return _new_cache(key_cache, indices, layout), _new_cache(value_cache, indices, layout)


def _fake_select_tokens(
    state: Tensor, x: Tensor, seq_lens: Any, rows: Any, protect: Tensor | None, reduce: str, *rest: Any
) -> tuple[Tensor, ...]:
    *budget, token_dim, _, _, _ = rest
    importance = _fake_finalize(state)
    indices, num_kept, overflow = _fake_select(importance, seq_lens, protect, *budget, "")
    packed = _fake_gather_tokens(x, indices, num_kept, None, token_dim)
    return importance, indices, num_kept, overflow, *packed


def _fake_select_attention_blocks(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    budget = BlockBudget(*rest[:-1])
    lists = (query.shape[0], query.shape[1], row_blocks(query.shape[2], key.shape[2], budget.block_size)[1])
    indices = query.new_empty(*lists, budget.width(key.shape[2]), dtype=torch.int32)
    return indices, query.new_empty(lists, dtype=torch.int32)


def _fake_block_sparse_attention(query: Tensor, *_: Any) -> Tensor:
    batch, heads, rows, dim = query.shape
    return query.new_empty(batch, rows, heads, dim).transpose(1, 2)


def _nothing(*_: Any) -> None:
    return None


_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "score_layers_": (_score_layers_, _nothing),
    "finalize_importance": (_finalize_importance, _fake_finalize),
    "select_chunks": (_select_chunks, _fake_select),
    "gather_tokens": (_gather_tokens, _fake_gather_tokens),
    "gather_kv": (_gather_kv, _fake_gather_kv),
    "gather_kv_out_": (_gather_kv_out_, _nothing),
    "select_tokens": (_select_tokens, _fake_select_tokens),
    "select_attention_blocks": (_select_attention_blocks, _fake_select_attention_blocks),
    "block_sparse_attention": (_block_sparse_attention, _fake_block_sparse_attention),
}

for _schema in SCHEMAS:
    _name = _schema.split("(", 1)[0]
    _run, _fake = _OPS[_name]
    _library.define(_schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, torch.no_grad()(_run), _key)
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(add_op_namespace_prefix(_name), _fake, lib=_library)
