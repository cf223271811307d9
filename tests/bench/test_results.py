"""The file of rows: whole at any moment, a row replaced and never doubled, and skipped only for the same sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import results

MakeRow = Callable[..., dict[str, Any]]


def test_rows_are_appended_and_replaced(tmp_path: Path, row: MakeRow) -> None:
    path = tmp_path / "new" / "rows.json"
    assert results.load(path) == []
    first, other = row(), row(contender="torch")
    results.append(path, first)
    results.append(path, other)
    assert results.load(path) == [first, other]
    newer = row(sources="s2", median_s=0.2)
    results.append(path, newer)
    assert results.load(path) == [other, newer]
    assert list(path.parent.iterdir()) == [path]  # nothing unfinished is left
    assert len(path.read_text().splitlines()) == 4  # a row a line


@pytest.mark.parametrize("field", results.PLACE)
def test_another_place_is_another_row(row: MakeRow, field: str) -> None:
    assert results.identity(row()) != results.identity(row(**{field: {"N": 9} if field == "dims" else "other"}))


def test_the_order_of_dims_is_no_difference(row: MakeRow) -> None:
    assert results.identity(row()) == results.identity(row(dims={"V": 16, "D": 4, "N": 8}))


def test_what_stands_is_measured_on_the_same_sources(row: MakeRow) -> None:
    rows = [
        row(),
        row(contender="gap", status="gap", reason="failed: RuntimeError: out of memory"),
        row(contender="older", sources="s0"),
        row(contender="crash", status="gap", reason="failed: AcceleratorError: CUDA error: illegal memory access"),
    ]
    assert results.measured(rows, "s1") == {results.identity(row()), results.identity(row(contender="crash"))}


def test_the_fingerprint_follows_the_sources(tmp_path: Path) -> None:
    for name in ("kernels", "engine", "rl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1\n")
    before = results.fingerprint(tmp_path)
    (tmp_path / "rl" / "a.py").write_text("x = 2\n")
    assert results.fingerprint(tmp_path) == before
    (tmp_path / "kernels" / "a.py").write_text("x = 2\n")
    assert results.fingerprint(tmp_path) != before


def test_outside_a_checkout_the_commit_is_unknown(tmp_path: Path) -> None:
    assert results.commit(tmp_path) == "unknown"


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"other": 1})])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="not a file of bench rows"):
        results.load(tmp_path / "x.json")


def test_conditions_name_what_a_reader_needs() -> None:
    found = results.conditions("cpu", "1234")
    assert found["commit"] == "1234"
    assert found["sources"] == results.fingerprint()
    assert found["device"].endswith("cores")
    assert found["threads"] >= 1
    assert {"driver", "torch", "triton", "python", "date"} <= found.keys()
