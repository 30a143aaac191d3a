"""The installed C library, as docs/integrations.md shows it. What is installed where: .ci/c_package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pages
import pytest

ROOT = pages.ROOT
SECTION = ("docs/integrations.md", "## C and C++")
MISSING = [tool for tool in ("cmake", "cc", "c++", "pkg-config") if shutil.which(tool) is None]

needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")


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
    build_and_install, _ = pages.blocks(*SECTION, "sh")
    run(build_and_install, folder)
    return folder


def test_no_block_escapes() -> None:
    assert pages.languages(*SECTION) == ["sh", "cmake", "c", "sh"]


@pytest.mark.slow
@needs_tools
def test_the_program_by_pkg_config(installed: Path) -> None:
    (installed / "keep.c").write_text(pages.blocks(*SECTION, "c")[0])
    assert run(pages.blocks(*SECTION, "sh")[1], installed) == "kept 200 of 1000 tokens, token 700 among them\n"


@pytest.mark.slow
@needs_tools
def test_the_program_by_cmake(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.c").write_text(pages.blocks(*SECTION, "c")[0])
    start = "cmake_minimum_required(VERSION 3.24)\nproject(keep LANGUAGES C)\nadd_executable(keep keep.c)\n"
    (tmp_path / "CMakeLists.txt").write_text(start + pages.blocks(*SECTION, "cmake")[0])
    prefix = installed / "build/prefix"
    run(f"cmake -S . -B build -DCMAKE_PREFIX_PATH='{prefix}'\ncmake --build build", tmp_path)
    assert run("build/keep", tmp_path) == "kept 200 of 1000 tokens, token 700 among them\n"


def test_the_version_asked_for_is_this_ones() -> None:
    version = re.search(r'SPECPREFILL_VERSION "(\d+\.\d+)\.', (ROOT / "csrc/include/specprefill.h").read_text())
    assert version is not None
    for place in ("docs/integrations.md", "examples/c_engine/CMakeLists.txt", "examples/cpp/CMakeLists.txt"):
        asked = re.findall(r"find_package\(specprefill (\S+) REQUIRED\)", (ROOT / place).read_text())
        assert asked == [version[1]], place


def test_files_that_it_names_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", pages.section(*SECTION)):
        assert (ROOT / "docs" / target).is_file(), target
