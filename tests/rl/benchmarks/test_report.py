"""The report: what it must show, what it must not run, and what strangers' texts can't do to it."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from longreach.rl.benchmarks import report
from longreach.rl.benchmarks.registry import SEVEN
from longreach.rl.benchmarks.run import run_evaluation

from .. import browser
from ..browser import needs_browser

Settings = Callable[..., Any]
HOSTILE = "</td><script>alert(1)</script> | x | `y` <img src=x onerror=alert(2)> \ud800 {{STYLE}}"


class Page(HTMLParser):
    """Cells by table title, every tag and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self._text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self._title_rows().append([])
        if tag in ("h2", "th", "td"):
            self._text = ""

    def _title_rows(self) -> list[list[str]]:
        return self.tables[next(reversed(self.tables))]

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "h2":
            self.tables[self._text] = []
        if tag in ("th", "td"):
            self._title_rows()[-1].append(self._text)


_MADE: list[dict[str, Any]] = []


@pytest.fixture
def results(
    served: Any, server: Any, settings: Settings, tmp_path_factory: pytest.TempPathFactory, quiet: Any
) -> dict[str, Any]:
    """All seven, half of them right, two samples, one question that the server refuses."""
    if not _MADE:
        right, well = served.answer, served.respond
        served.answer = lambda name, i: right(name, i) if i % 2 else "7"

        def respond(n: int, body: dict[str, Any]) -> Any:
            return server.http(400, "too long") if served.question(body) == ("frames", 0) else well(n, body)

        server.respond = respond
        _MADE.append(run_evaluation(settings(server.url, samples=2), tmp_path_factory.mktemp("report"), quiet, {}))
    return copy.deepcopy(_MADE[0])


def page_of(results: dict[str, Any]) -> Page:
    return Page(report.page("title", report.notes_of(results), report.tables(results)))


def test_our_row_stands_beside_the_published_ones_with_what_differs(results: dict[str, Any]) -> None:
    made = page_of(results)
    published = made.tables["Beside the published table (%)"]
    assert published[0] == ["model", *SEVEN, "average"]
    assert len(published) == 1 + 18 + 2
    assert ["QwenLong-L1-32B-DAPO", "67.5", "70.1", "90.5", "83.0", "69.0", "56.0", "58.5", "70.7"] in published
    ours = published[-2]
    assert ours[0] == "small (our score)" and all(cell.startswith("50.0[") for cell in ours[1:])
    told = [row[0] for row in made.tables["What differs from the published conditions"]]
    assert "samples: 2 here, 1 there" in told and "max_input: 400 here, 120000 there" in told
    assert "docmath: 4 questions here, 200 there" in told and any(text.startswith("judge: none here") for text in told)


def test_what_went_wrong_is_told(results: dict[str, Any]) -> None:
    made = page_of(results)
    assert [row[0:4] for row in made.tables["Failed requests"][1:]] == [
        ["frames", "frames-0", s, "400: too long"] for s in "01"
    ]
    notes = report.notes_of(results)
    assert "Failed requests, which count as wrong and are listed: 2." in notes
    assert any("No judge was asked" in note for note in notes)
    counts = {row[0]: row for row in made.tables["Counts"]}
    assert counts["frames"][1:3] == ["4", "8"] and counts["frames"][5] == "2"


def test_a_servers_own_sampling_is_told(results: dict[str, Any]) -> None:
    assert not any("own defaults" in note for note in report.notes_of(results))
    results["conditions"]["model"]["min_p and penalties"] = "as the server has them"
    assert any("left to the server's own defaults" in note for note in report.notes_of(results))


def test_the_tables_of_passes_rules_and_lengths(results: dict[str, Any]) -> None:
    made = page_of(results)
    assert made.tables["pass@k (%)"][0] == ["benchmark", "pass@1", "pass@2"]
    assert made.tables["pass@k (%)"][-1][0] == "average of the seven"
    rules = made.tables["Rules side by side (%)"]
    assert rules[0] == ["benchmark", "strict", "qwenlong-l1", "qwenlong-l1-eval", "longbench", "longbench-em"]
    lengths = made.tables["By length (score, %)"]
    assert lengths[0] == ["benchmark", "65–128", "> 256"], "no column where nothing is"
    assert lengths[1][0] == "all" and sum(int(n) for n in re.findall(r"n=(\d+)", " ".join(lengths[1]))) == 28


