"""Attention of a part of the prompt behind its earlier parts, so that a long prompt can be read chunk by chunk.

Transformers would give such a forward a mask of [chunk, prompt], in fp32 for eager attention, and repeat every key for
each query head. Here SDPA and eager attention get their masks in stretches of rows, over the keys that these rows see
and no others: memory is bounded whatever the prompt's length, and a sliding window costs what it spans. Flash attention
aligns a short query with the end of the keys by itself, and flex attention has masks of its own: both are left alone.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specprefill_kernels.loop.attention import Attention

# What runs without Transformers' own masks here.
IMPLEMENTATIONS = ("sdpa", "eager")

# Entries of a mask (SDPA) or of the attention weights of all heads (eager) in one stretch of rows: 84 MB with the fp32
# copy that SDPA makes of a mask. With 16K keys a stretch of 256 rows or more is as fast as one of 1024.
MAX_ENTRIES = 1 << 24

# What plain SDPA computes nothing of: attention sinks, biases and soft caps stay with the model's own function.
PLAIN = {"scaling", "sliding_window", "dropout", "position_ids", "use_cache", "cache_position"}


def chunk_lengths(
    total: int, chunk: int | None, last: int, *, start: int = 0, block_size: int | None = None
) -> list[int]:
    """Lengths of the forwards that read `total` tokens: at most `chunk` each, nearly equal, in order.

    The last is no shorter than `last` where there are so many tokens, even if `chunk` is.

    Args:
        start: position of the first token.
        block_size: forwards begin at multiples of it, where `chunk` is no smaller.
    """
    if chunk is None or total <= chunk:
        return [total]
    if block_size is not None and chunk >= block_size:
        return _whole_blocks(total, chunk // block_size, last, start, block_size)
    final = min(total, max(last, total // -(-total // chunk)))
    rest = total - final
    count = -(-rest // chunk)
    return [rest // count + (i < rest % count) for i in range(count)] + [final]


def _whole_blocks(total: int, chunk_blocks: int, last: int, start: int, block_size: int) -> list[int]:
    end = start + total
    first, blocks = start // block_size, -(-end // block_size) - start // block_size
    count = -(-blocks // chunk_blocks)
    cuts = [(first + blocks * i // count) * block_size for i in range(1, count)]
    while cuts and end - cuts[-1] < last:
        cuts.append(cuts.pop() - block_size)
        if cuts[-1] <= (cuts[-2] if len(cuts) > 1 else start):
            cuts.pop()
    bounds = [start, *cuts, end]
    return [high - low for low, high in pairwise(bounds)]


def chunk_attention(
    ordinary: Attention, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention of the last rows of a sequence over all of it, windowed where `kwargs` name a sliding window.

    Args:
        ordinary: the model's SDPA or eager attention function.
        query: [B, Hq, n, D], at the last n of the keys' positions.
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, D].

    Returns:
        [B, n, Hq, D] and no weights.
    """
    heads, rows, total = query.shape[1], query.shape[2], key.shape[2]
    window: int | None = kwargs.get("sliding_window")
    if window is not None and window >= total:
        window = None
    eager = ordinary is not ALL_ATTENTION_FUNCTIONS["sdpa"]
    plain = not eager and not any(kwargs[name] is not None for name in kwargs.keys() - PLAIN) and not module.training
    if plain and window is None and _flash_takes(query):
        return lower_right_attention(query, key, value, kwargs.get("scaling")), None
    if plain and window is None and rows == total:
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=kwargs.get("scaling"), enable_gqa=heads != key.shape[1]
        )
        return output.transpose(1, 2).contiguous(), None
    span = total if window is None else min(total, rows + window - 1)
    step = max(1, MAX_ENTRIES // (span * (heads if eager else 1)))
    pieces = []
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        first = 0 if window is None else max(0, total - rows + start - window + 1)
        seen = slice(first, total - rows + stop)
        part, keys, values = query[:, :, start:stop], key[:, :, seen], value[:, :, seen]
        mask = _mask(stop - start, keys.shape[2], window, key.device)
        if plain and query.device.type == "cpu":  # where it reads shared key heads in place, under a mask too
            output = scaled_dot_product_attention(
                part, keys, values, attn_mask=mask, scale=kwargs.get("scaling"), enable_gqa=heads != key.shape[1]
            ).transpose(1, 2)
        else:
            if mask.dtype == torch.bool and eager:
                blocked = torch.finfo(query.dtype).min
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, blocked)
            output = ordinary(module, part, keys, values, mask, **kwargs)[0]
        pieces.append(output)
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=1), None


def lower_right_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[B, n, Hq, D]: causal attention aligned at the end of the keys, without a mask where flash attention runs."""
    output: Tensor = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=causal_lower_right(query.shape[2], key.shape[2]),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()


def _flash_takes(query: Tensor) -> bool:
    return query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256


def _mask(rows: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[1, 1, rows, keys] bool, True where the key is seen; the last row stands at the last key."""
    mask = torch.ones(rows, keys, dtype=torch.bool, device=device).tril_(keys - rows)
    if window is not None:
        mask = mask.triu_(keys - rows - window + 1)
    return mask[None, None]
