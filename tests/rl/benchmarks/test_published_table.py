"""The published table: whole, consistent, and never set beside ours without what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.rl.benchmarks.published_table import PATH, published_table, unlike_published
from longreach.rl.benchmarks.registry import BENCHMARKS, SEVEN


def test_all_rows_are_there_and_average_to_what_is_printed() -> None:
    table = published_table()
    assert len(table.rows) == 18
    rows = {row.model: row for row in table.rows}
    assert rows["QwenLong-L1-32B-DAPO"].average == 70.7 and rows["QwenLong-L1-32B-DAPO"].scores["musique"] == 69.0
    assert rows["OpenAI-o1-preview"].scores["frames"] == 80.8 and "69.2" in rows["OpenAI-o1-preview"].note
    for row in table.rows:
        assert tuple(row.scores) == SEVEN
        assert abs(sum(row.scores.values()) / 7 - row.average) <= 0.05 + 1e-9
    assert {name: BENCHMARKS[name].questions for name in SEVEN} == dict(table.questions)


def edited(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads(PATH.read_text())
    change(data)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d["rows"][3]["scores"].__setitem__(2, 91.5), "Qwen3-Plus average 70.471, not 70.3"),
        (lambda d: d["rows"][0]["scores"].pop(), "OpenAI-o1-preview has 6 scores for 7"),
        (lambda d: d["benchmarks"].__setitem__(0, "docs"), "not the seven benchmarks"),
    ],
)
def test_a_cell_copied_wrongly_shows(tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        published_table(edited(tmp_path, change))


def results(**asked: Any) -> dict[str, Any]:
    table = published_table()
    names = {name: {"questions": count} for name, count in table.questions.items()}
    given = {k: table.conditions[k] for k in ("samples", "max_input", "max_output", "temperature", "top_p")}
    whole = {"benchmarks": names, **given, "top_k": 0, "truncation": "middle of the document", **asked}
    return {"conditions": {"asked": whole, "scored": {"rule": "strict", "judge": None}}}


def test_what_differs_is_named() -> None:
    table = published_table()
    alike = unlike_published(results(), table)
    assert any(text.startswith("judge: none here, DeepSeek-V3") for text in alike)
    assert any(text.startswith("rule: strict here, qwenlong-l1-eval there") for text in alike)
    assert any(text.startswith("failed requests: wrong here") for text in alike)
    assert len(alike) == 5
    made = unlike_published(
        results(samples=4, max_input=32768, top_k=20, benchmarks={"docmath": {"questions": 50}}), table
    )
    assert "samples: 4 here, 1 there" in made and "max_input: 32768 here, 120000 there" in made
    assert "top_k: 20 here, none there" in made and "docmath: 50 questions here, 200 there" in made
    assert "frames: not asked here" in made
