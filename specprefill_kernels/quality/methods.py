"""Which prompt tokens each method lets the base model read, all of them with equally many.

- full: the whole prompt, by an ordinary dense prefill.
- kept: what the loop selects under its configuration.
- random: random chunks of 32 tokens (the paper's), or of the configuration's size where that is larger: smaller ones
  would cut every sentence to pieces, and lose to any selection for that reason alone.
- last: the end of the prompt.
- first_last: its beginning and its end, half each.

What "kept" is FORCED to have, every baseline has too: protected tokens (with protect="template" the system prompt, the
role markers and the end of the question), `sink` and `tail`, and the last token's chunk. Otherwise random chunks would
fail because the question or the answer's opening marker is missing, which says nothing about the choice of evidence.
The forced tokens count towards the budget of each method alike, and the rest of exactly the same number of tokens is
what a method chooses by its own rule. So the last random chunk is cut short where a whole one would be too much.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels.config import SpecPrefillConfig

RANDOM_CHUNK = 32

BASELINES = ("random", "last", "first_last")
METHODS = ("full", "kept", *BASELINES)
TITLES = {
    "full": "full prompt",
    "kept": "kept (speculative)",
    "random": "random chunks",
    "last": "last tokens",
    "first_last": "first + last tokens",
}


def forced_tokens(selection: Any, config: SpecPrefillConfig) -> Tensor:
    """[T] bool: the tokens that this selection has whatever the importance.

    Args:
        selection: a `PromptSelection` made under `config`.
    """
    length, chunk = selection.prompt_tokens, config.chunk_size
    forced = torch.zeros(length, dtype=torch.bool)
    for start, end in getattr(selection, "protected", ()):
        forced[start:end] = True
    # Whole chunks, as select_chunks keeps them.
    forced[: -(-config.sink // chunk) * chunk] = True
    forced[(length - max(config.tail, 1)) // chunk * chunk :] = True
    kept = torch.zeros_like(forced)
    kept[selection.kept_indices.cpu()] = True
    return forced & kept


def random_chunk(config: SpecPrefillConfig) -> int:
    """Tokens of a chunk of the random baseline."""
    return max(config.chunk_size, RANDOM_CHUNK)


def baseline(method: str, forced: Tensor, count: int, chunk_size: int, seed: str) -> Tensor:
    """[count] int64, the ascending positions that a baseline reads.

    Args:
        method: one of `BASELINES`.
        forced: [T] bool, tokens that are read in any case.
        count: tokens to read, the forced ones included.
        chunk_size: of the grid that "random" draws from.
        seed: what names the draw of "random"; other methods draw nothing.

    Raises:
        ValueError: an unknown method, or a count below the number of forced tokens or above T.
    """
    least, most = int(forced.sum()), forced.shape[0]
    if not least <= count <= most:
        raise ValueError(f"count: expected between {least} forced tokens and {most} in all, got {count}")
    free = (~forced).nonzero()[:, 0]
    wanted = count - least
    if method == "last":
        chosen = free[free.shape[0] - wanted :]
    elif method == "first_last":
        first = (wanted + 1) // 2
        chosen = torch.cat([free[:first], free[free.shape[0] - (wanted - first) :]])
    elif method == "random":
        order = list(range(-(-most // chunk_size)))
        random.Random(seed).shuffle(order)
        rank = torch.empty(len(order), dtype=torch.int64)
        rank[torch.tensor(order)] = torch.arange(len(order))
        # By the chunk's rank in the draw, and within a chunk from its first free token on.
        by_rank = torch.argsort(rank[free // chunk_size], stable=True)
        chosen = free[by_rank[:wanted]]
    else:
        raise ValueError(f"method: expected one of {BASELINES}, got {method!r}")
    read = forced.clone()
    read[chosen] = True
    return read.nonzero()[:, 0]
