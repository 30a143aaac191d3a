"""Prompts with known answers and known evidence, made on the spot: nothing to download, no model knows the answers.

>>> from specprefill_kernels.quality.tasks import make
>>> sample = make("niah_single", 0, 1024, tokenizer)  # doctest: +SKIP
>>> sample.evidence_texts()  # doctest: +SKIP
('The secret code of the ivory tunnel is 29574.',)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from specprefill_kernels.quality.tasks.code import code_completion
from specprefill_kernels.quality.tasks.haystack import Sources
from specprefill_kernels.quality.tasks.reading import few_shot, multi_doc_qa
from specprefill_kernels.quality.tasks.retrieval import niah_multikey, niah_multivalue, niah_single, variable_tracking
from specprefill_kernels.quality.tasks.sample import Sample

__all__ = ["TASKS", "Sample", "make"]

TASKS: Mapping[str, Callable[..., Sample]] = MappingProxyType(
    {
        task.__name__: task
        for task in (
            niah_single,
            niah_multikey,
            niah_multivalue,
            variable_tracking,
            few_shot,
            multi_doc_qa,
            code_completion,
        )
    }
)


def make(task: str, seed: int, tokens: int, tokenizer: Any, sources: Sources | None = None) -> Sample:
    """One sample, the same for the same arguments (and the same Python, whose texts fill it).

    Args:
        task: a name in `TASKS`.
        seed: draws text, keys, values and depths.
        tokens: length of the prompt; never exceeded, and missed by at most 2% or one example or line.
        tokenizer: counts the tokens; called with a text and `add_special_tokens=False`.
        sources: text files to fill the prompt with (code files for "code_completion"); None: what Python carries.

    Raises:
        ValueError: an unknown task, a length that holds no question, or too little text in the sources.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {tuple(TASKS)}, got {task!r}")
    for name, value, least in (("seed", seed, 0), ("tokens", tokens, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
    return TASKS[task](seed, tokens, tokenizer, sources)
