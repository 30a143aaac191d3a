"""`model.generate` itself, token by token: how a base runs that cannot prefill sparsely (state space, ALiBi, ...).

Such models have caches and masks of their own, so the dense fallback leaves everything to Transformers.
"""

from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class _Streamer(BaseStreamer):
    """Puts each generated token into a queue. The first thing that `generate` streams is the prompt."""

    def __init__(self, queue: SimpleQueue[Any]) -> None:
        self._queue = queue
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            for token in value.reshape(-1).tolist():
                self._queue.put(token)
        self._prompt_seen = True

    def end(self) -> None:
        pass


def generate_plainly(
    model: Any, input_ids: Tensor, *, max_new_tokens: int, do_sample: bool, tokenizer: Any = None, **options: Any
) -> Iterator[int]:
    """Yield the tokens of `model.generate` as they come. It runs in a thread, and stops if the caller does."""
    options.setdefault("attention_mask", torch.ones_like(input_ids))
    queue: SimpleQueue[Any] = SimpleQueue()
    abandoned = Event()

    def given_up(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.full((ids.shape[0],), abandoned.is_set(), dtype=torch.bool, device=ids.device)

    def work() -> None:
        try:
            criteria = StoppingCriteriaList([*(options.pop("stopping_criteria", None) or []), given_up])
            model.generate(
                input_ids,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                tokenizer=tokenizer,
                stopping_criteria=criteria,
                streamer=_Streamer(queue),
                **options,
            )
            queue.put(None)
        except BaseException as error:  # goes to the caller, who waits for it
            queue.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item = queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        abandoned.set()
        thread.join()
