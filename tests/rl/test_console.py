"""The console: plain lines where there is no terminal, one line a step, warnings also when quiet."""

from __future__ import annotations

import math

import pytest

from longreach.rl import console as module
from longreach.rl.console import Console


def test_one_metrics_line_without_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"loss": 0.12345, "reward": math.nan, "learning_rate": 2e-6, "perf/throughput": 1234.5, "other": 1.0}
    Console().metrics("phase1", 3, 60, values)
    assert capsys.readouterr().out == "phase1 3/60 | loss 0.123 | lr 2.0e-06 | tok/s 1234\n"


def test_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Console(quiet=True)
    quiet.say("hidden")
    quiet.metrics("sft", 1, 2, {"loss": 1.0})
    quiet.warn("disk full")
    with quiet.progress("evaluating", 3) as advance:
        advance(3)
    assert capsys.readouterr().out == "warning: disk full\n"


def test_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """No markup, no emoji codes, no wrapping: paths and recipes are to be copied."""
    text = "[model]\npath = 'a:smile:b' [bold]x[/bold] " + "y" * 300
    Console().say(text)
    assert capsys.readouterr().out == text + "\n"


def test_progress_is_a_plain_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Console().progress("evaluating base", 10) as advance:
        for _ in range(10):
            now[0] += 4.0
            advance()
    assert capsys.readouterr().out == "evaluating base: 4/10, 0:00:24 left\nevaluating base: 8/10, 0:00:08 left\n"
