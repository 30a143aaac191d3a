"""The ahead-of-time check itself: what it must catch is planted, and it must catch it."""

# ruff: noqa: E402  (nothing of this can be imported where triton is missing)

import os
import types
from dataclasses import dataclass

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: there is no compiler", allow_module_level=True)

import aot
import aot_compile
import aot_table
import triton.language as tl
from aot_compile import ARCHS
from aot_record import Room, record

from specprefill_kernels import _triton


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int = 4


SMALL, LARGE = Config(128), Config(256)


def choose(size: int) -> Config:
    return SMALL if size <= 1000 else LARGE


@triton.jit
def copy_kernel(source, target, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)


@triton.jit
def product_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, 10 * K, K):
        left = tl.load(a + m[:, None] * 1024 + (first + k)[None, :])
        right = tl.load(b + (first + k)[:, None] * 1024 + n[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], total)


def copy(size: int) -> None:
    x = torch.empty(size)
    config = heuristics.choose(size)
    grid = (triton.cdiv(size, config.block),)
    _triton.launch(copy_kernel, grid, x, x, size, on=x, BLOCK=config.block, num_warps=config.num_warps)


def product(m: int, n: int, k: int, *, dtype=torch.float16, precision="tf32", warps=4, stages=1) -> None:
    x, c = torch.empty(1 << 20, dtype=dtype), torch.empty(1 << 20)
    meta = {"M": m, "N": n, "K": k, "PRECISION": precision, "num_warps": warps, "num_stages": stages}
    _triton.launch(product_kernel, (1,), x, x, c, on=x, **meta)


heuristics = types.ModuleType("heuristics")
heuristics.choose = choose


def check(*runs, configs=(), arch="sm_86", strict=True):
    """(the figures of each kernel, what is wrong) of a room that makes these calls."""
    room = Room(
        "score",
        (heuristics,),
        configs=lambda arch: configs,
        factors={"run": runs},
        call=lambda options: options["run"](),
        needs_tensor_cores=strict,
    )
    recorded = record([room], [ARCHS[arch]])
    outcomes, wrong = aot.check([room], recorded, 1, False)
    return outcomes, wrong


def test_a_healthy_kernel_passes():
    outcomes, wrong = check(lambda: product(64, 64, 32))
    assert wrong == []
    [(job, result)] = outcomes
    assert result.tensor_core > 0
    assert result.has_dot
    assert result.registers > 16
    assert result.disassembled
    assert result.accesses > 0
    assert "64K" not in aot_table.table(outcomes, [job.arch])
    assert "product_kernel" in aot_table.table(outcomes, [job.arch])


def test_a_spill_is_found():
    # 256 x 128 fp32 sums in one warp are 1,024 registers a thread, which has 255.
    outcomes, wrong = check(lambda: product(256, 128, 16, warps=1))
    assert len(wrong) == 1
    assert "spills registers" in wrong[0]
    assert outcomes[0][1].stack > aot_table.PARKED
    assert outcomes[0][1].spilled > 0
    assert "SPILL" in aot_table.table(outcomes, [ARCHS["sm_86"]])


@pytest.mark.parametrize(("arch", "fits"), [("sm_86", False), ("sm_80", True)])
def test_too_much_shared_memory_is_found_where_it_is_too_much(arch, fits):
    # Two stages and one more of two 128 x 128 fp16 tiles: 128 KiB, between the limits of the two.
    _, wrong = check(lambda: product(128, 128, 128, warps=8, stages=3), arch=arch)
    assert [("shared memory" in line) for line in wrong] == ([] if fits else [True])


def test_a_dot_without_tensor_cores_is_found_in_the_rooms_that_need_them():
    def run():
        product(32, 32, 16, dtype=torch.float32, precision="ieee")

    _, wrong = check(run)
    assert len(wrong) == 1
    assert "no tensor-core instruction" in wrong[0]
    assert check(run, strict=False)[1] == []


def test_a_configuration_that_nothing_chooses_is_found():
    assert check(lambda: copy(100), lambda: copy(5000), configs=(SMALL, LARGE))[1] == []
    _, wrong = check(lambda: copy(100), configs=(SMALL, LARGE))
    assert len(wrong) == 1
    assert "choose Config(block=256" in wrong[0]
    assert "sm_86" in wrong[0]


def test_a_call_that_fails_or_launches_nothing_is_found():
    def fail():
        raise ValueError("no such thing")

    assert "no such thing" in check(fail)[1][0]
    assert "launched nothing" in check(lambda: None)[1][0]


def test_a_kernel_that_does_not_compile_is_found():
    _, wrong = check(lambda: product(64, 48, 32))
    assert len(wrong) == 1
    assert "power of 2" in wrong[0]


def test_a_grid_that_no_gpu_takes_is_found():
    def run():
        x = torch.empty(8)
        _triton.launch(copy_kernel, (1, 65536), x, x, 8, on=x, BLOCK=16)

    assert "65536" in check(run)[1][0]


def test_specialization_is_tritons_own():
    x = torch.empty(64)
    untouched = torch.empty(1, dtype=torch.uint8).expand(2**40)
    arguments = ((x, x[1:]), untouched, 2**33, 48, 7, 1, 0.5, None)

    @triton.jit
    def takes(pair, raw, far, even, odd, one, scale, nothing, BLOCK: tl.constexpr):
        pass

    launch = _triton.Launch(takes, (1,), arguments, {"BLOCK": 16, "num_warps": 8, "num_stages": 3})
    job = aot_compile.prepare(launch, ARCHS["sm_90"], "room", "", "call")
    assert job.signature == {
        "pair": ("*fp32", "*fp32"),
        "raw": "*u8",
        "far": "i64",
        "even": "i32",
        "odd": "i32",
        "one": "constexpr",
        "scale": "fp32",
        "nothing": "constexpr",
        "BLOCK": "constexpr",
    }
    assert job.constants == {(5,): 1, (7,): None, (8,): 16}
    divisible = {path for path, attributes in job.attrs.items() if ["tt.divisibility", 16] in attributes}
    assert divisible == {(0, 0), (1,), (2,), (3,)}
    assert (job.options.num_warps, job.options.num_stages) == (8, 3)


def test_equal_launches_are_compiled_once():
    outcomes, wrong = check(lambda: copy(160), lambda: copy(320), lambda: copy(321))
    assert wrong == []
    assert len(outcomes) == 2  # 160 and 320 are divisible by 16
