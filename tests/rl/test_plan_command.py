"""`longreach plan` from the command line: what it prints, its statuses, and its mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from longreach.rl import cli

Result = tuple[int, str, str]


@pytest.fixture
def longreach(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        status = cli.main(arguments)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_a_plan_is_printed(longreach: Callable[..., Result]) -> None:
    bare = ("--model.offload-activations", "false", "--model.tile-tokens", "0")
    status, out, _ = longreach("plan", "one-gpu-8b-lora", "--gpu", "h100-80", *bare)
    assert status == 0
    assert "on 1 x h100-80 (75.2 GB usable each)" in out and "--model.tile-tokens 8192" in out


def test_nothing_fits_is_a_status(longreach: Callable[..., Result]) -> None:
    status, out, _ = longreach("plan", "qwenlong-l1-32b", "--gpu", "rtx-4090")
    assert status == 3
    assert "nothing fits" in out


def test_recipe_keys_change_the_plan(longreach: Callable[..., Result]) -> None:
    keys = ("--phases.2.upper", "30000", "--phases.1.upper", "25000")
    _, longer, _ = longreach("plan", "one-gpu-8b-lora")
    _, shorter, _ = longreach("plan", "one-gpu-8b-lora", *keys)
    assert longer != shorter


def test_a_custom_gpu(longreach: Callable[..., Result]) -> None:
    status, out, _ = longreach("plan", "smoke", "--gpu", "custom", "--gpu-memory-gb", "48", "--gpus", "2")
    assert status == 0 and "on 2 x custom (45.1 GB" in out


@pytest.mark.parametrize("ranks", [(), ("--gpus", "4", "--parallel.ring", "2", "--parallel.schedule", "ring")])
def test_a_trace_stands_beside_the_formulas(
    longreach: Callable[..., Result], tiny_dir: Path, ranks: tuple[str, ...]
) -> None:
    keys = ("--model.path", str(tiny_dir), "--model.dtype", "bfloat16")
    status, out, _ = longreach("plan", "smoke", *keys, "--trace", *ranks)
    lines = [line for line in out.partition("traced without memory")[2].splitlines() if "phase" in line and "%" in line]
    assert status == 0 and len(lines) == 2
    for line in lines:
        assert "+0.00%" in line or "-0.00%" in line  # operations, to the last digit


def test_a_sweep_is_drawn(longreach: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longreach.rl import plan_sweep

    monkeypatch.setattr(plan_sweep.sweep, "__defaults__", ((16_000, 1_000_000), (1, 8)))
    status, out, _ = longreach("plan", "one-gpu-8b-lora", "--what-if", "--out", str(tmp_path / "x.png"))
    assert status == 0 and "what if: phase3's step" in out
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("one-gpu-8b-lora", "--gpu", "h20"), "did you mean 'h200'"),
        (("one-gpu-8b-lorra",), "did you mean 'one-gpu-8b-lora'"),
        (("smoke", "--gpus", "0"), "--gpus must be at least 1"),
        (("smoke", "--gpu", "custom"), "needs --gpu-memory-gb"),
        (("smoke", "--model.path", "/nowhere/model"), "--model-config DIR"),
        (("smoke", "--rl.learning", "3"), "unknown key 'rl.learning'"),
    ],
)
def test_mistakes_are_one_message(longreach: Callable[..., Result], arguments: tuple[str, ...], words: str) -> None:
    status, _, err = longreach("plan", *arguments)
    assert status == 2 and words in err and "Traceback" not in err


def test_train_asks_the_planner_first(longreach: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, _, err = longreach("train", "one-gpu-8b-lora", "--run-dir", str(folder), "--model.device", "cpu")
    assert status == 2 and "can't fit" in err and "--force" in err
    assert not folder.exists()
