"""Fixtures and options shared by the tests."""

from __future__ import annotations

import contextlib
import zlib

import pytest
import torch
from grid import INTERPRETED, poisoned

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # properties.py then skips what needs it: a GPU machine may have nothing but its own packages
    pass
else:
    settings.register_profile(
        "specprefill",
        deadline=None,
        derandomize=True,
        # The interpreter takes a tenth of a second for a score; the first examples that it draws are the same ones.
        max_examples=12 if INTERPRETED else 60,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("specprefill")


GPU_FAULTS = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")


def no_gpu() -> str | None:
    """Why tests that need a GPU cannot run here, or None."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1: Triton's kernels run on CPU tensors in this process"
    return None if torch.cuda.is_available() else "no GPU that torch can use"


def pytest_addoption(parser):
    parser.addoption("--shard", help="i/n: run the i-th of n parts, so that processes can share the tests")
    parser.addoption("--after", help="run what follows this test (node id)")


def pytest_collection_modifyitems(config, items):
    """Without a GPU one skip stands for all parameters of a test; with --shard only that part of the tests is kept."""
    index, count = map(int, (config.getoption("--shard") or "1/1").split("/"))
    after, gpu = config.getoption("--after"), no_gpu() is None
    seen: dict[str, int] = {}
    kept, dropped = [], []
    for item in items:
        function = item.nodeid.split("[")[0]
        seen[function] = seen.get(function, -1) + 1
        # A function's parameters share most of their compiled kernels, so they stay together, in runs of at most 24.
        run = zlib.crc32(f"{function} {seen[function] // 24}".encode())
        again = seen[function] > 0 and not gpu and item.get_closest_marker("gpu") is not None
        (dropped if again or run % count != index - 1 else kept).append(item)
    names = [item.nodeid for item in kept]
    if after in names:
        dropped += kept[: names.index(after) + 1]
        kept = kept[names.index(after) + 1 :]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """After a fault on the GPU every later call fails: stop, and let whoever started the run go on in a new process."""
    report = (yield).get_result()
    if report.failed and any(fault in str(report.longrepr) for fault in GPU_FAULTS):
        item.session.shouldstop = f"the GPU is lost to this process after {item.nodeid}"


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
