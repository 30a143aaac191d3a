"""The CPU kernels of every instruction set that this machine runs, not only of its best."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from grid import Backend

import specprefill_kernels as spk

ROOM = Path(__file__).parent
SETS = ("generic", "avx2", "avx512")
# Whatever goes through the vector code: dtypes, strides, dims and lengths that leave lanes over, masks, exponentials.
TESTS = (
    "layouts_and_strides or dtype_mixes or fp8 or head_dims or tile or look_ahead_rows or window or softcap or codes"
)


def in_a_process(name: str, *command: str) -> subprocess.CompletedProcess:
    """The choice is made once in a process, so each set needs one of its own."""
    environment = {**os.environ, "SPECPREFILL_INSTRUCTION_SET": name, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOM, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_oracle_agrees_with(name):
    Backend("cpu", "score_layer").require()
    if f"yes, {name}" in spk.show_config():
        pytest.skip("the one that all other tests run on")
    config = in_a_process(name, "-c", "import specprefill_kernels; print(specprefill_kernels.show_config())").stdout
    if f"yes, {name}" not in config:
        pytest.skip(f"this machine or build has no {name}")
    files = ("test_score.py", "test_score_options.py", "test_score_decoding.py")
    result = in_a_process(name, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"cpu and ({TESTS})", *files)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
