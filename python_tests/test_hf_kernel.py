"""The ops as a Hugging Face kernel: what hf_kernel/lay_out.py writes, and that it works where this package is not."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pages
import pytest
import torch

import specprefill_kernels as spk

pytest.importorskip("tomllib", reason="hf_kernel/lay_out.py needs Python 3.11")

ROOT = pages.ROOT
TOOL = ROOT / "hf_kernel/lay_out.py"
SECTION = ("docs/integrations.md", "## Hugging Face kernels")
BACKENDS = ("reference", "triton")  # of most ops in the kernel

# The process has the kernel, and no specprefill_kernels.
ALONE = "import sys\nsys.modules['specprefill_kernels'] = None\n"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lay_out", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tree(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf_kernel")
    assert tool.main([str(folder), "--build"]) == 0
    return folder


def load(variant: Path) -> ModuleType:
    """As `kernels` imports a variant: under its id, by its path."""
    identity = json.loads((variant / "metadata.json").read_text())["id"]
    if identity not in sys.modules:
        spec = importlib.util.spec_from_file_location(identity, variant / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[identity] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[identity]


def python(code: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- the tree ----


def test_the_tree_is_what_kernel_builder_takes(tree: Path, tool: ModuleType) -> None:
    assert {path.name for path in tree.iterdir()} == {
        *("build.toml", "flake.nix", "CARD.md", "LICENSE", "torch-ext", "tests", "build")
    }
    name = tool.read_build()["general"]["name"]
    assert [path.name for path in (tree / "torch-ext").iterdir()] == [name.replace("-", "_")]
    assert not list((tree / "torch-ext").rglob("_ops.py"))  # kernel-builder writes it
    assert not list(tree.rglob("__pycache__"))
    assert {path.name for path in (tree / "build").iterdir()} == {"torch-cpu", "torch-cuda"}


def test_modules_import_each_other_by_dots_and_little_else(tree: Path) -> None:
    for path in (tree / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                absolute = [node.module or ""]
            for module in absolute:
                assert module.split(".")[0] in {*sys.stdlib_module_names, "torch", "triton"}, f"{path}: {module}"


def test_every_op_has_its_triton_kernel_and_its_definition(tree: Path) -> None:
    from specprefill_kernels import _backends

    for room in set(_backends.ROOMS.values()):
        folder = tree / "torch-ext/specprefill/ops" / room
        assert {"__init__.py", "reference.py", "triton_kernel.py"} <= {path.name for path in folder.iterdir()}
        assert not (folder / "cuda.py").exists()
        assert not (folder / "native.py").exists()


def test_metadata_says_what_build_toml_says(tree: Path, tool: ModuleType) -> None:
    general = tool.read_build()["general"]
    for backend in general["backends"]:
        metadata = json.loads((tree / f"build/torch-{backend}/metadata.json").read_text())
        assert re.fullmatch(rf"_specprefill_{backend}_[0-9a-f]{{7}}", metadata["id"])
        assert {key: metadata[key] for key in ("name", "version", "license")} == {
            key: general[key] for key in ("name", "version", "license")
        }
        assert metadata["backend"]["type"] == backend
        assert ("archs" in metadata["backend"]) == (backend == "cuda")


def test_a_layout_is_the_same_every_time_and_replaces_an_earlier_one(
    tree: Path, tool: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "again").mkdir()
    for _ in range(2):
        assert tool.main([str(tmp_path / "again"), "--build"]) == 0
        (tmp_path / "again/torch-ext/stale.py").touch()
    tool.main([str(tmp_path / "again"), "--build"])

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert contents(tmp_path / "again") == contents(tree)


def test_a_folder_with_other_files_is_left_alone(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert tool.main([str(tmp_path)]) == 1
    assert "expected an empty folder or an earlier layout" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("import numpy", "not numpy"),
        ("from transformers import AutoModel", "not transformers"),
        ("import specprefill_kernels", "not specprefill_kernels"),
        ("from specprefill_kernels.loop import SpecPrefill", "imports SpecPrefill from specprefill_kernels.loop"),
        ("def f():\n    from specprefill_kernels import _cuda", "imports _cuda from specprefill_kernels"),
        ("from . import _checks", "expected an absolute import"),
        ('NAME = "specprefill_kernels._C"', "in a string: 'specprefill_kernels._C'"),
    ],
)
def test_what_a_kernel_cannot_have_is_refused(tool: ModuleType, line: str, says: str) -> None:
    with pytest.raises(tool.LayoutError, match=re.escape(says)):
        tool.relocated(f'"""A room."""\n{line}\n', Path("ops/score/room.py"), {"_checks", "ops.score"})


def test_imports_become_relative_wherever_they_stand(tool: ModuleType) -> None:
    text = (
        '"""Uses specprefill_kernels.ops.score."""\n'
        "from specprefill_kernels import _checks\n"
        "from specprefill_kernels._ops import ops\n"
        "def f():\n    from specprefill_kernels.ops.score import (\n        new_state,\n    )\n"
    )
    names = {"_checks", "ops.score"}
    assert tool.relocated(text, Path("ops/score/room.py"), names) == (
        '"""Uses specprefill_kernels.ops.score."""\n'
        "from ... import _checks\n"
        "from ..._ops import ops\n"
        "def f():\n    from ...ops.score import (\n        new_state,\n    )\n"
    )
    assert tool.relocated(text, Path("_room.py"), names).splitlines()[1] == "from . import _checks"


# ---- the kernel ----


def all_ops(library: ModuleType, backend: str) -> list[torch.Tensor]:
    """Results of every op of a library, on fixed random inputs."""
    torch.manual_seed(1)
    queries = [torch.randn(2, 4, 6, 64) for _ in range(2)]
    keys = [torch.randn(2, 2, 150, 64) for _ in range(2)]
    seq_lens = torch.tensor([150, 90])
    state = library.new_state(batch=2, look_ahead=4, max_len=150)
    library.score_layers_(state, queries, keys, seq_lens=seq_lens, backend=backend)
    importance = library.finalize_importance(state, seq_lens, backend=backend)
    selection = library.select_chunks(importance, seq_lens, keep_ratio=0.5, tail=8, backend=backend)
    packed = library.gather_tokens(torch.arange(300).view(2, 150), selection, backend=backend)
    cache = library.gather_kv(keys[0], keys[1], selection, layout="bhtd", backend=backend)
    together = library.select_tokens(state, torch.arange(300).view(2, 150), seq_lens, keep_tokens=64, backend=backend)
    attention = library.sparse_prefill_attention(*(torch.randn(1, 2, 200, 64) for _ in range(3)), backend=backend)
    chosen = [selection.indices, selection.num_kept, selection.overflow, packed.values, packed.cu_seqlens]
    return [state, importance, *chosen, *cache, together.importance, together.selection.indices, attention]


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_computes_what_this_package_does(tree: Path, backend: str) -> None:
    """Side by side in one process: their ops are in namespaces of their own."""
    kernel = load(tree / "build/torch-cpu")
    reason = spk.available_backends("score_layers")[backend]
    assert kernel.available_backends("score_layers")[backend] == reason
    if reason is not None or (backend == "triton" and torch.cuda.is_available()):
        pytest.skip(f"{backend} on CPU tensors: {reason}")
    for own, expected in zip(all_ops(kernel, backend), all_ops(spk, backend), strict=True):
        assert torch.equal(own, expected)


def test_its_ops_are_its_own(tree: Path) -> None:
    kernel = load(tree / "build/torch-cpu")
    assert hasattr(getattr(torch.ops, kernel.__name__), "score_layers_")
    assert not hasattr(getattr(torch.ops, kernel.__name__), "no_such_op")
    assert kernel._library is not spk._library
    assert set(spk.__all__) - set(kernel.__all__) == {"show_config"}
    assert [name for name in kernel.__all__ if not hasattr(kernel, name)] == []


def test_what_is_not_in_it_says_so(tree: Path) -> None:
    kernel = load(tree / "build/torch-cpu")
    for op in ("score_layers", "finalize_importance", "select_chunks", "gather_tokens", "gather_kv", "select_tokens"):
        reasons = kernel.available_backends(op)
        assert [reasons[backend] for backend in ("cpu", "cuda")] == [
            f"this version has no {backend} implementation" for backend in ("cpu", "cuda")
        ]
    with pytest.raises(kernel.BackendUnavailable, match="this version has no cpu implementation"):
        kernel.select_chunks(torch.zeros(1, 64), keep_ratio=0.5, backend="cpu")


def test_torch_compile_sees_through_it(tree: Path) -> None:
    kernel = load(tree / "build/torch-cpu")
    importance = torch.rand(1, 64)
    compiled = torch.compile(kernel.select_chunks, fullgraph=True, backend="eager")
    assert torch.equal(
        compiled(importance, keep_ratio=0.5).indices, spk.select_chunks(importance, keep_ratio=0.5).indices
    )


@pytest.mark.parametrize("module", ["specprefill", None])
def test_its_own_tests_pass_without_this_package(tree: Path, tmp_path: Path, module: str | None) -> None:
    """Found by name, as kernel-builder's shells find it and as old loaders import it."""
    code = f"{ALONE}import pytest\nsys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests']))"
    folder = tree / "build/torch-cpu"
    if module is None:  # the variant folder itself is the module
        (tmp_path / "specprefill").symlink_to(folder)
        folder = tmp_path
    said = python(code, tree, PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")
    assert re.search(r"[3-9] passed", said), said


# ---- with the package `kernels` ----


@pytest.fixture
def hub() -> ModuleType:
    return pytest.importorskip("kernels", reason="pip install kernels")


def test_kernels_reads_build_toml(hub: ModuleType, tree: Path) -> None:
    from kernels._rust import Build

    assert [str(backend) for backend in Build.open(tree).general.backends] == ["cpu", "cuda"]


def test_kernels_agrees_with_the_digests(hub: ModuleType, tree: Path) -> None:
    from kernels._rust import Digest, Metadata

    for variant in (tree / "build").iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))  # raises where they differ
        assert metadata.name.python_name == "specprefill"


