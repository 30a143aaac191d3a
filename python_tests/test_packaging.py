"""What an installation says about itself, and that it works without its compiled module."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import specprefill_kernels as spk
from specprefill_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(spk.__file__).parent

try:
    import setuptools
except ImportError:
    setuptools = None

needs_setup = pytest.mark.skipif(setuptools is None, reason="setuptools is not installed")
needs_compiled = pytest.mark.skipif(_native.unavailable() is not None, reason=str(_native.unavailable()))

# Runs in a process whose package has no compiled module.
WITHOUT_COMPILED = """
import sys
sys.modules["specprefill_kernels._C"] = None  # import says ImportError
import torch
import specprefill_kernels as spk
"""


def run_without_compiled(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILED + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_place_names_one_version():
    assert metadata.version("specprefill-kernels") == spk.__version__
    header = (ROOT / "csrc" / "include" / "specprefill.h").read_text()
    assert re.search(r'#define SPECPREFILL_VERSION "(.*)"', header).group(1) == spk.__version__
    assert f"## {spk.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@needs_compiled
def test_the_compiled_module_is_of_this_version():
    assert _native.module().version() == spk.__version__


@needs_compiled
def test_the_build_info_names_what_was_built():
    info = importlib.import_module("specprefill_kernels._build_info").BUILD_INFO
    assert info["compiled"] is True
    assert "generic" in info["isas"]
    assert _native.module().instruction_set() in info["isas"]
    assert info["cuda"] or info["left_out"]["cuda"], "CUDA is neither built nor is there a reason"
    assert info["cuda"] == hasattr(_native.module(), "cuda_architectures")
    shown = spk.show_config()
    if info["cuda"]:
        assert _native.module().cuda_architectures() == info["cuda_architectures"]
        assert f"{info['cuda_compiler']} for {info['cuda_architectures']}" in shown
    else:
        assert info["left_out"]["cuda"] in shown
    assert info["compiler"] in shown
    assert _native.module().instruction_set() in shown


@needs_compiled
@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_the_environment_lowers_the_instruction_set(isa):
    if isa not in importlib.import_module("specprefill_kernels._build_info").BUILD_INFO["isas"]:
        pytest.skip(f"{isa} is not in this build")
    code = "from specprefill_kernels import _C; print(_C.instruction_set())"
    env = {"SPECPREFILL_INSTRUCTION_SET": isa}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [isa], done.stderr


@needs_compiled
def test_the_stub_names_what_the_module_has():
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    declared = {node.name for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    present = {name for name in vars(_native.module()) if not name.startswith("_")}
    if not hasattr(_native.module(), "cuda_unavailable"):
        declared = {name for name in declared if "cuda" not in name}
    assert declared == present


@needs_compiled
def test_the_stub_counts_arguments_as_the_module_does():
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    module = _native.module()
    for node in stub.body:
        function = node
        if isinstance(node, ast.ClassDef):
            function = next(member for member in node.body if isinstance(member, ast.FunctionDef))
        if not isinstance(function, ast.FunctionDef):
            continue
        if "cuda" in node.name and not hasattr(module, "cuda_unavailable"):
            continue
        target = getattr(module, node.name)
        documented = (target.__init__ if isinstance(node, ast.ClassDef) else target).__doc__
        numbers = {int(number) for number in re.findall(r"\barg(\d+):", documented)}
        first = 1 if isinstance(node, ast.ClassDef) else 0  # self is named, not numbered
        assert numbers == set(range(len(function.args.posonlyargs) - first)), node.name


@pytest.fixture
def setup(monkeypatch):
    """setup.py's own functions: it is run, and sets up nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for variable in ("SPECPREFILL_BUILD", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX"):
        monkeypatch.delenv(variable, raising=False)
    return lambda: runpy.run_path(str(ROOT / "setup.py"))


def fake_nvcc(folder: Path, *lines: str) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    nvcc.chmod(0o755)
    return nvcc


@needs_setup
@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_found_where_the_environment_says(setup, tmp_path, monkeypatch, variable):
    nvcc = fake_nvcc(tmp_path)
    value = {"CUDACXX": nvcc, "PATH": nvcc.parent}.get(variable, tmp_path)
    monkeypatch.setenv(variable, str(value))
    assert setup()["find_nvcc"]() == str(nvcc)


@needs_setup
def test_an_nvcc_that_is_named_and_not_there_is_not_found(setup, monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    functions = setup()
    assert functions["find_nvcc"]() is None
    assert functions["cuda_left_out"](None).startswith("nvcc not found: install the CUDA toolkit")


@needs_setup
@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            [
                "echo 'In file included from cuda_runtime.h:1:' >&2",
                "echo '#error -- unsupported GNU version!' >&2",
                "exit 1",
            ],
            "#error -- unsupported GNU version!",
        ),
        (["echo 'Value c++17 is not defined'", "exit 1"], "Value c++17 is not defined"),
        (["exit 3"], "exit status 3"),
    ],
    ids=["host compiler", "old", "silent"],
)
def test_an_nvcc_that_does_not_compile_is_left_out_with_its_words(setup, tmp_path, lines, says):
    nvcc = fake_nvcc(tmp_path, *lines)
    assert setup()["cuda_left_out"](str(nvcc)) == f"{nvcc} does not compile a kernel here: {says}"


@needs_setup
def test_an_nvcc_that_compiles_is_used(setup, tmp_path, monkeypatch):
    nvcc = fake_nvcc(tmp_path, "exit 0")
    assert setup()["cuda_left_out"](str(nvcc)) is None
    monkeypatch.setenv("SPECPREFILL_BUILD", "cpu")
    assert setup()["cuda_left_out"](str(nvcc)) == "SPECPREFILL_BUILD=cpu"


def test_without_the_compiled_module_the_reference_works():
    out = run_without_compiled("""
state = spk.new_state(batch=1, look_ahead=2, max_len=64)
spk.score_layer_(state, torch.ones(1, 2, 4, 64), torch.ones(1, 2, 64, 64), pool_kernel_size=1)
print(round(float(state.sum()), 4))
""")
    assert float(out) == pytest.approx(2.0)  # each row's weights add up to 1


def test_without_the_compiled_module_a_request_for_cpu_says_why():
    out = run_without_compiled("""
state = spk.new_state(batch=1, look_ahead=1, max_len=8)
try:
    spk.score_layer_(state, torch.ones(1, 1, 1, 64), torch.ones(1, 1, 8, 64), backend="cpu")
except spk.BackendUnavailable as error:
    print(error)
""")
    assert "SPECPREFILL_BUILD" in out


def test_without_the_compiled_module_show_config_says_why():
    out = run_without_compiled("print(spk.show_config())")
    assert re.search(r"^no cpu .*SPECPREFILL_BUILD", out, re.MULTILINE)
    assert re.search(r"^op score_layer +reference$", out, re.MULTILINE)


def test_a_bare_import_needs_neither_transformers_nor_a_terminal_library():
    code = "import sys, specprefill_kernels; print([m for m in ('transformers', 'typer', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "_C.pyi").exists()
