"""Two evaluations side by side: real folders, flips both ways, and what can't be compared."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.rl import cli
from longreach.rl.benchmarks.compare import compare, compare_folders, comparison_tables, write_comparison
from longreach.rl.benchmarks.registry import SEVEN
from longreach.rl.benchmarks.run import run_evaluation

from .. import browser
from ..browser import needs_browser

Settings = Callable[..., Any]


_TWO: list[tuple[Path, Path]] = []


@pytest.fixture
def two(
    served: Any, server: Any, settings: Settings, tmp_path_factory: pytest.TempPathFactory, quiet: Any
) -> tuple[Path, Path]:
    """A: right on the even questions of all, and wrong with a pipe and HTML in its answer. B: right on 1 and 3, and on 0 of docmath."""
    if not _TWO:  # made once: no test writes into them
        right, root = served.answer, tmp_path_factory.mktemp("two")
        served.answer = lambda name, i: right(name, i) if i % 2 == 0 else "7 <b>|</b>"
        run_evaluation(settings(server.url, served_name="a"), root / "a", quiet, {})
        served.answer = lambda name, i: right(name, i) if i % 2 or (name == "docmath" and i == 0) else "9"
        run_evaluation(settings(server.url, served_name="b"), root / "b", quiet, {})
        _TWO.append((root / "a", root / "b"))
    return _TWO[0]


def test_differences_and_flips(two: tuple[Path, Path]) -> None:
    made = compare_folders(*two)
    assert made.names == ("a", "b")
    assert made.differences["docmath"]["score"].mean == pytest.approx(0.25)
    assert made.differences["qasper"]["rule"].mean == 0.0
    assert made.differences["average"]["score"].mean == pytest.approx(0.25 / 7)
    assert made.differences["qasper"]["judge"].mean is None
    assert sum(flip.gained for flip in made.flips) == 14 and sum(not flip.gained for flip in made.flips) == 13
    [lost] = [flip for flip in made.flips if flip.benchmark == "docmath" and not flip.gained]
    assert (lost.id, lost.question, lost.gold) == ("docmath-2", "What is item 2 of docmath?", ("102",))
    assert (lost.before, lost.after) == (("102",), ("9",))
    back = compare_folders(two[1], two[0])
    assert back.differences["docmath"]["score"].mean == pytest.approx(-0.25)
    assert {flip.id for flip in back.flips if flip.gained} == {flip.id for flip in made.flips if not flip.gained}


def test_a_model_and_itself_do_not_differ(two: tuple[Path, Path]) -> None:
    made = compare_folders(two[0], two[0])
    assert not made.flips
    assert {d.p for row in made.differences.values() for m, d in row.items() if m != "judge"} == {1.0}


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("asked", "samples"), 4, "asked.samples: there 1, here 4"),
        (("asked", "temperature"), 0.0, "asked.temperature"),
        (("asked", "benchmarks", "qasper", "fingerprint"), "x", "asked.benchmarks.qasper.fingerprint"),
        (("scored", "judge"), {"model": "j"}, "scored.judge"),
        (("scored", "rule"), "cover", "scored.rule"),
    ],
)
def test_other_conditions_are_refused_by_name(
    two: tuple[Path, Path], path: tuple[str, ...], value: Any, words: str
) -> None:
    a, b = read(two[0]), copy.deepcopy(read(two[1]))
    at = b["conditions"]
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=f"were not evaluated alike.*{words}"):
        compare(a, b)


def test_other_questions_are_refused(two: tuple[Path, Path]) -> None:
    a, b = read(two[0]), read(two[1])
    b["questions"] = b["questions"][:-1]
    with pytest.raises(ValueError, match=r"don't hold the same questions \(the first is qasper qasper-3\)"):
        compare(a, b)


def test_another_tokenizer_is_told_not_refused(two: tuple[Path, Path]) -> None:
    a, b = read(two[0]), read(two[1])
    b["conditions"]["tokenizer"] = {"sha256": "other"}
    b["conditions"]["model"]["min_p and penalties"] = "as the server has them"
    b["counts"]["failed_requests"] = 3
    notes = compare(a, b).notes
    assert (
        notes[0].startswith("The two have different tokenizers")
        and notes[2].startswith("B: failed requests")
        and notes[2].endswith(": 3.")
    )
    assert notes[1] == "Sampling beyond temperature and top_p was off for A and as the server has them for B."


def test_no_finished_evaluation(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no results.json"):
        compare_folders(tmp_path, two[0])
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="no results file of this program"):
        compare_folders(tmp_path, two[0])


def test_the_command(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = map(str, two)
    assert cli.main(["compare", a, b, "--out", str(tmp_path / "c.html")]) == 0
    out = capsys.readouterr().out
    assert "A: a\nB: b" in out and "Gained: wrong in A, right in B (14)" in out and "and 4 more" in out
    assert "docmath" in out and "+25.0 [" in out
    page = (tmp_path / "c.html").read_text()
    assert "<script" not in page and "Lost: right in A, wrong in B (13)" in page and "<b>" not in page
    assert cli.main(["compare", a, b, "--out", str(tmp_path / "c.md")]) == 0
    assert cli.main(["compare", a, b, "--out", str(tmp_path / "c.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["differences"]["average"]["score"]["n"] == 28
    for arguments, words in (
        (["compare", a, b, "--out", "x.pdf"], "must be .html, .md or .json"),
        (["compare", a, str(tmp_path / "no")], "holds no results.json"),
        (["compare", a, b, "--force", "yes"], "compare takes no such option: --force"),
    ):
        assert cli.main(arguments) == 2
        assert words in capsys.readouterr().err


def test_the_first_table_counts_the_flips(two: tuple[Path, Path]) -> None:
    first = comparison_tables(compare_folders(*two))[0]
    rows = {row[0]: row for row in first.rows}
    assert rows["docmath"][-2:] == ("2", "1") and rows["average"][-2:] == ("14", "13")
    assert set(rows) == {*SEVEN, "average"}
    assert rows["docmath"][1:4] == ("4", "50.0", "75.0") and rows["average"][1] == "28"


@needs_browser
def test_a_browser_shows_the_comparison_within_its_window(two: tuple[Path, Path], tmp_path: Path) -> None:
    page = write_comparison(compare_folders(*two), tmp_path / "c.html")
    assert all(found <= width for width, found in browser.content_widths(page, tmp_path, 390, 1280).items())
    assert "7 &lt;b&gt;|&lt;/b&gt;" in browser.text(browser.dom(page, tmp_path / "profile"))
