"""sass.py reads what cuobjdump prints, and fails on spilled registers and on a score that leaves tensor cores idle."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cuobjdump
import pytest
import sass

SCORE = "_ZN11specprefill12score_kernelINS_8Bf16KeysELi4EEEvNS_11ScoreParamsE"
SELECT = "_ZN11specprefill13select_kernelENS_12SelectParamsE"


def usage(arch: str, symbol: str, stack: int = 0, local: int = 0) -> str:
    return f"""
Fatbin elf code:
================
arch = {arch}
code version = [1,8]
host = linux

Resource usage:
 Common:
  GLOBAL:0 CONSTANT[3]:8
 Function {symbol}:
  REG:128 STACK:{stack} SHARED:1024 LOCAL:{local} CONSTANT[0]:1000 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def code(arch: str, symbol: str, *instructions: str) -> str:
    lines = [
        f"        /*{16 * i:04x}*/                   {text} ;      /* 0x0000000000000000 */"
        for i, text in enumerate(instructions)
    ]
    return f"\nFatbin elf code:\n================\narch = {arch}\n\n\t\tFunction : {symbol}\n" + "\n".join(lines) + "\n"


MMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
LOAD, SPILL = "@!P0 LDG.E.128 R4, desc[UR4][R2.64]", "STL.64 [R1+0x8], R2"


def library(tmp_path: Path, monkeypatch, kernels: list[tuple[str, str, int, int, tuple[str, ...]]]) -> Path:
    """A cuobjdump on PATH that prints this of any file: (arch, symbol, stack, local, instructions)."""
    tool = tmp_path / "bin" / "cuobjdump"
    tool.parent.mkdir()
    (tmp_path / "usage").write_text("".join(usage(*kernel[:4]) for kernel in kernels))
    for arch in {kernel[0] for kernel in kernels}:
        of_arch = [code(arch, kernel[1], *kernel[4]) for kernel in kernels if kernel[0] == arch]
        (tmp_path / arch).write_text("".join(of_arch))
    tool.write_text(f'#!/bin/sh\nif [ "$1" = -res-usage ]; then cat {tmp_path}/usage; else cat {tmp_path}/$3; fi\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "library.so"


GOOD = [
    ("sm_80", SCORE, 0, 0, (LOAD, MMA, MMA)),
    ("sm_90", SCORE, 0, 0, (LOAD, MMA)),
    ("sm_90", SELECT, 0, 0, (LOAD,)),
]


def test_all_well(tmp_path, monkeypatch, capsys):
    file = library(tmp_path, monkeypatch, GOOD)
    assert sass.main([str(file), "--json", str(tmp_path / "rows.json")]) == 0
    shown = capsys.readouterr().out
    assert "score_kernel<Bf16Keys, 4>  128r 3i 2t 1024s  128r 2i 1t 1024s" in shown
    assert "select_kernel              -                 128r 1i 1024s" in shown
    assert "3 binaries of 2 kernels: no problems" in shown
    assert [row["arch"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["sm_80", "sm_90", "sm_90"]


@pytest.mark.parametrize(
    ("planted", "says"),
    [
        (("sm_90", SELECT, 8, 0, (LOAD,)), "select_kernel sm_90: 8 bytes of stack a thread, 0 accesses to it"),
        (("sm_90", SELECT, 0, 16, (LOAD,)), "select_kernel sm_90: 16 bytes of stack"),
        (("sm_90", SELECT, 0, 0, (LOAD, SPILL)), "select_kernel sm_90: 0 bytes of stack a thread, 1 accesses to it"),
        (("sm_86", SCORE, 0, 0, (LOAD, "FFMA R0, R1, R2, R3")), "sm_86: no tensor-core instruction"),
        (("sm_86", SCORE, 24, 0, (MMA,)), "score_kernel<Bf16Keys, 4> sm_86: 24 bytes of stack"),
    ],
    ids=["stack frame", "local memory", "spill", "no tensor core", "score with a frame"],
)
def test_what_is_wrong_fails(tmp_path, monkeypatch, capsys, planted, says):
    file = library(tmp_path, monkeypatch, [*GOOD[:2], planted])
    assert sass.main([str(file)]) == 1
    shown = capsys.readouterr().out
    assert says in shown
    assert shown.count("FAILED") == 1


def test_a_library_without_a_score_fails(tmp_path, monkeypatch, capsys):
    file = library(tmp_path, monkeypatch, GOOD[2:])
    assert sass.main([str(file)]) == 1
    assert "no score_kernel in there" in capsys.readouterr().out


def test_without_cuobjdump_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuobjdump, "find", lambda: None)
    assert sass.main(["library.so"]) == 0
    assert capsys.readouterr().out.startswith("left out:")


def test_a_cuobjdump_that_fails_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="exit status 1"):
        cuobjdump.read("/bin/false", tmp_path)


def test_names_are_short():
    assert sass.short("void specprefill::score_kernel<(specprefill::Kind)2, (int)4>(specprefill::P)") == (
        "score_kernel<2, 4>"
    )
    assert sass.short("specprefill::(anonymous namespace)::probe(int*)") == "probe"
