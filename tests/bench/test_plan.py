"""The trace against memory that was really allocated, counted by the bench's own tool on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import plan  # pyright: ignore[reportAttributeAccessIssue]

CASES = plan.cases("cpu")


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_a_trace_is_what_was_measured(case: tuple[str, Any, Any, Any]) -> None:
    made = plan.measure(*case, "cpu")
    assert made.traced == pytest.approx(made.measured, rel=0.01)
    assert made.formula is None


def test_a_wrong_trace_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "measure", lambda what, *_: plan.Measured(what, 100, 115, None))
    assert plan.main(["--out", str(tmp_path / "plan.json")]) == 1
    assert "off by more than 10%" in capsys.readouterr().err
    rows = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert [row["what"] for row in rows] == [case[0] for case in CASES]
    assert plan.Measured("", 100, 100, 91.0).off == pytest.approx(0.09)
