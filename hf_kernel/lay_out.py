"""Lays the ops out as a Hugging Face kernel: a tree that kernel-builder takes, made from the package's own files.

    python hf_kernel/lay_out.py FOLDER           build.toml, flake.nix, CARD.md, LICENSE, torch-ext/ and tests/
    python hf_kernel/lay_out.py FOLDER --build   and build/, as kernel-builder makes it of a kernel without compiled
                                                 parts: for kernels.get_local_kernel(FOLDER), with no Nix

What the kernel is called, and what it supports, is in build.toml beside this file. Python 3.11 or newer, nothing else.

A Hub kernel is loaded from any folder under a name of its own, so its modules import each other relatively, and its ops
are registered in a namespace of the build: `_ops`, which kernel-builder writes, names it. What a kernel may not hold
(compiled modules, anything that imports more than torch and triton) is left out, and what is left out is checked here.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGE = "specprefill_kernels"

# Beside ops/**. `_ops` is not among them: kernel-builder writes it.
MODULES = ("__init__", "_backends", "_checks", "_library", "_native", "_triton", "_version", "config")
# Rooms of ops that call the compiled module; available_backends() says that this version has none.
COMPILED = ("_cuda", "cuda", "native")
COMPILED_CPU = ("finalize", "gather", "score", "select", "select_tokens")  # sparse_attention/cpu.py is plain PyTorch
# Names of modules that are not laid out, as the others import them.
LEFT_OUT = {"_diagnosis": "show_config"}
MAY_IMPORT = {*sys.stdlib_module_names, "torch", "triton"}  # the Hub's rule


class LayoutError(Exception):
    """The package has something that a Hub kernel cannot have; the message names the file and the line."""


# ---- the files ----


def sources() -> list[Path]:
    """The modules of the package that the kernel is made of, relative to it."""
    package = ROOT / PACKAGE
    rooms = [
        path.relative_to(package)
        for path in sorted((package / "ops").rglob("*.py"))
        if path.stem not in COMPILED and not (path.stem == "cpu" and path.parent.name in COMPILED_CPU)
    ]
    return [*(Path(f"{name}.py") for name in MODULES), *rooms]


def relocated(text: str, path: Path, names: set[str]) -> str:
    """A module's text with relative imports in place of `from specprefill_kernels...`.

    Args:
        text: the module as it is in the package.
        path: where it lies in the package: ops/score/reference.py.
        names: the modules that are laid out, dotted: "_checks", "ops.score", "ops.score.reference".

    Raises:
        LayoutError: it imports what is not laid out or not allowed, or names the package in another way.
    """
    lines = text.splitlines(keepends=True)
    dots = "." * len(path.parts)
    tree = ast.parse(text)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        where = f"{PACKAGE}/{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                _check_allowed(alias.name, where)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.split(".")[0] != PACKAGE:
                _check_allowed(module, where)
                continue
            if node.level:
                raise LayoutError(f"{where}: expected an absolute import, got 'from {'.' * node.level}{module}'")
            inside = module[len(PACKAGE) :].removeprefix(".")
            if inside in LEFT_OUT:
                lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
                continue
            for alias in node.names:
                found = {inside, f"{inside}.{alias.name}".removeprefix(".")} & names or inside == "_ops"
                if not found:
                    raise LayoutError(f"{where}: imports {alias.name} from {module}, which is not laid out")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {module} import", f"from {dots}{inside} import", 1)
        elif (
            isinstance(node, ast.Constant)
            and id(node) not in docstrings
            and re.search(rf"\b{PACKAGE}\.\w", str(node.value))
        ):
            raise LayoutError(f"{where}: names a module of the package in a string: {node.value!r}")
    result = "".join(lines)
    for name in LEFT_OUT.values():
        result = re.sub(rf'^ *"{name}",\n', "", result, flags=re.MULTILINE)  # of __all__
    ast.parse(result)
    return result


def _check_allowed(module: str, where: str) -> None:
    if module.split(".")[0] not in MAY_IMPORT:
        raise LayoutError(f"{where}: a Hub kernel may import Python's own modules, torch and triton, not {module}")


def kernel_files() -> dict[Path, str]:
    """Path inside the kernel's module -> text."""
    paths = sources()
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {path: relocated((ROOT / PACKAGE / path).read_text(encoding="utf-8"), path, names) for path in paths}


