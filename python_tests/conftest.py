"""Fixtures and options shared by the tests."""

from __future__ import annotations

import contextlib

import pytest
import torch
from grid import EMULATED, INTERPRETED, poisoned

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # properties.py then skips what needs it: a GPU machine may have nothing but its own packages
    pass
else:
    settings.register_profile(
        "specprefill",
        deadline=None,
        derandomize=True,
        # Triton's interpreter takes a tenth of a second for a score, as does the emulation, and on a GPU most examples
        # are kernels to compile.
        max_examples=12 if INTERPRETED or EMULATED or torch.cuda.is_available() else 60,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("specprefill")


def no_gpu() -> str | None:
    """Why tests that need a GPU cannot run here, or None."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1: Triton's kernels run on CPU tensors in this process"
    if EMULATED:
        return "SPECPREFILL_EMULATION is set: CUDA kernels run on CPU tensors in this process"
    return None if torch.cuda.is_available() else "no GPU that torch can use"


def pytest_collection_modifyitems(config, items):
    """Without a GPU one skip stands for all parameters of a test."""
    if no_gpu() is None:
        return
    kept, dropped, seen = [], [], set()
    for item in items:
        function = item.nodeid.split("[")[0]
        again = function in seen and item.get_closest_marker("gpu") is not None
        (dropped if again else kept).append(item)
        seen.add(function)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and (reason := no_gpu()):
        pytest.skip(reason)


@pytest.fixture
def backend(request):
    """A backend of the grid (see ``grid.on_backends``); skips with its reason, fails where it must be there."""
    request.param.require()
    # The reference is left out: it computes with operations of torch that are nondeterministic, which then warn.
    with contextlib.nullcontext() if request.param.name == "reference" else poisoned():
        yield request.param


@pytest.fixture
def threads():
    """Set the number of threads in a test; the former number comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
