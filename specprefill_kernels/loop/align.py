"""Carries importance from the speculator's tokens to the base model's, where the two tokenizers differ.

Both tokenizers read the same text and report the character span of every token, so characters are the common ground:

    importance_base[b] = max over the speculator tokens that share a character with base token b

The largest and not the mean: a base token that holds one important character has to be kept whole, and a long
unimportant neighbour must not water it down. Kept tokens then err on the safe side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Offsets = torch.Tensor | Sequence[tuple[int, int]] | Sequence[Sequence[int]]

_NOTHING = float("-inf")


def project_importance(importance_spec: torch.Tensor, spec_offsets: Offsets, base_offsets: Offsets) -> torch.Tensor:
    """Importance of each base token, from the speculator tokens it overlaps in the text.

    Args:
        importance_spec: ``[Ts]`` floating point, one number per speculator token.
        spec_offsets: ``Ts`` pairs ``(start, end)`` of character positions, end exclusive, in any order; spans may
            overlap, as those of byte-level tokens that share one multi-byte character do.
        base_offsets: ``Tb`` such pairs in the same text.

    Returns:
        ``[Tb]``, dtype and device of ``importance_spec``. A base token that overlaps no speculator token gets 0. An
        empty span (special tokens; byte pieces of some tokenizers) is a point: it takes the largest importance of the
        speculator tokens that contain or touch that point, and an empty speculator span reaches only empty base spans
        at its point.

    Raises:
        ValueError: an argument has the wrong shape, or a span ends before it starts or starts below 0.

    Work and memory are linear in the number of characters; there is no loop over tokens.

    Example:
        >>> project_importance(torch.tensor([0.1, 0.9]), [(0, 4), (4, 8)], [(0, 3), (3, 5), (5, 8)])
        tensor([0.1000, 0.9000, 0.9000])
    """
    if not isinstance(importance_spec, torch.Tensor):
        raise TypeError(f"importance_spec: expected a tensor, got {type(importance_spec).__name__}")
    if importance_spec.dim() != 1 or not importance_spec.is_floating_point():
        raise ValueError(
            f"importance_spec: expected a floating-point tensor [Ts], got {importance_spec.dtype} "
            f"of shape {list(importance_spec.shape)}"
        )
    device = importance_spec.device
    spec_start, spec_end = _as_spans(spec_offsets, "spec_offsets", device)
    base_start, base_end = _as_spans(base_offsets, "base_offsets", device)
    if spec_start.numel() != importance_spec.numel():
        raise ValueError(
            f"spec_offsets: expected one span for each of the {importance_spec.numel()} speculator tokens, "
            f"got {spec_start.numel()}"
        )

    num_chars = max([int(end.max()) for end in (spec_end, base_end) if end.numel()], default=0)

    # Speculator tokens -> characters.
    token, char = _characters(spec_start, spec_end)
    per_char = importance_spec.new_full((num_chars,), _NOTHING)
    per_char.scatter_reduce_(0, char, importance_spec[token], "amax")

    # Characters -> base tokens.
    token, char = _characters(base_start, base_end)
    result = importance_spec.new_full((base_start.numel(),), _NOTHING)
    result.scatter_reduce_(0, token, per_char[char], "amax")

    # Points: slot p + 1 of `beside` is character p, so a point sees the characters left and right of it.
    spec_empty, base_empty = spec_start == spec_end, base_start == base_end
    per_point = importance_spec.new_full((num_chars + 1,), _NOTHING)
    per_point.scatter_reduce_(0, spec_start[spec_empty], importance_spec[spec_empty], "amax")
    beside = torch.nn.functional.pad(per_char, (1, 1), value=_NOTHING)
    per_point = torch.maximum(per_point, torch.maximum(beside[:-1], beside[1:]))
    result = torch.where(base_empty, per_point[base_start], result)

    return result.masked_fill(result == _NOTHING, 0.0)


def _as_spans(offsets: Offsets, name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(offsets, torch.Tensor):
        spans = offsets.to(device=device, dtype=torch.int64)
    else:
        try:
            spans = torch.tensor([tuple(pair) for pair in offsets], dtype=torch.int64, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: expected pairs (start, end) of integers, got {error}") from None
    if spans.numel() == 0:
        spans = spans.reshape(0, 2)
    if spans.dim() != 2 or spans.shape[1] != 2:
        raise ValueError(f"{name}: expected pairs (start, end), got shape {list(spans.shape)}")
    start, end = spans[:, 0], spans[:, 1]
    bad = (start < 0) | (end < start)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}: expected 0 <= start <= end, got ({int(start[index])}, {int(end[index])}) at token {index}"
        )
    return start, end


def _characters(start: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every (token, character) pair in which the token's span holds the character."""
    length = end - start
    token = torch.repeat_interleave(torch.arange(start.numel(), device=start.device), length)
    first = torch.cumsum(length, 0) - length
    char = torch.arange(token.numel(), device=start.device) - first[token] + start[token]
    return token, char
