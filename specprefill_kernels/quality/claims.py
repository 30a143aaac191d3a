"""What a short evaluation has to show, with the statistics that make it a claim and not a hope."""

from __future__ import annotations

from specprefill_kernels.quality.summary import Summary

SMALL_LOSS = 0.10
LARGEST_LOSS = 0.25
LEAD_OVER_RANDOM = 0.2


def broken_claims(summary: Summary, task: str, keep_ratio: float) -> list[str]:
    """A sentence for each claim that the figures do not support; none when all do.

    Within the noise of the full prompt: the 95% interval of the paired difference kept - full reaches 0 or more, or its
    lower end is above -0.10. The first alone would reward few prompts, whose wide intervals reach 0 whatever happened;
    so the lower end must also be above -0.25: a large loss has to be ruled out, not just unseen.

    Far ahead of random: the lower end of the interval of kept - random is above 0.2.
    """
    kept = summary.row(task, "kept", keep_ratio)
    full, random = kept.to_full, kept.to_random
    if full is None or random is None:
        raise ValueError('methods: expected "full" and "random" beside "kept", got fewer')
    broken = []
    name = f"kept {keep_ratio:.0%}"
    interval = f"{full.estimate:+.2f} [{full.low:+.2f}, {full.high:+.2f}] over {kept.prompts} prompts"
    if not (full.high >= 0 or full.low > -SMALL_LOSS):
        broken.append(f"{name} is worse than the full prompt: {interval}.")
    elif full.low <= -LARGEST_LOSS:
        broken.append(f"{name} cannot be told from a loss of {LARGEST_LOSS} against the full prompt: {interval}.")
    if random.low <= LEAD_OVER_RANDOM:
        interval = f"{random.estimate:+.2f} [{random.low:+.2f}, {random.high:+.2f}]"
        broken.append(
            f"{name} is not far ahead of random chunks: {interval}, expected a lower end above {LEAD_OVER_RANDOM}."
        )
    return broken
