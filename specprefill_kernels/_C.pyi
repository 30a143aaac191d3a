"""The compiled kernels over the C interface (csrc/include/specprefill.h). Addresses, strides and sizes are integers.

Classes are the interface's argument structs. They hold addresses, not tensors.
"""

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

class Score:
    def __init__(
        self,
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
        /,
    ) -> None: ...

class Finalize:
    def __init__(
        self,
        state: int,
        strides: _Ints,
        sizes: _Ints,
        seq_lens: int,
        num_look_ahead: int,
        reduce: int,
        pool_edge: int,
        pool_kernel_size: int,
        importance: int,
        /,
    ) -> None: ...

class Select:
    def __init__(
        self,
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
        /,
    ) -> None: ...

class GatherTokens:
    def __init__(
        self,
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
        /,
    ) -> None: ...

class Cache:
    def __init__(self, data: int, item_bytes: int, shape: _Ints, strides: _Ints, /) -> None: ...

class GatherKv:
    def __init__(
        self,
        source: Cache,
        target: Cache,
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
        /,
    ) -> None: ...

def version() -> str: ...
def instruction_set() -> str: ...
def prefer_huge_pages(data: int, bytes: int, /) -> None: ...
def exp2(x: Sequence[float], /) -> list[float]: ...
def score_workspace_size(
    look_ahead: int, group: int, head_dim: int, max_len: int, pool_kernel_size: int, num_threads: int, /
) -> int: ...
def score_layers(
    args: Score, layers: Sequence[Layer], workspace: int, workspace_bytes: int, num_threads: int, /
) -> None: ...
def finalize(args: Finalize, num_threads: int, /) -> None: ...
def select(args: Select, num_threads: int, /) -> None: ...
def gather_tokens(args: GatherTokens, num_threads: int, /) -> None: ...
def select_tokens(finalize: Finalize, select: Select, gather: GatherTokens, num_threads: int, /) -> None: ...
def gather_kv(caches: Sequence[GatherKv], num_threads: int, /) -> None: ...

# Only in builds with CUDA. `stream` is a cudaStream_t; a workspace's address may be 0.

def cuda_unavailable() -> str: ...
def cuda_architectures() -> str: ...
def cuda_no_code_for(architectures: str, major: int, minor: int, /) -> str: ...
def score_workspace_size_cuda(
    batch: int,
    look_ahead: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_len: int,
    layers: int,
    pool_kernel_size: int,
    /,
) -> int: ...
def score_layers_cuda(
    args: Score, layers: Sequence[Layer], workspace: int, workspace_bytes: int, stream: int, /
) -> None: ...
def finalize_cuda(args: Finalize, stream: int, /) -> None: ...
def select_workspace_size_cuda(args: Select, /) -> int: ...
def select_cuda(args: Select, workspace: int, workspace_bytes: int, stream: int, /) -> None: ...
def gather_tokens_cuda(args: GatherTokens, stream: int, /) -> None: ...
def gather_kv_cuda(caches: Sequence[GatherKv], stream: int, /) -> None: ...
def select_tokens_cuda(
    finalize: Finalize,
    select: Select,
    gather: GatherTokens,
    workspace: int,
    workspace_bytes: int,
    stream: int,
    /,
) -> None: ...
