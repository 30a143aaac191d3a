"""The emulation of CUDA itself: faults that are planted in kernels are found, and kernels without them run.

The kernels are in csrc/emulation/tests. Which faults are found depends on what the emulation is built to check; see
csrc/emulation/README.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "csrc" / "emulation" / "tests"
CHECKS = ("none", "race", "address")
ORDERS = ("forward", "reverse", "random:0", "random:1", "random:2")

RACE = "and nothing orders the two"
WRONG = "wrong result"
STUCK = "nobody ends the wait"
ELSEWHERE = "threads of a block wait for each other in different places"

# What is said of each fault by each build: of any check, or of the one that is named.
FAULTS = {
    "missing_syncthreads": {"none": WRONG, "race": f"{RACE}|which nobody has written"},
    "overwritten_early": {"none": WRONG, "race": RACE},
    "missing_syncwarp": {"none": WRONG, "race": f"{RACE}|which nobody has written"},
    "vote_as_barrier": {"race": RACE},
    "lost_update": {"none": WRONG, "race": RACE},
    "unwritten": {"none": WRONG, "race": r"thread \(7, 0, 0\) reads byte 28 of shared memory .* nobody has written"},
    "missing_copy_wait": {"none": WRONG, "race": "where an asynchronous copy is on its way"},
    "wrong_copy_group": {"none": WRONG, "race": "where an asynchronous copy is on its way"},
    "early_copy": {"none": WRONG, "race": RACE},
    "misaligned_copy": {"any": "copies asynchronously from global memory at .* no multiple of 16"},
    "copy_outside": {"any": "to byte 1024 of its 1024 bytes of shared memory"},
    "abandoned_copy": {"any": "exits with 1 asynchronous copies that it never waited for"},
    "shared_overrun": {
        "none": "wrote to byte 256 of its 256 bytes of shared memory",
        "race": r"thread \(63, 0, 0\) writes 4 bytes at byte 256 of its 256 bytes of shared memory at faults.cu:",
        "address": r"AddressSanitizer: use-after-poison[\s\S]*WRITE of size 4[\s\S]*shared_overrun",
    },
    "shared_underrun": {
        "none": "wrote to byte -1 of its 256 bytes of shared memory",
        "race": r"thread \(0, 0, 0\) writes 4 bytes at byte -4 of its 256 bytes of shared memory at faults.cu:",
        "address": r"AddressSanitizer: use-after-poison[\s\S]*WRITE of size 4[\s\S]*shared_underrun",
    },
    "global_overrun": {"address": r"AddressSanitizer: heap-buffer-overflow[\s\S]*READ of size 4[\s\S]*global_overrun"},
    "divergent_barrier": {"any": rf"{ELSEWHERE}.* waits in __syncwarp .* waits in __syncthreads"},
    "two_barriers": {"any": "comes to __syncthreads(_or)? while other threads wait in __syncthreads(_or)?"},
    "not_in_mask": {"any": "calls a shuffle with mask 0x0000ffff, which it is not in"},
    "absent_lanes": {"any": f"{ELSEWHERE}.* waits in a shuffle with mask 0xffffffff for lanes 0xffff0000 of its warp"},
    "mma_without_all": {"any": r"mma.sync \(bf16\), which needs all 32 lanes"},
    "misaligned_atomic": {"any": "atomically, which is no multiple of 4"},
    "same_word": {"race": rf"writes global memory .* of block .* {RACE}"},
    "chain": {"race": RACE},
    "missing_fence_before": {"race": RACE},
    "missing_fence_after": {"race": RACE},
    "volatile_flag": {"race": RACE},
    "endless_wait": {"any": STUCK},
    "endless_spin": {"any": STUCK},
    "waits_for_the_last": {"any": STUCK},
    "no_blocks": {"any": r"grid \(0, 1, 1\): a dimension is 0"},
    "high_grid": {"any": r"grid \(1, 1, 65536\): expected at most \(2147483647, 65535, 65535\)"},
    "large_block": {"any": r"block \(1025, 1, 1\): expected at most 1024 threads"},
    "large_shared": {"any": "232449 bytes of shared memory: a block has at most 232448"},
    "trap": {"any": r"block \(0, 0, 0\), thread \(9, 0, 0\) __trap\(\)"},
}
# In these orders a fault does no harm: the block that the others wait for starts first.
HARMLESS = {("waits_for_the_last", "reverse")}


def tool(name: str) -> str:
    """A build tool beside this Python or on PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Builds the tests with a check, once, and returns the program."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if not os.environ.get("CXX") and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler is installed")
    folder = tmp_path_factory.mktemp("emulation")

    @cache
    def program(check: str) -> Path:
        configure = [cmake, "-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DSPECPREFILL_EMULATION_CHECK={check}"]
        for command in ([*configure, "-S", SOURCE, "-B", folder / check], [cmake, "--build", folder / check]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "warning:" not in done.stdout
        return folder / check / "emulation_tests"

    return program


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPECPREFILL_", "LD_PRELOAD"))}
    kept["ASAN_OPTIONS"] = "detect_leaks=0"
    return subprocess.run(
        [program, *arguments], env={**kept, **environment}, capture_output=True, text=True, timeout=120
    )


def said(output: str) -> dict[str, str]:
    return dict(line.split("\t", 1) for line in output.splitlines())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_without_faults_run(build, check, order):
    done = run(build(check), "right", SPECPREFILL_EMULATION_ORDER=order)
    assert done.returncode == 0, done.stderr
    results = said(done.stdout)
    assert set(FAULTS) < set(results)
    assert {name: problem for name, problem in results.items() if problem} == {}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", ["none", "race"])
def test_faults_are_found_in_every_order(build, check, order):
    done = run(build(check), "wrong", SPECPREFILL_EMULATION_ORDER=order)
    assert done.returncode == 0, done.stderr
    problems = said(done.stdout)
    assert set(problems) == set(FAULTS)
    for name, expected in FAULTS.items():
        pattern = expected.get(check) or expected.get("any")
        if pattern and (name, order) not in HARMLESS:
            assert re.search(pattern, problems[name]), (name, problems[name])


@pytest.mark.parametrize("name", sorted(name for name, expected in FAULTS.items() if "address" in expected))
def test_accesses_outside_of_memory_end_the_process(build, name):
    done = run(build("address"), "wrong", name)
    assert done.returncode != 0
    assert re.search(FAULTS[name]["address"], done.stderr), done.stderr


def test_what_a_launch_does_follows_from_its_order(build):
    """The same seed gives the same interleaving, and another seed another one."""
    program = build("none")
    first, again, other = (
        run(program, "wrong", "not_in_mask", SPECPREFILL_EMULATION_ORDER=f"random:{seed}").stdout for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert "order random:3" in first


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("SPECPREFILL_EMULATION_ORDER", "backwards", "expected forward, reverse, random or random:SEED"),
        ("SPECPREFILL_EMULATION_ORDER", "random:x", "expected forward, reverse, random or random:SEED"),
        (
            "SPECPREFILL_EMULATION_DEVICE",
            "4:227",
            "expected processors:shared_kib:compute_capability with at most 8 processors",
        ),
        (
            "SPECPREFILL_EMULATION_DEVICE",
            "0:227:90",
            "expected processors:shared_kib:compute_capability with at most 8 processors",
        ),
        (
            "SPECPREFILL_EMULATION_DEVICE",
            "9:227:90",
            "expected processors:shared_kib:compute_capability with at most 8 processors",
        ),
    ],
)
def test_settings_that_mean_nothing_are_errors(build, variable, value, says):
    done = run(build("none"), "right", "scan", **{variable: value})
    assert f"{variable}: {says}, " in said(done.stdout)["scan"]
    assert f"got '{value}'" in done.stdout


def test_the_emulated_device_has_the_memory_that_is_asked_for(build):
    done = run(build("none"), "right", "large_shared", SPECPREFILL_EMULATION_DEVICE="2:99:86")
    assert "232448 bytes of shared memory: a block has at most 101376" in said(done.stdout)["large_shared"]
