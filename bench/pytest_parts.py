"""A pytest plugin (-p bench.pytest_parts): one of several processes that share the tests, with nothing but pytest.

It writes each test's result as it comes, so that a run which is stopped or dies loses nothing, and it stops when the
GPU is lost to the process: every later call would fail, and another process can go on behind the culprit.
"""

from __future__ import annotations

import json
import zlib

import pytest

GPU_FAULTS = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")
TOGETHER = 8  # parameters of one function share most of their compiled kernels


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="i/n: run the i-th of n parts of the tests")
    parser.addoption("--after", help="run what follows this test (node id)")
    parser.addoption("--lines", help="file that gets a line of JSON for each test")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    index, count = map(int, config.getoption("--part").split("/"))
    seen: dict[str, int] = {}
    kept, dropped = [], []
    for item in items:
        function = item.nodeid.split("[")[0]
        seen[function] = seen.get(function, -1) + 1
        run = zlib.crc32(f"{function} {seen[function] // TOGETHER}".encode())
        (kept if run % count == index - 1 else dropped).append(item)
    names = [item.nodeid for item in kept]
    after = config.getoption("--after")
    if after in names:
        dropped += kept[: names.index(after) + 1]
        kept = kept[names.index(after) + 1 :]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = kept
    _write(config, {"selected": len(kept)})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    _write(item.config, {"begun": item.nodeid})  # if the process dies in it, this is the last word


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" or not report.passed:
        line = {"test": item.nodeid, "outcome": report.outcome, "seconds": round(call.duration, 3)}
        if report.failed:
            line["why"] = str(report.longrepr)[-2000:]
            if any(fault in str(report.longrepr) for fault in GPU_FAULTS):
                line["lost"] = True
                item.session.shouldstop = f"the GPU is lost to this process after {item.nodeid}"
        _write(item.config, line)


def _write(config, line: dict) -> None:
    if config.getoption("--lines"):
        with open(config.getoption("--lines"), "a") as file:
            file.write(json.dumps(line) + "\n")
