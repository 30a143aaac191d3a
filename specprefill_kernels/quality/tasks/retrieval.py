"""Retrieval after RULER (Hsieh et al., COLM 2024, arXiv 2404.06654): needles in a haystack and chains of assignments.

Depths, keys and values are drawn by the seed, so no model knows them and no position is favoured.
"""

from __future__ import annotations

import random
import string
from typing import Any

from specprefill_kernels.quality.tasks.haystack import Filler, Sources, documents
from specprefill_kernels.quality.tasks.sample import Draft, Sample, different, draw, fit, words

KEYS = 4  # needles of niah_multikey
VALUES = 3  # of niah_multivalue
CHAINS, CHAIN = 2, 3  # of variable_tracking: chains, and variables in each

_KINDS = words("amber blue copper crimson golden green ivory orange purple red scarlet silver violet white yellow")
_THINGS = words(
    "anchor barn bridge cabin castle cellar chapel cottage door garage garden gate harbour hotel kiosk library "
    "lighthouse locker mill museum office palace pavilion safe shed stable station temple theatre tower tunnel vault "
    "warehouse"
)
_INTRODUCTION = "Read the text and answer the question that follows it.\n\n"


def niah_single(seed: int, tokens: int, tokenizer: Any, sources: Sources | None = None) -> Sample:
    """One needle."""
    return _codes("niah_single", 1, seed, tokens, tokenizer, sources)


def niah_multikey(seed: int, tokens: int, tokenizer: Any, sources: Sources | None = None) -> Sample:
    """Several needles that differ in key and value; one is asked for, and it alone is evidence."""
    return _codes("niah_multikey", KEYS, seed, tokens, tokenizer, sources)


def niah_multivalue(seed: int, tokens: int, tokenizer: Any, sources: Sources | None = None) -> Sample:
    """Several values of one key, each in a needle of its own; all are asked for."""
    rng = draw("niah_multivalue", seed, tokens)
    (key,), values = _keys(rng, 1), _codes_of(rng, VALUES)
    needles = [(f"One of the secret codes of the {key} is {value}.", True) for value in values]
    question = (
        f"Question: What are the {VALUES} secret codes of the {key}? Answer with the {VALUES} codes only, separated by "
        "commas."
    )
    return _sample("niah_multivalue", seed, tokens, tokenizer, sources, rng, needles, question, values, 40)


def variable_tracking(seed: int, tokens: int, tokenizer: Any, sources: Sources | None = None) -> Sample:
    """Chains of assignments, in their order in the text; asked for is every variable of one chain."""
    rng = draw("variable_tracking", seed, tokens)
    names = different(lambda: "".join(rng.choices(string.ascii_uppercase, k=5)), CHAINS * CHAIN)
    values = _codes_of(rng, CHAINS)
    chains = [names[i * CHAIN : (i + 1) * CHAIN] for i in range(CHAINS)]
    needles = []
    # The chains are woven into one another, each in its own order.
    order = [i for i in range(CHAINS) for _ in range(CHAIN)]
    rng.shuffle(order)
    placed = [0] * CHAINS
    for chain in order:
        step = placed[chain]
        source = values[chain] if step == 0 else f"VAR {chains[chain][step - 1]}"
        needles.append((f"VAR {chains[chain][step]} = {source}.", chain == 0))
        placed[chain] += 1
    question = (
        f"Question: Find all variables that are assigned the value {values[0]} in the text, directly or through "
        f"another variable. There are {CHAIN} of them. Answer with their names only, separated by commas."
    )
    return _sample(
        "variable_tracking", seed, tokens, tokenizer, sources, rng, needles, question, chains[0], 40, values[:1]
    )


def _codes(task: str, count: int, seed: int, tokens: int, tokenizer: Any, sources: Sources | None) -> Sample:
    rng = draw(task, seed, tokens)
    keys, values = _keys(rng, count), _codes_of(rng, count)
    asked = rng.randrange(count)
    needles = [
        (f"The secret code of the {key} is {value}.", index == asked)
        for index, (key, value) in enumerate(zip(keys, values))
    ]
    question = f"Question: What is the secret code of the {keys[asked]}? Answer with the code only."
    return _sample(task, seed, tokens, tokenizer, sources, rng, needles, question, [values[asked]], 16)


def _sample(
    task: str,
    seed: int,
    tokens: int,
    tokenizer: Any,
    sources: Sources | None,
    rng: random.Random,
    needles: list[tuple[str, bool]],
    question: str,
    answers: list[str],
    max_new_tokens: int,
    asked: list[str] | None = None,
) -> Sample:
    """`needles` as (sentence, whether it is evidence), put at random depths in the order in which they come."""
    depths = sorted(rng.random() for _ in needles)
    filler = Filler(documents(rng, sources), avoid=[*answers, *(asked or [])])

    def build(amount: int) -> Draft:
        draft = Draft(_INTRODUCTION)
        sentences = filler.words(amount)
        places = [int(depth * (len(sentences) + 1)) for depth in depths]
        for index in range(len(sentences) + 1):
            for place, (sentence, evidence) in zip(places, needles):
                if place == index:
                    draft.add(sentence + " ", evidence=evidence)
            if index < len(sentences):
                draft.add(sentences[index])
        return draft.break_paragraph().add(question)

    draft, count = fit(build, tokens, tokenizer)
    return Sample(
        task=task,
        seed=seed,
        prompt=draft.text,
        answers=tuple(answers),
        evidence=tuple(draft.evidence),
        metric="contains_all",
        max_new_tokens=max_new_tokens,
        context_tokens=tokens,
        prompt_tokens=count,
    )


def _keys(rng: random.Random, count: int) -> list[str]:
    """Keys that share no word."""
    return [f"{kind} {thing}" for kind, thing in zip(rng.sample(_KINDS, count), rng.sample(_THINGS, count))]


def _codes_of(rng: random.Random, count: int) -> list[str]:
    return different(lambda: str(rng.randrange(10_000, 100_000)), count)
