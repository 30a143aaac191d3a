"""The CPU kernels of every instruction set that this machine runs, not only of its best."""

from __future__ import annotations

import subprocess

import processes
import pytest
from grid import Backend

import specprefill_kernels as spk

SETS = ("generic", "avx2", "avx512")  # each can do what those before it can
# Whatever goes through the vector code: dtypes, strides, dims and lengths that leave lanes over, masks, exponentials.
TESTS = (
    "layouts_and_strides or dtype_mixes or fp8 or head_dims or tile or look_ahead_rows or window or softcap or codes"
)
SHOW_SET = "from specprefill_kernels import _C; print(_C.instruction_set())"
SHOW_CONFIG = "import specprefill_kernels; print(specprefill_kernels.show_config())"


def in_a_process(name: str, *command: str) -> subprocess.CompletedProcess:
    """The choice is made once in a process, so each set needs one of its own."""
    return processes.python(*command, SPECPREFILL_INSTRUCTION_SET=name, OMP_NUM_THREADS="1")


def set_with(name: str) -> str:
    result = in_a_process(name, "-c", SHOW_SET)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_oracle_agrees_with(name):
    Backend("cpu", "score_layer").require()
    if f"yes, {name}" in spk.show_config():
        pytest.skip("the one that all other tests run on")
    config = in_a_process(name, "-c", SHOW_CONFIG).stdout
    if f"yes, {name}" not in config:
        pytest.skip(f"this machine or build has no {name}")
    files = ("test_score.py", "test_score_options.py", "test_score_decoding.py")
    result = in_a_process(name, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"cpu and ({TESTS})", *files)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_a_name_is_an_upper_bound():
    Backend("cpu", "score_layer").require()
    best = set_with("")
    for name in SETS:
        got = set_with(name)
        if SETS.index(name) >= SETS.index(best):
            assert got == best, f"with {name}"
        else:
            assert SETS.index(got) <= SETS.index(name), f"with {name}: {got}"
    assert set_with("generic") == "generic"


def test_an_unknown_name_is_reported_and_changes_nothing():
    Backend("cpu", "score_layer").require()
    assert set_with("avx3") == set_with("")
    assert "avx3" in in_a_process("avx3", "-c", SHOW_CONFIG).stdout
    assert "avx3" not in in_a_process("", "-c", SHOW_CONFIG).stdout
