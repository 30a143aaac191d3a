"""What the session tests share: planned selections, runs from scratch to compare with, counts of computed tokens."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from loop_models import prompt
from transformers import LogitsProcessor

from specprefill_kernels.loop.budgets import spans_of_mask
from specprefill_kernels.loop.prefill import BaseRun
from specprefill_kernels.loop.results import PromptSelection


class Logits(LogitsProcessor):
    """Keeps the logits of every step."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append(scores[0].clone())
        return scores


class Accident(RuntimeError):
    pass


def fail(*_):
    raise Accident


def positions(*spans):
    return torch.cat([torch.arange(0), *(torch.arange(start, end) for start, end in spans)])


def follow(ids, result, new=20, seed=5):
    """The conversation after `result`: the prompt, the answer, and `new` other tokens."""
    answer = torch.tensor([list(result.tokens)])
    return torch.cat([torch.as_tensor(ids).reshape(1, -1), answer, prompt(new, seed=seed)], dim=1)


def planned(seq_len, kept, *, importance=None, protected=()):
    """The selection of a prompt of `seq_len` tokens, as a selector would give it."""
    mask = torch.zeros(seq_len, dtype=torch.bool)
    mask[kept] = True
    return PromptSelection(
        input_ids=torch.zeros(seq_len, dtype=torch.int64),
        importance=importance,
        kept_indices=kept,
        spans=spans_of_mask(mask),
        mode="dense" if bool(mask.all()) else "sparse",
        reason="planned",
        seconds={},
        backend="none",
        protected=protected,
    )


def plan_next(sp, *spans, **options):
    """Make `sp`'s next selection keep these spans, whatever the prompt."""

    def choose(prompt, protection, clock, *, memory=None):
        return planned(prompt.input_ids.shape[1], positions(*spans), **options)

    sp.choose = choose


@torch.no_grad()
def from_scratch(sp, ids, kept, count):
    """(tokens, logits of each step) of a greedy run that reads the tokens at `kept` and nothing else."""
    ids = torch.as_tensor(ids).reshape(1, -1)
    run = BaseRun(sp.base, ids.shape[1], sparse=True)
    logits = [run.prefill(ids[:, kept], kept)[0]]
    while len(logits) < count:
        logits.append(run.step(logits[-1].argmax().reshape(1, 1))[0])
    return [int(step.argmax()) for step in logits], torch.stack(logits)


def assert_as_from_scratch(session, ids, count=4, **options):
    """Answer `ids` in the session, check it against a run from scratch with the tokens it kept; returns the result."""
    watch = Logits()
    result = session.generate(ids, count, logits_processor=[watch], **options)
    tokens, logits = from_scratch(session.loop, ids, result.selection.kept_indices, len(result.tokens))
    assert list(result.tokens) == tokens
    # Another order of the same sums: 1e-5 of the largest logit.
    torch.testing.assert_close(torch.stack(watch.steps), logits, atol=1e-5 * float(logits.abs().max()), rtol=0)
    return result


@contextmanager
def counted(model):
    """A list that gets the number of tokens of each forward."""
    calls = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[-1]))
    try:
        yield calls
    finally:
        hook.remove()
