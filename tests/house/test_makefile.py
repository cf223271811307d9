"""How set-up finds its Python: a name on the PATH that doesn't run, or runs something else, is passed over."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

MAKE = shutil.which("make") or "make"
SHIM = "#!/bin/sh\necho 'no such version is installed' >&2\nexit 127\n"
OLD = "#!/bin/sh\nexit 1\n"  # what the probe does in a Python that is too old


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def pick(root: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [MAKE, "--silent", "--no-print-directory", "python", *arguments]
    return subprocess.run(command, cwd=root, env={"PATH": str(folder)}, capture_output=True, text=True)


def real(folder: Path, name: str) -> None:
    program(folder, name, f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')


def test_python3_is_taken_where_it_fits(root: Path, tmp_path: Path) -> None:
    for name in ("python3", "python3.12", "python3.11"):
        real(tmp_path, name)
    assert pick(root, tmp_path).stdout == "python3\n"


def test_broken_shims_and_old_versions_are_passed_over(root: Path, tmp_path: Path) -> None:
    program(tmp_path, "python3", OLD)
    program(tmp_path, "python3.12", SHIM)
    real(tmp_path, "python3.11")
    assert pick(root, tmp_path).stdout == "python3.11\n"


def test_the_version_is_asked_of_the_interpreter(root: Path, tmp_path: Path) -> None:
    """Whatever the name says: this one's `sys.version_info` is that of Python 3.13."""
    lie = "import sys; sys.version_info = (3, 13, 0); exec(sys.argv.pop(1))"
    program(tmp_path, "python3", f'#!/bin/sh\nshift\nexec "{sys.executable}" -c "{lie}" "$@"\n')
    real(tmp_path, "python3.12")
    assert pick(root, tmp_path).stdout == "python3.12\n"


def test_no_python_is_an_error_that_names_the_way_out(root: Path, tmp_path: Path) -> None:
    program(tmp_path, "python3", SHIM)
    done = pick(root, tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "error: no usable Python 3.11 or 3.12" in done.stderr
    assert "make setup PYTHON=" in done.stderr


def test_a_named_python_that_does_not_fit_is_not_replaced(root: Path, tmp_path: Path) -> None:
    real(tmp_path, "python3")
    program(tmp_path, "other", OLD)
    done = pick(root, tmp_path, "PYTHON=other")
    assert done.returncode != 0
    assert "among: other" in done.stderr


def test_ci_runs_what_a_developer_runs(root: Path) -> None:
    script = root / ".ci" / "run"
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    assert lines[-1] == "exec make test"
    assert script.stat().st_mode & 0o111
