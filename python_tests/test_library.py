"""The ops as PyTorch sees them: schemas, fake kernels, torch.compile, autograd."""

from __future__ import annotations

import shutil

import pytest
import torch
from calls import CALLS
from grid import backends, on_backends, same
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import specprefill_kernels as spk

GRID = [
    pytest.param(backend, name, id=f"{backend.id}-{name}", marks=backend.marks)
    for name, call in CALLS.items()
    for backend in backends(call.op)
]
on_calls = pytest.mark.parametrize(("backend", "name"), GRID, indirect=["backend"])
# The ops chained, on each backend that has them all.
on_chains = on_backends("select_tokens")


class Recorder(TorchDispatchMode):
    """Notes every call of our ops while it runs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "specprefill":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def recorded(name: str, backend) -> list:
    """What the public function hands to torch, for arguments that are good."""
    with Recorder() as recorder:
        CALLS[name].function(**CALLS[name].arguments(backend.device), backend=backend.name)
    return recorder.calls


def tensors_in(value) -> list[torch.Tensor]:
    """All tensors in nested tuples, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, (tuple, list)) else []


def outcome(name: str, arguments: dict, function=None) -> list[torch.Tensor]:
    """Everything a call gives back or writes to."""
    results = tensors_in((function or CALLS[name].function)(**arguments))
    written = [arguments["state"]] if name.startswith("score") else tensors_in(arguments.get("out"))
    return [*results, *written]


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        same(one, other)


@on_calls
def test_opcheck(backend, name):
    """Schema (what is mutated, what aliases), fake kernel, autograd registration, dynamic shapes under AOT."""
    calls = recorded(name, backend)
    assert calls, "the public function calls no registered op"
    for func, args, kwargs in calls:
        torch.library.opcheck(func, args, kwargs)


def test_every_registered_op_is_checked():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("specprefill::")}
    reached = {func.name() for name in CALLS for func, _, _ in recorded(name, backends(CALLS[name].op)[0])}
    assert registered == reached


@pytest.fixture
def compiled():
    """torch.compile without a trace of other tests."""
    torch._dynamo.reset()
    yield lambda function, **how: torch.compile(function, fullgraph=True, **how)
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@on_calls
def test_compiles_in_one_graph(backend, name, compiler, compiled):
    call = CALLS[name]
    eager = outcome(name, {**call.arguments(backend.device), "backend": backend.name})
    function = compiled(call.function, backend=compiler)
    assert_same(outcome(name, {**call.arguments(backend.device), "backend": backend.name}, function), eager)


def pipeline(query, key, ids, seq_lens, **budget):
    """The ops as a caller chains them, with ordinary torch code between."""
    state = torch.zeros(query.shape[0], query.shape[1], ids.shape[1], device=query.device)
    spk.score_layer_(state, query * 2, key, seq_lens=seq_lens)
    spk.score_layers_(state, [query, query + 1], [key, key * 0.5], seq_lens=seq_lens, queries="observation_window")
    budget = budget or {"keep_ratio": 0.3}
    packed, selection, importance = spk.select_tokens(state, ids + 1, seq_lens, chunk_size=4, **budget)
    keys, values = spk.gather_kv(key, key + 1, selection, layout="bhtd")
    return packed.values * 2, packed.position_ids, packed.cu_seqlens, importance, keys - values


def pipeline_inputs(length: int, device: str, batch: int = 2):
    random = torch.Generator().manual_seed(length)
    query, key = (torch.randn(batch, *shape, 8, generator=random) for shape in ((3, 4), (2, length)))
    ids = torch.randint(0, 1000, (batch, length), generator=random)
    return tuple(x.to(device) for x in (query, key, ids, torch.tensor([length, length // 2][:batch])))


@on_chains
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.3}, {"keep_tokens": 30}, {"keep_mass": 0.5}], ids=str)
def test_shapes_may_be_dynamic(backend, compiled, budget):
    """Prompts of many lengths share their graphs (torch gives up after eight); each result equals the eager one."""
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(pipeline, backend=counter, dynamic=True)
    with spk.use_backend(backend.name):
        for length in backend.sized((40, 57, 64, 72, 80, 101, 120, 133, 200, 220, 257), (40, 57, 133)):
            inputs = pipeline_inputs(length, backend.device)
            assert_same(list(function(*inputs, **budget)), list(pipeline(*inputs, **budget)))
    assert counter.frame_count <= 2, "recompiled for other lengths"


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
@pytest.mark.slow
@on_chains
def test_inductor(backend, compiled):
    function = compiled(pipeline, backend="inductor")
    inputs = pipeline_inputs(40, backend.device)
    with spk.use_backend(backend.name):
        assert_same(list(function(*inputs)), list(pipeline(*inputs)))


@on_calls
def test_no_gradient_flows(backend, name):
    """Inputs that require grad are taken, and nothing that comes out requires grad."""
    call = CALLS[name]
    eager = outcome(name, {**call.arguments(backend.device), "backend": backend.name})
    arguments = {**call.arguments(backend.device), "backend": backend.name}
    for key, value in arguments.items():
        for tensor in tensors_in(value) if key not in ("state", "out") or name == "finalize" else []:
            if tensor.is_floating_point():
                tensor.requires_grad_()
    results = outcome(name, arguments)
    assert not any(tensor.requires_grad for tensor in results)
    assert_same(results, eager)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
@on_calls
def test_modes_without_autograd(backend, name, mode):
    call = CALLS[name]
    eager = outcome(name, {**call.arguments(backend.device), "backend": backend.name})
    with mode():
        results = outcome(name, {**call.arguments(backend.device), "backend": backend.name})
        assert_same(results, eager)


@on_calls
def test_fake_tensors_know_the_shapes(backend, name):
    """Without data: shapes and dtypes as the real call has them."""
    call = CALLS[name]
    real = tensors_in(call.function(**call.arguments(backend.device), backend=backend.name))
    arguments = call.arguments(backend.device)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        results = tensors_in(call.function(**fakes, backend=backend.name))
    assert [(tuple(t.shape), t.dtype) for t in results] == [(tuple(t.shape), t.dtype) for t in real]
