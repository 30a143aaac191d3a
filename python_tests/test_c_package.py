"""The installed C library, as docs/integrations.md shows it. What is installed where: .ci/c_package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/integrations.md").read_text(encoding="utf-8")
SECTION = PAGE.split("\n## C and C++\n")[1].split("\n## ")[0]
MISSING = [tool for tool in ("cmake", "cc", "c++", "pkg-config") if shutil.which(tool) is None]

needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTION, flags=re.MULTILINE | re.DOTALL)


def run(commands: str, folder: Path) -> str:
    """Lines of sh, ended by the first that fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("DESTDIR", "PKG_CONFIG_PATH")}
    environment |= {"CUDACXX": "/nowhere/nvcc", "CFLAGS": "-Wall -Wextra -Werror"}
    done = subprocess.run(["sh", "-ec", commands], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "warning" not in (done.stdout + done.stderr).lower()
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the sources, in which the page's first block was run."""
    folder = tmp_path_factory.mktemp("c_package")
    for name in ("CMakeLists.txt", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("emulation", "check", "__pycache__"))
    build_and_install, _ = blocks("sh")
    run(build_and_install, folder)
    return folder


def test_no_block_escapes() -> None:
    assert set(re.findall(r"^```(\w+)", SECTION, flags=re.MULTILINE)) == {"sh", "cmake", "c"}
    assert [len(blocks(language)) for language in ("sh", "cmake", "c")] == [2, 1, 1]


@pytest.mark.slow
@needs_tools
def test_the_program_by_pkg_config(installed: Path) -> None:
    (installed / "keep.c").write_text(blocks("c")[0])
    assert run(blocks("sh")[1], installed) == "kept 200 of 1000 tokens, up to token 999\n"


@pytest.mark.slow
@needs_tools
def test_the_program_by_cmake(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.c").write_text(blocks("c")[0])
    start = "cmake_minimum_required(VERSION 3.24)\nproject(keep LANGUAGES C)\nadd_executable(keep keep.c)\n"
    (tmp_path / "CMakeLists.txt").write_text(start + blocks("cmake")[0])
    prefix = installed / "build/prefix"
    run(f"cmake -S . -B build -DCMAKE_PREFIX_PATH='{prefix}'\ncmake --build build", tmp_path)
    assert run("build/keep", tmp_path) == "kept 200 of 1000 tokens, up to token 999\n"


def test_the_version_asked_for_is_this_ones() -> None:
    version = re.search(r'SPECPREFILL_VERSION "(\d+\.\d+)\.', (ROOT / "csrc/include/specprefill.h").read_text())
    assert version is not None
    for place in ("docs/integrations.md", "examples/c_engine/CMakeLists.txt", "examples/cpp/CMakeLists.txt"):
        asked = re.findall(r"find_package\(specprefill (\S+) REQUIRED\)", (ROOT / place).read_text())
        assert asked == [version[1]], place


def test_files_that_it_names_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", SECTION):
        assert (ROOT / "docs" / target).is_file(), target
