"""The definition of block-sparse attention, in plain PyTorch: what every other backend is held against.

Memory O(T): query blocks one by one, each over the blocks that it attends to. Time O(T * keep_blocks * block_size), and
O((T / block_size)^2) scores of blocks, sorted.
"""

import torch
from torch import Tensor

from specprefill_kernels.ops.sparse_attention.blocks import BlockBudget, check_lists, row_blocks

# Scores of query blocks against key blocks that are ranked at once.
_SCORES_AT_ONCE = 1 << 22


def select_attention_blocks(query: Tensor, key: Tensor, budget: BlockBudget) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    size, total = budget.block_size, key.shape[2]
    first, count = row_blocks(rows, total, size)
    means = _means(query, size, first * size - (total - rows)).unflatten(1, (key.shape[1], -1))
    # The last query block's own key block may be short, but only earlier ones, which are whole, are ever ranked.
    key_means = _means(key, size, 0)[:, :, None]
    width = budget.width(total)
    indices = torch.full((batch, heads, count, width), -1, dtype=torch.int32, device=query.device)
    own = torch.arange(first, first + count, device=query.device)
    wanted = torch.clamp(own, max=budget.keep_blocks - 1)
    step = max(1, _SCORES_AT_ONCE // (batch * heads * key_means.shape[3]))
    for start in range(0, count, step):
        part = slice(start, start + step)
        scores = (means[..., part, :] @ key_means.transpose(-1, -2)).flatten(1, 2)  # [B, Hq, step, key blocks]
        indices[:, :, part] = _largest(scores, own[part], wanted[part], width, budget)
    return indices, wanted.to(torch.int32).expand(batch, heads, count).contiguous()


def _means(x: Tensor, size: int, lead: int) -> Tensor:
    """[B, H, blocks, D] fp32: sums over each block, divided by its full size; `lead` <= 0 rows are missing before x.

    A short block's mean is off by a factor, which changes no order.
    """
    end = x.shape[2]
    bounds = [0, *range(size + lead, end, size), end]
    parts = [x[:, :, bounds[0] : bounds[1]].float().sum(2, keepdim=True)]
    whole = (bounds[-1] - bounds[1]) // size * size + bounds[1]
    if whole > bounds[1]:
        parts.append(x[:, :, bounds[1] : whole].unflatten(2, (-1, size)).float().sum(3))
    if end > whole:
        parts.append(x[:, :, whole:].float().sum(2, keepdim=True))
    return torch.cat(parts, 2) / size


def _largest(scores: Tensor, own: Tensor, wanted: Tensor, width: int, budget: BlockBudget) -> Tensor:
    """[..., rows, width] int32: the fixed blocks and those of the largest scores, ascending, then -1."""
    block = torch.arange(scores.shape[-1], device=scores.device)
    own = own[:, None]
    fixed = (block < budget.sink_blocks) | (block > own - budget.local_blocks)
    kind = torch.where(block >= own, 2, torch.where(fixed, 0, 1)).expand(scores.shape)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, kind.gather(-1, order).sort(dim=-1, stable=True).indices)[..., :width]
    absent = torch.arange(order.shape[-1], device=scores.device) >= wanted[:, None]
    chosen = order.masked_fill(absent, scores.shape[-1]).sort(dim=-1).values
    return chosen.masked_fill(absent, -1).to(torch.int32)


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, block_size: int, scale: float
) -> Tensor:
    batch, heads, rows, dim = query.shape
    total, group = key.shape[2], heads // key.shape[1]
    start = total - rows
    first, count = row_blocks(rows, total, block_size)
    if query.device.type == "cpu":
        check_lists(indices, counts, first)
    within = torch.arange(block_size, device=query.device)
    output = query.new_empty(batch, rows, heads, dim).transpose(1, 2)
    for row in range(count):
        block = (first + row) * block_size
        low, high = max(block, start), min(block + block_size, total)
        own = torch.arange(block, high, device=query.device)
        later = own > torch.arange(low, high, device=query.device)[:, None]
        for b in range(batch):
            for h in range(heads):
                earlier = indices[b, h, row]
                listed = torch.arange(len(earlier), device=query.device) < counts[b, h, row]
                listed = listed & (earlier >= 0) & (earlier < first + row)
                seen = torch.cat([(earlier[listed, None].long() * block_size + within).flatten(), own])
                q = query[b, h, low - start : high - start].float()
                logits = q @ key[b, h // group, seen].float().T * scale
                logits[:, -len(own) :].masked_fill_(later, -torch.inf)
                output[b, h, low - start : high - start] = (logits.softmax(-1) @ value[b, h // group, seen].float()).to(
                    query.dtype
                )
    return output
