"""score_layers_: layers that differ in one thing only, which a launch for several must not take for the same."""

from __future__ import annotations

import pytest
import torch
from grid import on_backends, same
from layouts import place
from scoring import BF16, FP16, FP32, assert_close, draw
from test_score_layers import BASE, one_by_one, run_layers

import specprefill_kernels as spk

pytestmark = on_backends("score_layers")

SHAPES = {"query": (2, 3, 4, 24), "key": (2, 2, 70, 24)}  # [B, N, Hq, D], [B, Hkv, T, D]


def a_layer(seed, dtypes=(FP32, FP32), offsets=(0, 0), longer=None, **sizes) -> list[torch.Tensor]:
    """Query and key as views into buffers of rubbish; what is not asked for has the same strides in every layer.

    ``sizes`` are other sizes of some axes, ``longer`` is the tensor and the axis whose stride is longer.
    """
    views = []
    for name, dtype, offset in zip(SHAPES, dtypes, offsets, strict=True):
        shape, wide = list(SHAPES[name]), [size + 8 for size in SHAPES[name]]
        strides = [wide[1] * wide[2] * wide[3], wide[2] * wide[3], wide[3], 1]
        for axis, size in sizes.get(name, {}).items():
            shape[axis] = size
        if longer and longer[0] == name:
            strides[longer[1]] += 8
        generator = torch.Generator().manual_seed(seed)
        buffer = torch.randn((shape[0] + 1) * strides[0], generator=generator).to(dtype)
        views.append(buffer.as_strided(shape, strides, offset))
    return views


def check_layers(backend, layers) -> None:
    """All of them in one call, against the reference with one call for each."""
    placed = [[place(tensor, backend.device) for tensor in tensors] for tensors in zip(*layers, strict=True)]
    state = spk.score_layers_(spk.new_state(2, 3, 70, backend.device), *placed, backend=backend.name)
    expected = spk.new_state(2, 3, 70)
    for query, key in layers:
        spk.score_layer_(expected, query, key, backend="reference")
    assert_close(state.cpu(), expected.double().numpy())


# What the second layer has, if all that is not said is as in the first: of fp32, and of fp16.
WIDE = [
    {"query": {2: 2}},
    {"key": {1: 1}},
    {"key": {1: 4}},
    {"query": {3: 16}, "key": {3: 16}},
    {"offsets": (1, 0)},
    {"offsets": (0, 1)},
    *({"longer": (name, axis)} for name in SHAPES for axis in range(4)),
]
TYPES = {
    FP32: [(FP16, FP32), (BF16, FP32), (FP32, FP16)],
    FP16: [(BF16, FP16), (FP32, FP16), (FP16, BF16)],
}
CASES = [
    *((dtype, {"dtypes": (dtype, dtype), **other}) for other in WIDE for dtype in TYPES),
    *((dtype, {"dtypes": dtypes}) for dtype in TYPES for dtypes in TYPES[dtype]),
]


@pytest.mark.parametrize(("dtype", "other"), CASES, ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_layers_may_differ_in_one_thing(backend, dtype, other, first):
    """All else is alike, strides too."""
    if not backend.sized(True, True, dtype == FP32 and not first):
        pytest.skip("Triton's interpreter takes long: one order and one type stand for all")
    layers = [a_layer(1, (dtype, dtype)), a_layer(2, **other)]
    check_layers(backend, layers[::-1] if first else layers)


@pytest.mark.parametrize("stepped", SHAPES)
def test_layers_may_differ_in_the_step_of_their_dimensions(backend, stepped):
    """None of them contiguous, so that nothing else tells them apart."""
    layers = []
    for seed, step in ((1, 2), (2, 3)):
        generator = torch.Generator().manual_seed(seed)
        wide = {name: torch.randn(*shape[:3], 72, generator=generator) for name, shape in SHAPES.items()}
        layers.append([wide[name][..., :: step if name == stepped else 2][..., :24] for name in SHAPES])
    check_layers(backend, layers)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_layers_may_differ_in_one_stride_of_lse(backend, axis):
    given = []
    problems = [draw(BASE.but(lse=True, seed=seed)) for seed in range(2)]
    for i, problem in enumerate(problems):
        strides = [1000, 100, 2]
        strides[axis] += i
        view = torch.full((4000,), float("nan")).as_strided(problem.lse.shape, strides)
        given.append(place(view.copy_(problem.lse), backend.device))
    together = run_layers(problems, backend, lse=given)
    same(together, one_by_one(problems, backend))
