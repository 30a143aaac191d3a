"""What the speculator's block-sparse attention changes: the selection, the evidence in it, and the prefill's seconds.

    python -m bench.attention_overlap [--tokens 2048,4096] [--blocks 64x8,64x16] [--prompts 6] [--out FILE]

One row for each prompt length, budget of blocks and keep ratio, beside dense attention on the same prompts: the Jaccard
overlap of the kept tokens (shared by both selections, of those in either), the part of the evidence kept by each, the
correlation of the two importances' ranks by chunk, and the seconds of the speculator's prefill. The base never runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.environment import environment
from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.quality.runner import evidence_tokens, with_ratio
from specprefill_kernels.quality.tasks import Sample, make

Blocks = tuple[int, int]  # tokens of a block, blocks kept


@dataclass(frozen=True)
class Row:
    """Means over prompts. `sparse_prompts`: those that were read sparse; the others are short, and were read dense."""

    tokens: int
    block_size: int
    keep_blocks: int
    keep_ratio: float
    prompts: int
    sparse_prompts: int
    jaccard: float
    jaccard_least: float
    evidence_dense: float
    evidence_sparse: float
    chunk_rank_correlation: float
    dense_seconds: float
    sparse_seconds: float


@dataclass(frozen=True)
class Reading:
    """One prompt read with one kind of attention: kept tokens by keep ratio."""

    attention: str
    importance: Tensor
    kept: dict[float, set[int]]
    evidence: dict[float, float]
    seconds: float


def read(loop: SpecPrefill, sample: Sample, ratios: Sequence[float], blocks: Blocks | None) -> Reading:
    """Speculate once and choose for each keep ratio. `blocks` None: dense."""
    changes: dict[str, Any] = {"speculator_attention": "dense"}
    if blocks is not None:
        changes = {
            "speculator_attention": "sparse",
            "attention_block_size": blocks[0],
            "attention_keep_blocks": blocks[1],
        }
    config = loop.config.replace(**changes)
    changed = SpecPrefill(loop.base, loop.base, config, tokenizer=loop.tokenizer)
    clock = StageClock(loop.base.device)
    chat = getattr(loop.tokenizer, "chat_template", None) is not None
    prompt, protection = changed.read(sample.messages if chat else sample.prompt, None, None, clock)
    wanted = evidence_tokens(prompt, sample, loop.tokenizer)
    speculation = changed.selector.speculate(prompt, clock)
    kept, evidence = {}, {}
    for ratio in ratios:
        chosen = changed.selector.choose(prompt, protection, speculation, clock, config=with_ratio(config, ratio))
        kept[ratio] = set(chosen.kept_indices.tolist())
        evidence[ratio] = float(wanted[chosen.kept_indices.cpu()].sum()) / max(1, int(wanted.sum()))
    seconds = clock.seconds["speculator_prefill"]
    return Reading(speculation.attention[0], speculation.importance.cpu(), kept, evidence, seconds)


def rank_correlation(a: Tensor, b: Tensor, chunk: int) -> float:
    """Spearman's, of the chunks' mean importances."""

    def ranks(x: Tensor) -> Tensor:
        means = x[: len(x) // chunk * chunk].view(-1, chunk).mean(1)
        return means.argsort().argsort().double()

    both = torch.stack([ranks(a), ranks(b)])
    return float(torch.corrcoef(both)[0, 1])


def rows(
    pairs: Sequence[tuple[Reading, Reading]], tokens: int, blocks: Blocks, ratios: Iterable[float], chunk: int
) -> Iterator[Row]:
    """One row for each keep ratio, from (dense, sparse) readings of the same prompts."""
    mean = statistics.fmean
    for ratio in ratios:
        overlaps = [len(d.kept[ratio] & s.kept[ratio]) / len(d.kept[ratio] | s.kept[ratio]) for d, s in pairs]
        yield Row(
            tokens=tokens,
            block_size=blocks[0],
            keep_blocks=blocks[1],
            keep_ratio=ratio,
            prompts=len(pairs),
            sparse_prompts=sum(s.attention == "sparse" for _, s in pairs),
            jaccard=mean(overlaps),
            jaccard_least=min(overlaps),
            evidence_dense=mean(d.evidence[ratio] for d, _ in pairs),
            evidence_sparse=mean(s.evidence[ratio] for _, s in pairs),
            chunk_rank_correlation=mean(rank_correlation(d.importance, s.importance, chunk) for d, s in pairs),
            dense_seconds=statistics.median(d.seconds for d, _ in pairs),
            sparse_seconds=statistics.median(s.seconds for _, s in pairs),
        )


def markdown(found: Sequence[Row]) -> str:
    lines = [
        "| tokens | blocks | read | kept | overlap | evidence kept, dense | sparse | prefill s, dense | sparse |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        reach = min(1.0, row.keep_blocks * row.block_size / row.tokens)
        lines.append(
            f"| {row.tokens:,} | {row.keep_blocks} x {row.block_size} | {reach:.0%} | {row.keep_ratio:.0%} "
            f"| {row.jaccard:.2f} | {row.evidence_dense:.2f} | {row.evidence_sparse:.2f} "
            f"| {row.dense_seconds:.2f} | {row.sparse_seconds:.2f} |"
        )
    return "\n".join(lines)


def measure(
    loop: SpecPrefill,
    tasks: Sequence[str],
    lengths: Sequence[int],
    budgets: Sequence[Blocks],
    ratios: Sequence[float],
    prompts: int,
) -> Iterator[list[Row]]:
    """The rows of one prompt length after the other; says on stderr how far it is."""
    for tokens in lengths:
        pairs: dict[Blocks, list[tuple[Reading, Reading]]] = {blocks: [] for blocks in budgets}
        for index in range(prompts):
            sample = make(tasks[index % len(tasks)], index // len(tasks), tokens, loop.tokenizer)
            dense = read(loop, sample, ratios, None)
            for blocks in budgets:
                pairs[blocks].append((dense, read(loop, sample, ratios, blocks)))
            print(f"{tokens} tokens: {index + 1} of {prompts} prompts", file=sys.stderr, flush=True)
        chunk = loop.config.chunk_size
        yield [row for blocks in budgets for row in rows(pairs[blocks], tokens, blocks, ratios, chunk)]


def parse_blocks(text: str) -> Blocks:
    size, _, count = text.partition("x")
    return int(size), int(count)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="what specprefill_kernels.models.load takes")
    parser.add_argument("--tasks", default="niah_multikey,niah_multivalue,variable_tracking")
    parser.add_argument("--tokens", default="2048,4096")
    parser.add_argument("--blocks", default="64x8,64x16,128x8", help="SIZExCOUNT, comma-separated")
    parser.add_argument("--keep-ratio", default="0.1,0.3")
    parser.add_argument("--prompts", type=int, default=6, help="for each length, spread over the tasks")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows and the environment to this JSON file")
    chosen = parser.parse_args(argv)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    from specprefill_kernels import models

    model, tokenizer = models.load(chosen.model, device=chosen.device)
    loop = SpecPrefill(model, model, SpecPrefillConfig.preset(chosen.preset), tokenizer=tokenizer)
    result = {"environment": environment(chosen.device), "model": chosen.model, "preset": chosen.preset}
    found: list[Row] = []
    for some in measure(
        loop,
        chosen.tasks.split(","),
        [int(n) for n in chosen.tokens.split(",")],
        [parse_blocks(text) for text in chosen.blocks.split(",")],
        [float(ratio) for ratio in chosen.keep_ratio.split(",")],
        chosen.prompts,
    ):
        found += some
        if chosen.out:
            chosen.out.write_text(json.dumps({**result, "rows": [asdict(row) for row in found]}, indent=1) + "\n")
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
