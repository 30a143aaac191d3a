"""In the processes that run the model: pruned requests' positions go to the model, everything else counts indices.

vLLM has two model runners. Both write index-based positions into one buffer, compute from it where in the KV cache each
token goes, build the attention's metadata, and hand the same buffer to the model. The shifts are added last: after
`_preprocess` (V1), after the model state's `prepare_inputs` (V2). The buffer stays the same one, so CUDA graphs read
the right positions; nothing waits for the GPU. The second one's sampler reads the buffer too, where it counts tokens
(`min_tokens`): it gets indices back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from specprefill_kernels.integrations.vllm.positions import Positions, from_arguments


def install() -> None:
    """Wrap both model runners of this process, and make workers answer `specprefill_status`."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, "specprefill_status"):
        return
    WorkerBase.specprefill_status = _status
    _install_v1(RunnerV1)
    try:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    except ImportError:  # needs Triton's driver
        return
    _install_v2(RunnerV2)


def _status(worker: Any) -> str | None:
    runner = getattr(worker, "model_runner", None)
    kind = type(runner)
    wrapped = getattr(kind, "of_specprefill", ())
    # A subclass may have a method of its own in place of one of these.
    if not wrapped or any(getattr(kind, method.__name__) is not method for method in wrapped):
        return f"the model runner {kind.__module__}.{kind.__qualname__} is not known"
    if getattr(runner, "uses_mrope", False) or getattr(runner, "uses_xdrope_dim", 0):
        return "positions of more than one dimension"
    state = type(getattr(runner, "model_state", None))  # of V2 alone
    if state.__name__ not in ("NoneType", "DefaultModelState"):
        return f"the model state {state.__module__}.{state.__qualname__} is not known"
    return _cache_problem(runner)


def _cache_problem(runner: Any) -> str | None:
    """Configurations call their windows by many names; the KV cache that was made for them tells for sure."""
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, RSWASpec, SlidingWindowSpec

    known = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)
    for group in runner.kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        for one in getattr(spec, "kv_cache_specs", {"": spec}).values():
            if not isinstance(one, known) or isinstance(one, RSWASpec):
                return f"a KV cache of another kind than full attention ({type(one).__name__})"
            for name in ("sliding_window", "attention_chunk_size"):
                width = getattr(one, name, None)
                if width is not None and width < runner.max_model_len:
                    return f"{name} of {width} tokens, which would count kept tokens instead of positions"
    return None


# ---- which requests are pruned: known from their first step to their last ----


def tracked(runner: Any) -> dict[str, Positions]:
    """Request id -> positions of the pruned requests that this runner holds."""
    if not hasattr(runner, "specprefill_requests"):
        runner.specprefill_requests = {}
    requests: dict[str, Positions] = runner.specprefill_requests
    return requests


def follow(runner: Any, scheduler_output: Any) -> None:
    """Note new requests, forget finished ones. A preempted one that comes back as new is noted again."""
    requests = tracked(runner)
    for request_id in scheduler_output.finished_req_ids:
        requests.pop(request_id, None)
    for new in scheduler_output.scheduled_new_reqs:
        params = new.sampling_params
        positions = None if params is None else from_arguments(params.extra_args)
        if positions is None:
            requests.pop(new.req_id, None)
        else:
            requests[new.req_id] = positions


# ---- the shifts ----


def shift_rows(
    positions: torch.Tensor, requests: dict[str, Positions], rows: Iterable[tuple[str, int, int]]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Turn indices into positions, in place.

    Args:
        positions: [tokens, or more] integers: each request's indices, one request after the other.
        requests: the pruned ones.
        rows: (request id, its first index, its tokens) in the order of `positions`.

    Returns:
        The part of `positions` that was changed, and what was added to it; None where nothing was.
    """
    start, parts = 0, []
    for request_id, first, count in rows:
        if request_id in requests:
            parts.append((start, requests[request_id].shifts(first, count)))
        start += count
    if not parts:
        return None
    if positions.dim() != 1 or positions.shape[0] < start:
        raise RuntimeError(f"positions: expected at least {start} in one dimension, got {list(positions.shape)}")
    low, high = parts[0][0], parts[-1][0] + parts[-1][1].size
    shifts = np.zeros(high - low, dtype=np.int64)
    for offset, part in parts:
        shifts[offset - low : offset - low + part.size] = part
    moved = torch.from_numpy(shifts)
    if positions.is_cuda:
        moved = moved.pin_memory()
    moved = moved.to(positions.device, positions.dtype, non_blocking=positions.is_cuda)
    positions[low:high] += moved
    return positions[low:high], moved


def _install_v1(runner_class: Any) -> None:
    update_states, preprocess = runner_class._update_states, runner_class._preprocess

    @functools.wraps(update_states)
    def _update_states(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        follow(self, scheduler_output)
        return update_states(self, scheduler_output, *args, **kwargs)

    @functools.wraps(preprocess)
    def _preprocess(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = preprocess(self, scheduler_output, *args, **kwargs)
        requests = tracked(self)
        if requests:
            batch, scheduled = self.input_batch, scheduler_output.num_scheduled_tokens
            rows = (
                (request_id, int(batch.num_computed_tokens_cpu[row]), scheduled[request_id])
                for row, request_id in enumerate(batch.req_ids)
            )
            shift_rows(prepared[2], requests, rows)
        return prepared

    runner_class._update_states, runner_class._preprocess = _update_states, _preprocess
    runner_class.of_specprefill = (_update_states, _preprocess)


def _install_v2(runner_class: Any) -> None:
    finish_requests, prepare_attn = runner_class.finish_requests, runner_class.prepare_attn
    sample = runner_class.sample

    @functools.wraps(finish_requests)
    def finish(self: Any, scheduler_output: Any) -> Any:
        # New requests are read here too: this comes first in every step.
        follow(self, scheduler_output)
        return finish_requests(self, scheduler_output)

    @functools.wraps(prepare_attn)
    def prepare(self: Any, input_batch: Any) -> Any:
        prepared = prepare_attn(self, input_batch)
        self.specprefill_shifted = None
        # Dummy batches do not come here, real ones do before their metadata is built.
        self.specprefill_batch = input_batch if tracked(self) else None
        if "prepare_inputs" not in vars(self.model_state):
            self.model_state.prepare_inputs = _shifting(self, self.model_state.prepare_inputs)
        return prepared

    @functools.wraps(sample)
    def sampled(self: Any, *args: Any, **kwargs: Any) -> Any:
        shifted, self.specprefill_shifted = getattr(self, "specprefill_shifted", None), None
        if shifted is not None:
            positions, shifts = shifted
            positions -= shifts
        return sample(self, *args, **kwargs)

    runner_class.finish_requests, runner_class.prepare_attn, runner_class.sample = finish, prepare, sampled
    runner_class.of_specprefill = (finish, prepare, sampled)


def _shifting(runner: Any, prepare_inputs: Any) -> Any:
    @functools.wraps(prepare_inputs)
    def shifting(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare_inputs(input_batch, *args, **kwargs)
        waiting, runner.specprefill_batch = runner.specprefill_batch, None
        if waiting is input_batch and waiting is not None:
            if "positions" in inputs:
                raise RuntimeError("positions: expected those of the batch, but the model state has its own")
            counts = input_batch.num_scheduled_tokens
            rows = (
                (request_id, int(input_batch.num_computed_tokens_np[row]), int(counts[row]))
                for row, request_id in enumerate(input_batch.req_ids)
            )
            runner.specprefill_shifted = shift_rows(input_batch.positions, tracked(runner), rows)
        return inputs

    return shifting
