"""Gathering on the compiled CPU kernels."""

from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.gather.native import kv_arguments, new_packed, readable, token_arguments

unavailable = _native.unavailable


def gather_tokens(
    x: Tensor, indices: Tensor, num_kept: Tensor, cu_seqlens: Tensor | None, token_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    compiled, packed = _native.module(), new_packed(x, indices, cu_seqlens is not None, token_dim)
    indices, num_kept = readable(indices, num_kept)
    args = token_arguments(compiled, x, indices, num_kept, cu_seqlens, token_dim, packed)
    compiled.gather_tokens(args, _native.threads())
    return packed


def gather_kv(
    caches: tuple[Tensor, Tensor],
    outs: tuple[Tensor, Tensor],
    indices: Tensor,
    num_kept: Tensor,
    layout: str,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    out_block_table: Tensor | None,
) -> None:
    compiled = _native.module()
    indices, num_kept = readable(indices, num_kept)
    tables = (block_table, cu_seqlens, out_block_table)
    args = kv_arguments(compiled, caches, outs, indices, num_kept, layout, *tables)
    compiled.gather_kv(args, _native.threads())
