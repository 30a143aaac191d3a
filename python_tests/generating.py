"""Shared by the tests of an enabled `model.generate`: tiny models, and what the ordinary one gives."""

from __future__ import annotations

import torch
from loop_models import build, prompt
from transformers import LogitsProcessor, StoppingCriteria, set_seed

NEW = 6


def base_model():
    model = build("llama", seed=7)
    model.generation_config.eos_token_id = 2
    return model


def ordinary(model, *args, **options):
    """What the model's class gives, enabled or not."""
    set_seed(0)
    return type(model).generate(model, *args, **options)


def now(model, *args, **options):
    set_seed(0)
    return model.generate(*args, **options)


def sequences_of(output):
    return getattr(output, "sequences", output)


class Favour(LogitsProcessor):
    """Makes one token likelier, in place, as some processors do."""

    def __init__(self, token):
        self.token = token
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        scores[:, self.token] += 3
        return scores


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length
        self.scores = []

    def __call__(self, input_ids, scores, **_):
        self.scores.append(scores)
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


def left_padded(*lengths, pad=0):
    """Prompts of these lengths in one batch, and each alone."""
    rows = [prompt(length, seed=length)[0] for length in lengths]
    longest = max(lengths)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}, [row[None] for row in rows]