@pytest.mark.parametrize("how", ["get_local_kernel(Path('.'))", "get_kernel('someone/specprefill', version=0)"])
def test_kernels_loads_it_without_this_package(hub: ModuleType, tree: Path, how: str) -> None:
    code = f"{ALONE}from pathlib import Path\nfrom kernels import *\nspk = {how}\nprint(spk.__name__)"
    identity = json.loads((tree / "build/torch-cpu/metadata.json").read_text())["id"]
    assert python(code, tree, LOCAL_KERNELS=f"someone/specprefill={tree}").strip() == identity


def test_kernels_info_describes_it(hub: ModuleType, tree: Path) -> None:
    said = python("from kernels.cli import main; import sys; sys.argv[1:] = ['info', '.']; main()", tree)
    assert "Name: specprefill" in said
    assert "Backends: cpu, cuda" in said


# ---- the page ----


def test_no_block_escapes() -> None:
    assert pages.languages(*SECTION) == ["sh", "python"]
    calls = [
        block[0].split("\nstate = ")[1].split("\nprint")[0]
        for block in (pages.blocks(*SECTION, "python"), pages.blocks("hf_kernel/CARD.md", None, "python"))
    ]
    assert calls[0] == calls[1]  # the card shows the same


def test_the_pages_blocks_run(hub: ModuleType, tool: ModuleType, tmp_path: Path) -> None:
    command = pages.blocks(*SECTION, "sh")[0].split()
    assert command[:2] == ["python", str(TOOL.relative_to(ROOT))]
    assert tool.main([str(tmp_path / command[2]), *command[3:]]) == 0
    said = python(ALONE + pages.blocks(*SECTION, "python")[0], tmp_path)
    assert said.startswith("tensor([2")  # 200 of 1000 tokens, or 224 without the short last chunk
    assert "'reference': None" in said