def test_a_part_of_the_seven_has_no_average(results: dict[str, Any]) -> None:
    results["benchmarks"], results["average"] = results["benchmarks"][:2], None
    published = page_of(results).tables["Beside the published table (%)"]
    assert published[-1][3:] == ["-"] * 6


def test_other_benchmarks_are_not_set_beside_the_table(results: dict[str, Any]) -> None:
    for benchmark in results["benchmarks"]:
        benchmark["name"] = f"needles-{benchmark['name']}"
    results["average"] = None
    assert not {"Beside the published table (%)", "What differs from the published conditions"} & set(
        page_of(results).tables
    )


def test_strangers_texts_stay_text(results: dict[str, Any]) -> None:
    clean = page_of(results)
    results["conditions"]["model"]["name"] = HOSTILE
    results["failures"] = [{"benchmark": HOSTILE, "id": HOSTILE, "sample": 0, "why": HOSTILE}]
    results["judge_failures"] = [{"benchmark": "x", "id": "y", "sample": 0, "answer": HOSTILE}]
    notes, tables = report.notes_of(results), report.tables(results)
    text = report.page(HOSTILE, notes, tables)
    made = Page(text)
    assert made.tags <= clean.tags and "script" not in made.tags and "img" not in made.tags
    assert made.attributes <= clean.attributes
    assert made.tables["Failed requests"][1][0] == HOSTILE.replace("\ud800", "?")
    text.encode("utf-8")
    written = report.markdown(HOSTILE, notes, tables)
    written.encode("utf-8")
    lines = written.splitlines()
    [row] = [line for line in lines if line.count("alert") == 6]
    assert len(re.findall(r"(?<!\\)\|", row)) == 5, "four cells, whatever is in them"
    assert not any(re.search(r"(?<!\\)<script", line) for line in lines)


def test_the_page_may_run_nothing_and_styles_itself_by_hash(results: dict[str, Any]) -> None:
    text = report.page("t", [], report.tables(results))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert policy and style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy[1] == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "style=" not in text and "http" not in text.replace("http-equiv", "")


def test_markdown_has_the_same_tables(results: dict[str, Any]) -> None:
    tables = report.tables(results)
    text = report.markdown("t", report.notes_of(results), tables)
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [table.title for table in tables]
    assert "**small (our score)**" in text
    assert json.dumps(results)  # nothing was changed into what JSON can't hold


def test_a_page_without_notes_has_no_box_for_them(results: dict[str, Any]) -> None:
    made = [report.page("t", notes, report.tables(results)).count('class="notes"') for notes in ([], ["one"])]
    assert made == [0, 1]


def test_the_conditions_are_on_the_page(results: dict[str, Any]) -> None:
    told = dict(page_of(results).tables["Conditions"][1:])
    assert told["samples a question"] == "2" and told["longest answer"] == "8 tokens" and told["judge"] == "none"
    assert told["sampling"] == "temperature 0.7, top_p 0.95, top_k off" and told["run"] == "by a server"


@needs_browser
def test_a_browser_shows_it_within_its_window(results: dict[str, Any], tmp_path: Path) -> None:
    results["conditions"]["model"]["name"] = "a/" * 200 + HOSTILE
    results["failures"] = [{"benchmark": "b" * 99, "id": "i" * 300, "sample": 0, "why": HOSTILE + "w" * 300}]
    report.write_reports(tmp_path, results)
    page = tmp_path / "report.html"
    widths = browser.content_widths(page, tmp_path, 390, 1280)
    assert all(found <= width for width, found in widths.items())
    shown = browser.text(browser.dom(page, tmp_path / "profile"))
    assert "Beside the published table" in shown and "&lt;script&gt;alert(1)&lt;/script&gt;" in shown


def test_percent() -> None:
    assert report.percent({"mean": 0.635, "low": 0.5, "high": 0.7049}) == "63.5 [50.0, 70.5]"
    assert report.percent({"mean": None, "low": None, "high": None}) == "-"


def test_reports_are_written_whole(results: dict[str, Any], tmp_path: Path) -> None:
    report.write_reports(tmp_path, results)
    assert (tmp_path / "report.html").read_text().rstrip().endswith("</html>")
    assert (tmp_path / "report.md").read_text().startswith("# small: long-document benchmarks")
