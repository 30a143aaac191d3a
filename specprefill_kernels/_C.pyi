"""The compiled kernels over the C interface (csrc/include/specprefill.h). Addresses, strides and sizes are integers."""

from collections.abc import Sequence

_Ints = Sequence[int]

class Layer:
    def __init__(
        self,
        query: int,
        query_dtype: int,
        query_strides: _Ints,
        key: int,
        key_dtype: int,
        key_rows: int,
        key_tokens: int,
        key_strides: _Ints,
        key_scale: int,
        key_scale_stride: int,
        lse: int,
        lse_strides: _Ints,
        heads: _Ints,
        window: int,
        scale: float,
        /,
    ) -> None: ...

class Cache:
    def __init__(self, data: int, item_bytes: int, shape: _Ints, strides: _Ints, /) -> None: ...

def version() -> str: ...
def instruction_set() -> str: ...
def score_workspace_size(
    look_ahead: int, group: int, head_dim: int, max_len: int, pool_kernel_size: int, num_threads: int, /
) -> int: ...
def score_layers(
    state: int,
    state_strides: _Ints,
    state_rows: int,
    sizes: _Ints,
    layout: int,
    seq_lens: int,
    cu_seqlens: int,
    block_table: int,
    block_table_shape: _Ints,
    num_look_ahead: int,
    queries: int,
    normalize_over: int,
    pool_edge: int,
    pool_kernel_size: int,
    softcap: float,
    layers: Sequence[Layer],
    workspace: int,
    workspace_bytes: int,
    num_threads: int,
    /,
) -> None: ...
def finalize(
    state: int,
    strides: _Ints,
    sizes: _Ints,
    seq_lens: int,
    num_look_ahead: int,
    reduce: int,
    pool_edge: int,
    pool_kernel_size: int,
    importance: int,
    num_threads: int,
    /,
) -> None: ...
def select(
    importance: int,
    strides: _Ints,
    sizes: _Ints,
    seq_lens: int,
    protect: int,
    protect_strides: _Ints,
    budget: int,
    keep: float,
    chunk_size: int,
    rounding: int,
    sink: int,
    tail: int,
    indices: int,
    width: int,
    num_kept: int,
    overflow: int,
    num_threads: int,
    /,
) -> None: ...
def gather_tokens(
    x: int,
    item_bytes: int,
    sizes: _Ints,
    strides: _Ints,
    outer_sizes: _Ints,
    outer_strides: _Ints,
    inner_sizes: _Ints,
    inner_strides: _Ints,
    cu_seqlens: int,
    indices: int,
    indices_stride: int,
    width: int,
    num_kept: int,
    values: int,
    position_ids: int,
    offsets: int,
    num_threads: int,
    /,
) -> None: ...
def gather_kv(
    caches: Sequence[tuple[Cache, Cache]],
    layout: int,
    batch: int,
    cu_seqlens: int,
    block_table: int,
    block_table_shape: _Ints,
    target_block_table: int,
    target_block_table_shape: _Ints,
    indices: int,
    indices_stride: int,
    width: int,
    num_kept: int,
    num_threads: int,
    /,
) -> None: ...
def exp2(x: Sequence[float], /) -> list[float]: ...
