"""bench/gpu.sh as far as a machine without a GPU goes: its surroundings, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import ops, results, stage

NOW = {"sources": "s1", "device": "GPU X", "torch": "2.11", "triton": "3.6", "tests": "t1"}
GREEN = {"green": True, "commit": "abc", "summary": "4 passed", **NOW}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a CUDA device")


def gpu_sh(root: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OUT": str(out), "PYTHON": sys.executable}
    return subprocess.run([str(root / "bench" / "gpu.sh"), *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "have not been run"),
        ({**GREEN, "sources": "s0"}, "other sources (s0, now s1)"),
        ({**GREEN, "device": "GPU Y", "torch": "2.10"}, "other device (GPU Y, now GPU X), torch (2.10, now 2.11)"),
        ({**GREEN, "tests": "t0"}, "other tests (t0, now t1)"),
        ({**GREEN, "green": False, "summary": "1 failed"}, "red (1 failed)"),
    ],
)
def test_no_green_check_no_measurement(record: dict[str, Any] | None, reason: str) -> None:
    assert reason in stage.red(record, NOW)


def test_a_green_check_of_these_sources_is_enough() -> None:
    assert stage.red(GREEN, NOW) == ""


def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    program = "import subprocess, sys, pathlib\np = subprocess.Popen(['sleep', '60'])\n"
    program += f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(p.pid))\np.wait()"
    with pytest.raises(subprocess.TimeoutExpired):
        stage.run_group([sys.executable, "-c", program], 5.0)
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/status")
    for _ in range(50):  # a killed process takes a moment to go
        if not state.exists() or "State:\tZ" in state.read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} lives on")


@pytest.mark.parametrize(
    ("code", "passed", "failed", "skipped", "green"),
    [(0, 4, 0, 0, True), (0, 0, 0, 4, False), (1, 3, 1, 0, False), (5, 0, 0, 0, False), (124, 3, 0, 0, False)],
)
def test_green_means_that_tests_ran(code: int, passed: int, failed: int, skipped: int, green: bool) -> None:
    found = stage.verdict(code, {"passed": passed, "failed": failed, "skipped": skipped})
    assert found["green"] is green
    assert found["summary"] == f"{passed} passed, {failed} failed, {skipped} skipped, pytest's status {code}"


def test_tests_are_counted_from_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert stage.count(report) == {"passed": 0, "failed": 0, "skipped": 0}
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>'
        '<testcase name="c"><error/></testcase><testcase name="d"><skipped/></testcase></testsuite></testsuites>'
    )
    assert stage.count(report) == {"passed": 1, "failed": 2, "skipped": 1}


def test_the_gpu_tests_are_collected_without_any_plugin(tmp_path: Path) -> None:
    """A GPU machine may lack xdist, whose marker the tests carry, and what tests of other files need."""
    command = [*stage.pytest_command(tmp_path / "report.xml"), "--collect-only", "-p", "no:xdist"]
    assert not [name for name in command if name.endswith("test_lora.py")]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_completions.py" in done.stdout
    assert "test_cuda_clock_and_peak" in done.stdout


def test_a_new_folder_begins_with_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, out = tmp_path / "known", tmp_path / "out"
    known.mkdir()
    (known / "gpu-step.json").write_text("old")
    monkeypatch.setattr(results, "FOLDER", known)
    stage.seed(out / "gpu-step.json")
    stage.seed(out / "gpu-check.json")
    assert (out / "gpu-step.json").read_text() == "old"
    (out / "gpu-step.json").write_text("newer")
    stage.seed(out / "gpu-step.json")
    assert (out / "gpu-step.json").read_text() == "newer"
    assert not (out / "gpu-check.json").exists()


def test_an_unknown_stage_prints_the_usage(root: Path, tmp_path: Path) -> None:
    done = gpu_sh(root, tmp_path, "everything")
    assert done.returncode == 2
    for name in ("check", *stage.STAGES):
        assert f"bench/gpu.sh {name} " in done.stderr
    assert "set -euo" not in done.stderr


def test_stages_refuse_without_a_check_and_on_red(root: Path, tmp_path: Path) -> None:
    done = gpu_sh(root, tmp_path, "kernels")
    assert (done.returncode, done.stdout) == (2, "")
    assert "have not been run" in done.stderr
    record = {**GREEN, **stage.checked(), "green": False}
    (tmp_path / "gpu-check.json").write_text(json.dumps(record))
    done = gpu_sh(root, tmp_path, "step")
    assert done.returncode == 2
    assert "red (4 passed)" in done.stderr
    assert not (tmp_path / "gpu-step.json").exists()


@without_gpu
def test_stages_refuse_without_a_gpu(root: Path, tmp_path: Path) -> None:
    (tmp_path / "gpu-check.json").write_text(json.dumps({**GREEN, **stage.checked()}))
    for name in ("attention", "headline", "check"):
        done = gpu_sh(root, tmp_path, name)
        assert done.returncode == 2
        assert "no CUDA device" in done.stderr


def test_the_folders_are_importable_without_installing(root: Path, tmp_path: Path) -> None:
    program = "import longreach.kernels as k, longreach.engine as e, bench.runner as b; print(k.__file__, e.__file__, b.__file__)"  # fmt: skip
    done = gpu_sh(root, tmp_path, "with", sys.executable, "-P", "-c", program)
    assert done.returncode == 0, done.stderr
    for found, name in zip(done.stdout.split(), ("kernels", "engine", "bench"), strict=True):
        assert not found.startswith(str(root))
        assert found.split("/")[-2] == name
        assert not Path(found).exists()  # the links are gone with the run


def test_the_longest_of_the_headline_begins_first() -> None:
    """What begins within the budget must end within the stage's time, and the longest takes minutes."""
    lengths = [case.dims["P"] for case in ops.cases(ops.load_op("headline"), "headline", "cuda", "default")]
    assert lengths == sorted(lengths, reverse=True) == [120 << 10, 64 << 10, 32 << 10, 16 << 10]


