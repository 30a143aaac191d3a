"""GGUF to a folder that Transformers loads in seconds: dequantized once, kept as bf16."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from specprefill_kernels.models.progress import Progress

# Half the disk of fp32, and rounding to bf16 (2^-9) is far below the error that 4-bit quantization already made. What
# the model computes in is chosen when it is loaded.
STORED_DTYPE = "bfloat16"


def convert(gguf: Path, target: Path, title: str, progress: Progress) -> None:
    """Writes weights, config and tokenizer of `gguf` into the folder `target`.

    A child process does it: unpacking takes four times the memory of the result, which goes back to the system this
    way, and the child's own progress bar becomes ours.

    Raises:
        RuntimeError: it failed; the message is the child's.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    package_root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "specprefill_kernels.models.unpack", str(gguf), str(target)]
    with progress.task(f"{title}: unpacking to {STORED_DTYPE}, once", steps=True) as task:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, bufsize=0)
        said = ""
        try:
            assert child.stderr is not None
            while block := child.stderr.read(4096):
                said = (said + block.decode(errors="replace"))[-4000:]
                if counts := re.findall(r"(\d+)/(\d+) \[", said):
                    task.update(int(counts[-1][0]), int(counts[-1][1]))
            child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if child.returncode != 0:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {child.returncode} (no memory left, if that is -9)"
        raise RuntimeError(f"{title}: could not be unpacked: {reason}")


def unpack(gguf: Path, target: Path) -> None:
    """The work itself, in this process."""
    try:
        import gguf as _gguf  # noqa: F401  (Transformers' own message about it comes late and is long)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise RuntimeError(f'{error}. Reading GGUF needs: pip install "specprefill-kernels[loop]"') from error

    arguments: dict[str, Any] = {"gguf_file": gguf.name, "dtype": getattr(torch, STORED_DTYPE)}
    try:
        # Newer versions keep the packed weights unless told otherwise; older ones know no such class and always unpack.
        from transformers import GgufConfig

        arguments["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    loader: Any = AutoModelForCausalLM
    with quiet(logging), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = loader.from_pretrained(gguf.parent, **arguments)
        # save_pretrained refuses a model that still believes it is quantized.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.to(getattr(torch, STORED_DTYPE)).save_pretrained(target)
        tokenizer.save_pretrained(target)


class quiet:
    """Transformers' own bars and warnings are off inside: ours say what the reader needs."""

    def __init__(self, logging: Any) -> None:
        self._logging = logging

    def __enter__(self) -> None:
        self._level = self._logging.get_verbosity()
        self._bars = self._logging.is_progress_bar_enabled()
        self._logging.set_verbosity_error()
        self._logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bars:
            self._logging.enable_progress_bar()


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
