"""Tools of the house tests: the project's files, and a clean copy of what is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PRODUCT = ("kernels", "engine", "rl")
NOT_OURS = {".git", ".venv", "runs", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache"}


@pytest.fixture(scope="session")
def files(root: Path) -> list[Path]:
    """Every file of the project, tracked or about to be; without git (an unpacked archive) whatever isn't built."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
        found = [root / name for name in listed if name]
    else:
        found = [path for path in root.rglob("*") if not NOT_OURS & set(path.relative_to(root).parts)]
    return sorted(path for path in found if path.is_file())


@pytest.fixture(scope="session")
def wheel_target(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a freshly built wheel of the project is installed, and nothing else."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"  # a copy: a build leaves folders behind, and would pack those of an earlier one
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in PRODUCT:
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(source)], work)
    (wheel,) = work.glob("longreach-*.whl")
    target = work / "target"
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], work)
    return target


def run(command: list[str], cwd: Path) -> str:
    """Standard output of a command that must succeed; its whole output is shown if it does not."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PIP_NO_INPUT": "1"})
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
