"""The whole pipeline: it runs, survives kills with bitwise the same result, replays, and stops cleanly.

One uninterrupted smoke run is the yardstick; every other run is compared with its metrics, rollouts and final weights.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longreach.engine.checkpoint import MANIFEST

pytestmark = pytest.mark.xdist_group("smoke-run")
_COST = ("timing_s/", "perf/")


def command(run_dir: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "longreach.rl.cli",
        "train",
        "smoke",
        "--run-dir",
        str(run_dir),
        "--run.threads",
        "1",
        *more,
    ]


def run(run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(run_dir, *more), capture_output=True, text=True, timeout=600)


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """All of them but what a clock measured."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(_COST)} for line in lines]


def outcome(run_dir: Path) -> dict[str, object]:
    """What must come out the same."""
    rollouts = {str(p.relative_to(run_dir)): p.read_bytes() for p in sorted((run_dir / "rollouts").glob("*/*.jsonl"))}
    evals = {p.name: p.read_bytes() for p in sorted((run_dir / "evals").glob("*"))}
    timed = [json.loads(line) for line in (run_dir / "timeline.jsonl").read_text().splitlines()]
    return {
        "metrics": json.dumps(metrics(run_dir)),
        "timed": [(line["stage"], line["step"]) for line in timed if line["kind"] == "step"],
        "weights": (run_dir / "model" / "model.safetensors").read_bytes(),
        "rollouts": rollouts,
        "evals": evals,
        "pool": (run_dir / "pool" / "phase1.jsonl").read_bytes(),
        "summary": (run_dir / "summary.json").read_bytes(),
    }


def assert_same(run_dir: Path, expected: dict[str, object]) -> None:
    found = outcome(run_dir)
    different = [name for name, value in expected.items() if found[name] != value]
    assert not different, f"{different} differ from the uninterrupted run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = run(run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


def kill_after_lines(run_dir: Path, lines: int, delay: float) -> None:
    """Starts or resumes, waits for so many metrics lines, a little more, and kills."""
    process = subprocess.Popen(command(run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = run_dir / "metrics.jsonl"
    while process.poll() is None and (not file.exists() or file.read_text().count("\n") < lines):
        time.sleep(0.02)
    time.sleep(delay)
    process.kill()
    process.wait()


KILL_IN_CHECKPOINT = """
import os, signal, sys
from longreach.engine import checkpoint
from longreach.rl import cli
seal, left = checkpoint._seal, [int(sys.argv.pop(1))]
def seal_or_die(folder):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    seal(folder)
checkpoint._seal = seal_or_die
cli.main(sys.argv[1:])
"""


def test_smoke_runs_the_whole_pipeline(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["base", "sft", "phase1", "phase2"]
    assert 0 < summary["chance"] < 1
    stages = [line["stage"] for line in metrics(whole)]
    assert stages == ["sft"] * 16 + ["phase1"] * 3 + ["phase2"] * 3
    phases = [line for line in metrics(whole) if line["stage"] != "sft"]
    assert any(line["grad_norm"] > 0 and line["reward_std"] > 0 for line in phases), "RL had nothing to learn from"
    assert (whole / "report.html").stat().st_size > 10_000
    assert (whole / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    rollouts = [
        json.loads(line) for line in next((whole / "rollouts" / "phase1").glob("*.jsonl")).read_text().splitlines()
    ]
    assert len(rollouts) == 16
    assert {"prompt_id", "completion", "rewards", "advantage", "logprobs", "kept_logmass"} <= rollouts[0].keys()


def test_killed_and_resumed_is_bitwise_the_same(whole: Path, tmp_path: Path) -> None:
    run_dir, draw = tmp_path / "run", random.Random(0)
    kill_after_lines(run_dir, 0, 5.0)  # start-up or the first evaluation
    for lines in (1, 8, 17, 20):  # within SFT, phase 1 and phase 2, and wherever the delay leads
        kill_after_lines(run_dir, lines, draw.uniform(0.0, 1.5))
    assert run(run_dir).returncode == 0
    assert_same(run_dir, outcome(whole))


def test_killed_inside_a_checkpoint_then_damaged_then_finished(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(run_dir)[3:]
    died = subprocess.run([sys.executable, "-c", KILL_IN_CHECKPOINT, "4", *arguments], capture_output=True, timeout=600)
    assert died.returncode == -signal.SIGKILL
    folders = sorted((run_dir / "checkpoints").glob("[0-9]*"))
    assert len(folders) == 2
    assert all((folder / MANIFEST).exists() for folder in folders)
    weights = folders[-1] / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    done = run(run_dir)
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stdout + done.stderr
    assert f"at step {int(folders[0].name)}" in done.stdout
    assert_same(run_dir, outcome(whole))


def test_ctrl_c_saves_and_the_same_command_goes_on(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen(command(run_dir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not (run_dir / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert run(run_dir).returncode == 0
    assert_same(run_dir, outcome(whole))


def test_replay_trains_on_saved_rollouts_without_generating(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run(run_dir, "--replay", str(whole)).returncode == 0
    assert (run_dir / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()
    assert not any("timing_s/gen" in line for line in (run_dir / "metrics.jsonl").read_text().splitlines())


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before = outcome(whole)
    assert run(whole).returncode == 0
    assert_same(whole, before)


def test_another_recipe_in_the_same_folder_is_refused(whole: Path) -> None:
    refused = run(whole, "--rl.clip-low", "0.1")
    assert refused.returncode == 2
    assert "another recipe" in refused.stderr
    assert "clip_low" in refused.stderr
