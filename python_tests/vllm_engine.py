"""Real vLLM engines with the plugin, in this process, and the answers that they must give.

The plugin comes in through its entry point, as everywhere. In place of the speculator a request may bring its own
selection, so that any can be tested; what decides about requests, and everything behind the selection, is the plugin's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from specprefill_kernels import models
from specprefill_kernels.integrations.vllm.selection import Outcome
from specprefill_kernels.integrations.vllm.settings import DTYPE, SPECULATOR
from specprefill_kernels.integrations.vllm.worker import tracked
from specprefill_kernels.loop.prefill import BaseRun

MODEL = "smollm2-135m"
BLOCK = 32  # the smallest that vLLM's attention for processors takes
CONTEXT = 1024
ENVIRONMENT = {
    SPECULATOR: MODEL,
    DTYPE: "float32",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
COMMON = {"dtype": "float32", "enforce_eager": True, "max_model_len": CONTEXT, "block_size": BLOCK, "max_logprobs": 5}
# No prefix caching, prompts in pieces of 48 tokens, and a cache that holds one request of full length and no more.
TIGHT = {**COMMON, "enable_prefix_caching": False, "max_num_batched_tokens": 48, "max_num_seqs": 8}
TIGHT |= {"num_gpu_blocks_override": CONTEXT // BLOCK + 2}
# Prefix caching, prompts in one piece.
CACHED = {**COMMON, "enable_prefix_caching": True, "max_num_batched_tokens": 1024, "num_gpu_blocks_override": 256}

Spans = Sequence[tuple[int, int]]


class Chosen:
    """In the selector's place: selects what the request's `protect_spans` say.

    Attributes:
        asked: the prompts that came.
    """

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def submit(self, ids: Sequence[int], text: str | None, options: Any, salt: str | None = None) -> Future[Outcome]:
        self.asked.append(list(ids))
        future: Future[Outcome] = Future()
        future.set_result(Outcome("sparse", "chosen by a test", len(ids), kept(options.spans), options.spans))
        return future


@functools.cache
def _engine(options: tuple[tuple[str, Any], ...]) -> Any:
    """One engine per configuration and test run: they take memory, and seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
            patch.setenv(name, value)
        from vllm import LLM

        return LLM(model=str(models.ensure(MODEL)), **dict(options))


def engine(options: dict[str, Any]) -> Any:
    """The `vllm.LLM` of a configuration, in this process."""
    return _engine(tuple(sorted(options.items())))


@contextmanager
def chosen(llm: Any) -> Iterator[Chosen]:
    """Within the block requests bring their own selection."""
    front = llm.llm_engine.specprefill
    with pytest.MonkeyPatch.context() as patch:
        selector = Chosen()
        patch.setattr(front, "_selector", selector)
        yield selector


def params(spans: Spans | None = None, tokens: int = 16, **options: Any) -> Any:
    """Greedy, with log probabilities; sparse with these kept spans, or an ordinary request."""
    from vllm import SamplingParams

    own = {} if spans is None else {"specprefill": True, "protect_spans": list(itertools.chain(*spans))}
    extra = {**own, **options.pop("extra_args", {})}
    given = {"temperature": 0.0, "logprobs": 0, "ignore_eos": True, **options}
    return SamplingParams(max_tokens=tokens, extra_args=extra or None, **given)


def run(llm: Any, *requests: tuple[Sequence[int], Any]) -> list[Any]:
    """The finished outputs of (prompt ids, params), all in one batch as far as the engine allows."""
    prompts = [{"prompt_token_ids": list(ids)} for ids, _ in requests]
    outputs: list[Any] = llm.generate(prompts, [given for _, given in requests], use_tqdm=False)
    return outputs


def runner(llm: Any) -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def left_behind(llm: Any) -> list[str]:
    """What an idle engine still holds, by name; an empty list is right."""
    held = {
        "requests of the output side": llm.llm_engine.output_processor.request_states,
        "requests of the scheduler": scheduler(llm).requests,
    }
    # Workers hear of finished requests with the next step that there is.
    finished = scheduler(llm).finished_req_ids
    held["positions in the worker"] = {name for name in tracked(runner(llm)) if name not in finished}
    return [name for name, kept_there in held.items() if kept_there]


# ---- prompts ----


@functools.cache
def text_ids(skip: int, count: int) -> tuple[int, ...]:
    """`count` tokens of a real text, from token `skip` on."""
    from transformers import AutoTokenizer

    text = (Path(__file__).parents[1] / "LICENSE").read_text()
    ids = AutoTokenizer.from_pretrained(models.ensure(MODEL))(text)["input_ids"]
    assert len(ids) >= skip + count, f"the text has {len(ids)} tokens"
    return tuple(ids[skip : skip + count])


def kept(spans: Spans) -> int:
    return sum(end - start for start, end in spans)


def kept_ids(ids: Sequence[int], spans: Spans) -> list[int]:
    return [token for start, end in spans for token in ids[start:end]]


# ---- what must come out ----


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and the log probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def distance(self, other: Answer) -> float:
        """Largest difference of log probabilities up to where the tokens part; infinite where they part."""
        if self.tokens != other.tokens:
            return float("inf")
        return max(abs(mine - its) for mine, its in zip(self.logprobs, other.logprobs))


def answer_of(output: Any) -> Answer:
    (completion,) = output.outputs
    tokens = tuple(completion.token_ids)
    return Answer(tokens, tuple(row[token].logprob for token, row in zip(tokens, completion.logprobs)))


@functools.cache
def _model() -> Any:
    model, _ = models.load(MODEL, dtype=torch.float32, device="cpu")
    return model


def loop_answer(ids: Sequence[int], spans: Spans, tokens: int = 16, **wrong: Any) -> Answer:
    """What the loop answers when it prefills the kept tokens at their positions and decodes from position T on.

    Args:
        wrong: `positions`, of the kept tokens, and `decode_from` in their places: for what must not come out.
    """
    return _loop_answer(tuple(ids), tuple(spans), tokens, **wrong)


@functools.cache
@torch.inference_mode()
def _loop_answer(
    ids: tuple[int, ...],
    spans: tuple[tuple[int, int], ...],
    tokens: int,
    positions: tuple[int, ...] | None = None,
    decode_from: int | None = None,
) -> Answer:
    if positions is None:
        positions = tuple(itertools.chain.from_iterable(range(start, end) for start, end in spans))
    base = BaseRun(_model(), len(ids) if decode_from is None else decode_from, sparse=True)
    logits = base.prefill(torch.tensor([kept_ids(ids, spans)]), torch.tensor(positions))
    answer, logprobs = [], []
    for _ in range(tokens):
        token = int(logits.argmax())
        answer.append(token)
        logprobs.append(float(logits.log_softmax(-1)[0, token]))
        logits = base.step(torch.tensor([[token]]))
    return Answer(tuple(answer), tuple(logprobs))
