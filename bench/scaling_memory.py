"""The most memory that one call of an op takes beyond its inputs, its outputs included.

On a GPU: what torch's allocator says. On a CPU: the kernel's own high-water mark of the process (Linux: writing 5 to
/proc/self/clear_refs sets it back), so that what compiled code allocates is seen too. Three things would hide memory,
and are kept from it:

- what a call keeps for the next one: each point is the first call of its length, in a process of its own, forked off
  one that has loaded everything and run nothing;
- what the allocator keeps of freed blocks, which a call would take again unseen: blocks of 64 KB and more are told to
  come from the system and to go back to it;
- what only a first call needs, whatever its length (code that is loaded): the op runs once on a few tokens before.

The mark counts pages, and the system counts those a little late: RESOLUTION is what it can be trusted with.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.scaling_cases import WARM_UP, makers, parse

RESOLUTION = 2**19
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
STATUS, MARK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def of_call(call: Callable[[], object], device: str) -> int:
    """Peak bytes of one call.

    Raises:
        OSError: this system has no high-water mark that can be set back.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return int(torch.cuda.max_memory_allocated() - before)
    MARK.write_text("5")
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    if found is None:
        raise OSError(f"{STATUS}: expected {name}, got none")
    return 1024 * int(found[1])


def in_processes(options: Sequence[str], points: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, Any]]:
    """(op, tokens, bytes or why there are none) of each point, from a process of its own.

    Args:
        options: the arguments of `bench.scaling` that say what an op's call is.
    """
    command = [sys.executable, "-m", "bench.scaling_memory", json.dumps(list(points)), *options]
    environment = {**os.environ, **MAPPED}
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        got = 0
        for line in process.stdout:
            op, tokens, value = json.loads(line)
            got += 1
            yield op, tokens, value
    for op, tokens in points[got:]:
        yield op, tokens, f"the process ended with {process.returncode}"


def main(argv: Sequence[str]) -> int:
    points, options = json.loads(argv[0]), parse(argv[1:])
    for op, tokens in points:
        # The parent loaded torch and started no thread, so a child may begin where it stands.
        child = os.fork()
        if child == 0:
            status = 1
            try:
                print(json.dumps([op, tokens, _measured(options, op, tokens)]), flush=True)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            why = f"the process ended with {os.waitstatus_to_exitcode(status)}"
            print(json.dumps([op, tokens, why]), flush=True)
    return 0


def _measured(options: Any, op: str, tokens: int) -> Any:
    try:
        torch.set_num_threads(options.threads)
        make = makers(options)[op]
        make(WARM_UP).call(options.backend)
        problem = make(tokens)
        return of_call(lambda: problem.call(options.backend), options.device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
