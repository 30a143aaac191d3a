"""The definition of gathering: pack the kept tokens of a batch, and compact a KV cache to them."""

import torch
from torch import Tensor

from specprefill_kernels import _checks
from specprefill_kernels.ops.score.options import head_axis, token_axis


def gather_tokens(
    x: Tensor, indices: Tensor, num_kept: Tensor, cu_seqlens: Tensor | None, token_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, width = indices.shape
    axis = token_dim - 1  # of the packed tokens in the result
    shape = [*x.shape[:axis], batch * width, *x.shape[axis + (1 if cu_seqlens is not None else 2) :]]
    values = torch.zeros(shape, dtype=x.dtype, device=x.device)
    position_ids = torch.zeros(batch * width, dtype=torch.int64, device=x.device)
    offsets = [0]
    starts, room = token_rooms(x, batch, cu_seqlens, token_dim)
    for b, positions in enumerate(kept_positions(indices, num_kept, room)):
        source = x.select(axis, b) if cu_seqlens is None else x
        at = slice(offsets[-1], offsets[-1] + len(positions))
        values.movedim(axis, 0)[at] = source.movedim(axis, 0)[starts[b] + positions]
        position_ids[at] = positions
        offsets.append(at.stop)
    return values, position_ids, torch.tensor(offsets, dtype=torch.int32, device=x.device)


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
    """Copy the kept tokens of each cache into its `out`, of the same layout. The rest of `out` is left as it is."""
    batch = indices.shape[0]
    tokens = token_axis(layout)
    starts, _ = kv_rooms(caches[0], batch, layout, block_table, cu_seqlens)
    tables = (block_table, cu_seqlens, out_block_table)
    all_positions = check_kv_contents(caches[0], outs[0], indices, num_kept, layout, *tables)
    packed_at = 0
    for b, positions in enumerate(all_positions):
        count = torch.arange(len(positions), device=indices.device)
        to_start = packed_at if layout == "packed" else 0
        source_at = slots(b, starts[b] + positions, caches[0].shape[tokens], block_table)
        target_at = slots(b, to_start + count, outs[0].shape[tokens], out_block_table)
        packed_at += len(positions)
        for cache, out in zip(caches, outs):
            source, target = by_slot(cache, layout, b), by_slot(out, layout, b)
            target[target_at] = source[source_at]


def check_token_contents(
    x: Tensor, indices: Tensor, num_kept: Tensor, cu_seqlens: Tensor | None, token_dim: int
) -> None:
    """What the definition refuses in the contents of CPU tensors."""
    kept_positions(indices, num_kept, token_rooms(x, len(indices), cu_seqlens, token_dim)[1])


def check_kv_contents(
    cache: Tensor,
    out: Tensor,
    indices: Tensor,
    num_kept: Tensor,
    layout: str,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    out_block_table: Tensor | None,
) -> list[Tensor]:
    """Kept positions of each sequence, and what the definition refuses in the contents of tensors is refused."""
    _, room = kv_rooms(cache, len(indices), layout, block_table, cu_seqlens)
    kept = kept_positions(indices, num_kept, room)
    token = token_axis(layout)
    if block_table is not None:
        for b, positions in enumerate(kept):
            check_source_blocks(block_table, b, positions // cache.shape[token], cache.shape[0])
    if out_block_table is not None:
        written = [len(positions) for positions in kept]
        _checks.block_table_values(
            out_block_table, written, out.shape[token], out.shape[0], name="out_block_table", exclusive=True
        )
    return kept


def kept_positions(indices: Tensor, num_kept: Tensor, room: list[int]) -> list[Tensor]:
    """Kept positions of each sequence as int64, checked against the tokens that are there."""
    counts = num_kept.tolist()
    kept = []
    for b, count in enumerate(counts):
        if not 0 <= count <= indices.shape[1]:
            _checks.fail(f"selection.num_kept[{b}]", f"a count in [0, {indices.shape[1]}]", count)
        positions = indices[b, :count].long()
        wrong = ((positions < 0) | (positions >= room[b])).nonzero()
        if len(wrong):
            at = int(wrong[0])
            _checks.fail(f"selection.indices[{b}, {at}]", f"a position in [0, {room[b]})", int(positions[at]))
        kept.append(positions)
    return kept


def token_rooms(x: Tensor, batch: int, cu_seqlens: Tensor | None, token_dim: int) -> tuple[list[int], list[int]]:
    """(first token, number of tokens) of each sequence in x."""
    if cu_seqlens is None:
        return [0] * batch, [x.shape[token_dim]] * batch
    offsets = _checks.cu_seqlens_values(cu_seqlens, x.shape[token_dim - 1])
    return offsets[:-1], [offsets[b + 1] - offsets[b] for b in range(batch)]


def kv_rooms(
    cache: Tensor, batch: int, layout: str, block_table: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[list[int], list[int]]:
    """(first token, number of tokens) of each sequence in a cache."""
    tokens = cache.shape[token_axis(layout)]
    if cu_seqlens is not None:
        offsets = _checks.cu_seqlens_values(cu_seqlens, tokens)
        return offsets[:-1], [offsets[b + 1] - offsets[b] for b in range(batch)]
    room = tokens * block_table.shape[1] if block_table is not None else tokens
    return [0] * batch, [room] * batch


def check_source_blocks(block_table: Tensor, b: int, blocks: Tensor, num_blocks: int) -> None:
    """Only the blocks of kept tokens are read, so only those entries must be ids."""
    ids = block_table[b][blocks]
    wrong = ((ids < 0) | (ids >= num_blocks)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        _checks.fail(f"block_table[{b}, {int(blocks[at])}]", f"a block id in [0, {num_blocks})", int(ids[at]))


def slots(b: int, positions: Tensor, block_size: int, block_table: Tensor | None) -> tuple[Tensor, ...]:
    """Where positions of sequence b lie: (token,) or (block, token within it)."""
    if block_table is None:
        return (positions,)
    return block_table[b].long()[positions // block_size], positions % block_size


def by_slot(cache: Tensor, layout: str, b: int) -> Tensor:
    """The cache as a view that `slots` indexes: [T, Hkv, D] or [num_blocks, block_size, Hkv, D]."""
    # fp8 has no indexing kernel on the CPU; a copy does not care what the bytes mean
    raw = cache.view(torch.uint8) if cache.dtype in _checks.FP8 else cache
    if layout.startswith("paged"):
        return raw if layout == "paged_nhd" else raw.transpose(1, 2)
    if layout == "packed":
        return raw
    return raw[b].movedim(head_axis(layout) - 1, 1)
