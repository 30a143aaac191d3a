"""What bench.scaling measures: its options, and what makes each op's problem at a length."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench import problems, shapes
from bench.environment import command
from bench.problems import Problem

WARM_UP = 64  # tokens: loads all code and allocates next to nothing
DEFAULT = {"cpu": "cpu", "cuda": "cuda"}  # device -> backend
MODELS = {model.name: model for model in (*shapes.MODELS, *shapes.QUICK_MODELS)}

Maker = Callable[[int], Problem]


def parse(argv: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(DEFAULT), default="cpu")
    parser.add_argument("--backend", help="default: the compiled one of the device")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--model", choices=tuple(MODELS), help="the attention layer that is scored")
    parser.add_argument("--layers", type=int, default=2, help="of score_layers_: few, so that 1M tokens fit")
    parser.add_argument("--shortest", type=int, default=2**10)
    parser.add_argument("--longest", type=int, default=2**20)
    parser.add_argument("--verify", type=int, default=2**17, help="check results up to so many tokens")
    parser.add_argument("--only", default="", help="only ops whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.6, help="budget of timing one op at one length")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the harness, measures nothing")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a goal is not reached")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench/results")))
    options = parser.parse_args(argv)
    options.command = command("python -m bench.scaling", sys.argv[1:] if argv is None else argv)
    if options.quick:
        options.shortest, options.longest = min(options.shortest, 2**9), min(options.longest, 2**12)
    options.model = MODELS[options.model or (shapes.QUICK_MODELS if options.quick else shapes.MODELS)[0].name]
    options.backend = options.backend or DEFAULT[options.device]
    options.threads = options.threads or torch.get_num_threads()
    if not 1 <= options.shortest <= options.longest:
        parser.error(f"--shortest: expected 1 to {options.longest} (--longest), got {options.shortest}")
    if options.threads < 1 or options.layers < 1:
        parser.error("--threads, --layers: expected at least 1")
    return options


def makers(options: argparse.Namespace) -> dict[str, Maker]:
    """op -> what makes its problem for a number of tokens."""
    device, model = options.device, options.model
    made: dict[str, Maker] = {
        "score_layer": partial(problems.score, device, model),
        "score_layers": partial(problems.score_layers, device, replace(model, layers=options.layers)),
        "finalize_importance": partial(problems.finalize, device),
        "select_chunks": partial(problems.select, device),
        "gather_tokens": lambda tokens: problems.gather_tokens(device, tokens, 0),
        "gather_kv": lambda tokens: problems.gather_kv(device, model, tokens, "bhtd"),
        "select_tokens": partial(problems.select_tokens, device),
    }
    return {op: make for op, make in made.items() if options.only in op}
