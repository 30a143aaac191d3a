"""Run a test's work in a process of its own: a crash there fails the test and does not end the run."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

ROOM = Path(__file__).parent


def alone(function: Callable, *arguments):
    """What a module's function returns or raises, called in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result(timeout=120)
        except BrokenProcessPool:
            pytest.fail(f"{function.__name__}{arguments} ended its process")


def python(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """The interpreter with these arguments and these variables beside those that are set."""
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        cwd=ROOM,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