# ---- the tree ----


def lay_out(folder: Path) -> Path:
    """Write the tree into a folder that is new, empty, or holds an earlier one. Returns its torch-ext/<name>.

    Raises:
        LayoutError: the folder holds something else, or the package something that a kernel cannot have.
    """
    build = read_build()
    files = kernel_files()
    if folder.exists() and any(folder.iterdir()):
        there = folder / "build.toml"
        if not there.is_file() or tomllib.loads(there.read_text())["general"]["name"] != build["general"]["name"]:
            raise LayoutError(f"{folder}: expected an empty folder or an earlier layout, got one with other files")
    for stale in ("torch-ext", "tests", "build"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    module = folder / "torch-ext" / module_name(build)
    for path, text in files.items():
        write(module / path, text)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copyfile(HERE / name, folder / name)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    shutil.copytree(HERE / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    return module


def read_build() -> dict[str, Any]:
    return tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))


def module_name(build: dict[str, Any]) -> str:
    name: str = build["general"]["name"]
    return name.replace("-", "_")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ---- a build without kernel-builder ----

OPS = '''"""The namespace of this build's ops."""

import torch

ops = torch.ops.{identity}


def add_op_namespace_prefix(name: str) -> str:
    return f"{identity}::{{name}}"
'''

# A loader that is older than 0.5 imports this folder instead of the one above it.
COMPATIBLE = '''"""For loaders that import this folder: everything of the folder above."""

import importlib.util
import sys
from pathlib import Path

_module = sys.modules.get("{identity}")
if _module is None:
    _spec = importlib.util.spec_from_file_location("{identity}", Path(__file__).parents[1] / "__init__.py")
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["{identity}"] = _module
    _spec.loader.exec_module(_module)
globals().update({{name: value for name, value in vars(_module).items() if not name.startswith("__")}})
'''


def build_variants(folder: Path, module: Path) -> list[Path]:
    """Write build/torch-<backend> for every backend: the module, its namespace, its metadata with a digest."""
    build = read_build()
    general = build["general"]
    files = {path.relative_to(module): path.read_text() for path in sorted(module.rglob("*.py"))}
    together = json.dumps({str(path): text for path, text in files.items()})
    unique = hashlib.sha256(together.encode()).hexdigest()[:7]
    variants = []
    for backend in general["backends"]:
        identity = f"_{module_name(build)}_{backend}_{unique}"
        variant = folder / "build" / f"torch-{backend}"
        for path, text in files.items():
            write(variant / path, text)
        write(variant / "_ops.py", OPS.format(identity=identity))
        write(variant / module_name(build) / "__init__.py", COMPATIBLE.format(identity=identity))
        about = {"type": backend}
        if backend == "cuda":
            about["archs"] = build["torch-noarch"]["cuda_capabilities"]
        metadata = {
            "name": general["name"],
            "id": identity,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": about,
            "digest": {"algorithm": "sha256", "files": digests(variant)},
        }
        write(variant / "metadata.json", json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    return variants


def digests(variant: Path) -> dict[str, str]:
    """Path -> SHA-256 in base64 of every file of a variant."""
    return {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*.py"))
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Lays the ops out as a Hugging Face kernel.")
    parser.add_argument("folder", type=Path, help="new, empty, or an earlier layout")
    parser.add_argument("--build", action="store_true", help="also build/, to load the kernel without kernel-builder")
    options = parser.parse_args(arguments)
    try:
        module = lay_out(options.folder)
        print(f"{module}: {len(list(module.rglob('*.py')))} modules")
        for variant in build_variants(options.folder, module) if options.build else ():
            print(variant)
    except LayoutError as error:
        print(f"lay_out: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