def test_a_stage_measures_its_ops_into_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(stage.bench, "main", lambda command: given.append(command) or 0)
    options = SimpleNamespace(stage="headline", out=tmp_path, shapes="default", commit="abc")
    assert stage.run_ops(options) == 0  # type: ignore[arg-type]
    (command,) = given
    assert command[0] == "headline"
    assert command[command.index("--out") + 1] == str(tmp_path / "gpu-headline.json")
    assert int(command[command.index("--budget") + 1]) < stage.LIMIT_S
    assert all(set(names) <= set(ops.NAMES) for names in stage.STAGES.values())


def test_a_small_run_with_nothing_but_what_the_stages_need(root: Path, tmp_path: Path) -> None:
    """No rich, no matplotlib, no pytest-benchmark: rows all the same, by statistics of our own."""
    rows = tmp_path / "rows.json"
    arguments = ["attention", "--device", "cpu", "--shapes", "small", "--dtype", "float32", "--seconds", "0"]
    arguments += ["--commit", "1234", "--out", str(rows)]
    program = f"""
import sys
sys.modules.update(dict.fromkeys(("rich", "matplotlib", "pytest_benchmark", "datasets", "httpx")))
from bench.__main__ import main
sys.exit(main({arguments!r}))
"""
    done = gpu_sh(root, tmp_path, "with", sys.executable, "-P", "-c", program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no picture" in done.stdout
    assert "contender" in done.stdout
    found = results.load(rows)
    ours = [row for row in found if row["contender"] == "longreach, cpu"]
    assert [row["pass"] for row in ours] == ["forward", "backward", "both"]
    assert all(row["status"] == "measured" and row["commit"] == "1234" for row in ours)
    assert {row["statistics"] for row in ours} == {"own"}
    assert any(row["contender"] == "flash-attention 3" and row["status"] == "gap" for row in found)
