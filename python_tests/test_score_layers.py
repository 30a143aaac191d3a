"""score_layers_: a list of layers in one call is the same as one call per layer, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grid import on_backends, same
from layouts import LAYOUTS, STRIDES, place, restride
from scoring import BF16, E4M3, FP16, FP32, Case, assert_close, draw

import specprefill_kernels as spk

pytestmark = on_backends("score_layers")

BASE = Case(seq_lens=(50, 23), rows=(4, 3), look_ahead=4, head_dim=16)
SHARED = ("layout", "seq_lens", "cu_seqlens", "block_table", "num_look_ahead", "queries", "normalize_over", "softcap")


def layers_of(case: Case, count: int = 3):
    return [draw(case.but(seed=seed)) for seed in range(count)]


def run_layers(problems, backend, **changes):
    """One ``score_layers_`` call over the problems' layers, on the first one's state."""
    arguments = [problem.arguments(backend.device) for problem in problems]
    shared = {name: value for name, value in arguments[0].items() if name in SHARED}
    for name in ("lse", "key_scale"):
        if arguments[0][name] is not None:
            shared[name] = [given[name] for given in arguments]
    state = problems[0].state.clone().to(backend.device)
    queries, keys = ([given[name] for given in arguments] for name in ("query", "key"))
    returned = spk.score_layers_(state, queries, keys, backend=backend.name, **{**shared, **changes})
    assert returned.data_ptr() == state.data_ptr()
    return state.cpu()


def one_by_one(problems, backend, changes=None):
    state = problems[0].state
    for i, problem in enumerate(problems):
        problem.state = state
        state = problem.run(backend, **(changes[i] if changes else {}))
    return state


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("queries", ["look_ahead", "observation_window"])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP16, FP16), (BF16, E4M3)], ids=str)
def test_equals_repeated_single_layers(backend, layout, queries, dtypes):
    case = BASE.but(layout=layout, dtypes=dtypes, key_scale="per_head", spare=2, options={"queries": queries})
    same(run_layers(layers_of(case), backend), one_by_one(layers_of(case), backend))


def test_against_the_oracle(backend):
    """The state is the max over layers: neither their sum nor the last one."""
    problems = layers_of(BASE, 4)
    expected = np.maximum.reduce([problem.expected() for problem in problems])
    assert_close(run_layers(problems, backend).numpy(), expected)


def test_lse_and_key_scale_are_lists(backend):
    """Each layer has its own."""
    cases = [BASE.but(lse=True, key_scale=scale, seed=i) for i, scale in enumerate((0.5, 1.5, 1.0))]
    problems = [draw(case) for case in cases]
    expected = np.maximum.reduce([problem.expected() for problem in problems])
    together = run_layers(problems, backend)
    assert_close(together.numpy(), expected)
    same(together, one_by_one([draw(case) for case in cases], backend))


@pytest.mark.parametrize("windows", [5, [None, 5, 9], [3, None, None]], ids=str)
def test_one_window_for_all_or_one_per_layer(backend, windows):
    problems = layers_of(BASE.but(options={"queries": "observation_window"}))
    each = [{"window": w} for w in (windows if isinstance(windows, list) else [windows] * 3)]
    single = one_by_one(layers_of(BASE.but(options={"queries": "observation_window"})), backend, each)
    same(run_layers(problems, backend, window=windows), single)


def test_layers_may_differ_in_heads_dims_and_dtypes(backend):
    cases = [BASE, BASE.but(heads=(6, 3), head_dim=40, dtypes=(BF16, BF16)), BASE.but(heads=(2, 1), head_dim=7)]
    same(run_layers([draw(case) for case in cases], backend), one_by_one([draw(case) for case in cases], backend))


def test_the_order_of_layers_does_not_matter(backend):
    same(run_layers(layers_of(BASE)[::-1], backend), run_layers(layers_of(BASE), backend))


def a_workspace(case: Case, backend, portion: float = 1.0) -> torch.Tensor:
    """As large as the least that the backend asks for three layers, or a portion of it; full of rubbish."""
    shape = (case.look_ahead, *case.heads, case.head_dim, max(case.seq_lens))
    name = "cpu" if backend.name == "reference" else backend.name
    size = spk.score_workspace_size(*shape, batch=len(case.seq_lens), layers=3, backend=name)
    return torch.full((int(size * portion),), 255, dtype=torch.uint8, device=backend.device)


@pytest.mark.parametrize("portion", [1, 1.7, 20])
def test_a_workspace_changes_nothing(backend, portion):
    """Neither what it holds before, nor how often the work has to be cut to fit it."""
    case = BASE.but(
        seq_lens=backend.sized((900, 385, 3), (300, 85, 3)),
        rows=(4, 3, 1),
        heads=(6, 3),
        options={"normalize_over": "visible"},
    )
    alone = run_layers(layers_of(case), backend)
    same(run_layers(layers_of(case), backend, workspace=a_workspace(case, backend, portion)), alone)


def test_a_workspace_too_small_is_named(backend):
    if backend.name == "reference":
        pytest.skip("the reference needs no workspace")
    # A GPU backend asks for its hungriest configuration, which small shapes do not take.
    workspace = a_workspace(BASE, backend, 0.5 if backend.name == "cpu" else 0.01)
    with pytest.raises(ValueError, match=rf"^workspace: expected .*, got {len(workspace)}"):
        run_layers(layers_of(BASE), backend, workspace=workspace)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"look_ahead": 0}, "look_ahead"),
        ({"pool_kernel_size": 2}, "pool_kernel_size"),
    ],
    ids=str,
)
def test_the_workspace_size_of_bad_shapes(backend, changes, name):
    shapes = {"look_ahead": 8, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "max_len": 100}
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        spk.score_workspace_size(**{**shapes, **changes})


def test_a_workspace_for_layers_that_differ(backend):
    """As the docstring says: the largest of each size, but the fewest KV heads."""
    if backend.name == "reference":
        pytest.skip("the reference needs no workspace")
    cases = [
        BASE.but(heads=heads, look_ahead=1, rows=None, seq_lens=(300, 20)) for heads in ((12, 1), (12, 12), (6, 2))
    ]
    size = spk.score_workspace_size(1, 12, 1, 64, 300, batch=2, layers=3, backend=backend.name)
    workspace = torch.empty(size, dtype=torch.uint8, device=backend.device)
    problems = [draw(case) for case in cases]
    same(run_layers(problems, backend, workspace=workspace), run_layers(problems, backend))


def test_each_layer_has_its_own_key_scale_in_its_sum(backend):
    scales = (0.5, torch.tensor([1.5, 0.3]), torch.tensor([0.9, 7.0, 0.2, 7.0])[::2])
    problems = [draw(BASE.but(seed=i)) for i in range(3)]
    for problem, scale in zip(problems, scales, strict=True):
        problem.key_scale = scale
    expected = np.maximum.reduce([problem.expected() for problem in problems])
    assert_close(run_layers(problems, backend).numpy(), expected)


@pytest.mark.parametrize("lse", [False, True])
def test_layers_of_one_launch_have_their_own_key_scales(backend, lse):
    """Both where the sum is given and where it is taken; tensors of one kind share a launch."""
    for scales in (
        (0.5, 1.5, 1.0),
        [torch.rand(2, generator=torch.Generator().manual_seed(i)) + 0.2 for i in range(3)],
    ):
        problems = [draw(BASE.but(lse=lse, key_scale=scale, seed=i)) for i, scale in enumerate(scales)]
        expected = np.maximum.reduce([problem.expected() for problem in problems])
        assert_close(run_layers(problems, backend).numpy(), expected)


@pytest.mark.parametrize("lse", [False, True])
def test_layers_may_differ_in_strides(backend, lse):
    cases = [
        BASE.but(strides=keys, query_strides=queries, lse=lse, seed=i)
        for i, (keys, queries) in enumerate(zip(STRIDES, STRIDES[::-1], strict=True))
    ]
    problems = [draw(case) for case in cases]
    expected = np.maximum.reduce([problem.expected() for problem in problems])
    given = [place(restride(p.lse, how), backend.device) for p, how in zip(problems, STRIDES)] if lse else None
    assert_close(run_layers(problems, backend, **({"lse": given} if lse else {})).numpy(), expected)


@pytest.mark.parametrize("length", [253, 255, 256, 512])
def test_a_workspace_holds_the_sums_of_look_ahead_keys(backend, length):
    options = {"normalize_over": "visible"}
    case = Case(seq_lens=(length,), look_ahead=16, heads=(4, 1), head_dim=16, dtypes=(BF16, BF16), options=options)
    same(
        run_layers(layers_of(case), backend, workspace=a_workspace(case, backend)), run_layers(layers_of(case), backend)
    )


def test_a_workspace_holds_the_sums_of_look_ahead_keys_of_small_groups(backend):
    """One head of queries a KV head: a tile's rows are mostly spare, and the size has nothing else to give."""
    options = {"normalize_over": "visible"}
    heads = backend.sized(16, 16, 2)
    case = Case(seq_lens=(512,), look_ahead=8, heads=(heads, heads), head_dim=16, options=options)
    same(
        run_layers(layers_of(case), backend, workspace=a_workspace(case, backend)), run_layers(layers_of(case), backend)
    )
