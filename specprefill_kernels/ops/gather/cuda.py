"""Gathering on the CUDA kernels (csrc/gather): one launch for tokens, one for keys and values together."""

from torch import Tensor

from specprefill_kernels import _cuda
from specprefill_kernels.ops.gather.native import kv_arguments, new_packed, readable, token_arguments
from specprefill_kernels.ops.gather.reference import check_kv_contents, check_token_contents

unavailable = _cuda.unavailable
DEVICE_TYPE = _cuda.DEVICE_TYPE


def gather_tokens(
    x: Tensor, indices: Tensor, num_kept: Tensor, cu_seqlens: Tensor | None, token_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    if _cuda.checks_values():
        check_token_contents(x, indices, num_kept, cu_seqlens, token_dim)
    compiled, packed = _cuda.module(), new_packed(x, indices, cu_seqlens is not None, token_dim)
    indices, num_kept = readable(indices, num_kept)
    args = token_arguments(compiled, x, indices, num_kept, cu_seqlens, token_dim, packed)
    _cuda.call(compiled.gather_tokens_cuda, args, on=x)
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
    tables = (block_table, cu_seqlens, out_block_table)
    if _cuda.checks_values():
        check_kv_contents(caches[0], outs[0], indices, num_kept, layout, *tables)
    compiled = _cuda.module()
    indices, num_kept = readable(indices, num_kept)
    args = kv_arguments(compiled, caches, outs, indices, num_kept, layout, *tables)
    _cuda.call(compiled.gather_kv_cuda, args, on=caches[0])
