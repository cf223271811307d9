"""Counts over a run against a real server: averages, what is kept, what failed, and how both counters compare."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longreach.rl import cli
from longreach.rl.behaviours import judged
from longreach.rl.behaviours.course import BehavioursConfig, count_run
from longreach.rl.behaviours.figure import behaviours_figure
from longreach.rl.behaviours.lexical import count, normal
from longreach.rl.behaviours.lexicon import BEHAVIOURS
from longreach.rl.console import Console
from longreach.rl.judge import JudgeConfig, JudgeFailing
from longreach.rl.report import collect, write_report

from .. import browser
from ..browser import needs_browser
from .conftest import build_run, reasoning

QUIET = Console(quiet=True)
DOCUMENT = normal("In 1998 the plant in Lyon was closed.")
EMPTY: dict[str, list[str]] = {name: [] for name in BEHAVIOURS}


def shown(body: dict[str, Any]) -> str:
    """The reasoning that a request shows."""
    line = body["messages"][1]["content"].split("\n")[1]
    return json.loads(line.removeprefix("reasoning: "))


def judging(server: Any) -> Callable[[int, dict[str, Any]], Any]:
    """A judge that sees each "wait" as backtracking, each plan, and invents a grounding every time."""

    def respond(_: int, body: dict[str, Any]) -> Any:
        text = shown(body)
        lists = {
            "backtracking": re.findall(r"Wait[^.]*", text),
            "subgoal_setting": re.findall(r"First, I need[^.]*", text),
        }
        return server.chat(json.dumps({**EMPTY, **lists, "grounding": ["the report of 1066 says so"]}))

    return respond


def config(server: Any, **judge: Any) -> BehavioursConfig:
    usual = {"base_url": server.url, "model": "small", "retries": 0, "backoff": 0.001, "max_failure_share": 1.0}
    return BehavioursConfig(samples=99, judge=JudgeConfig(**{**usual, **judge}))


def made(run: Path, settings: BehavioursConfig | None = None) -> dict[str, Any]:
    return json.loads(count_run(run, settings or BehavioursConfig(samples=99), {}, QUIET).read_text())


def test_by_words(run: Path) -> None:
    found = made(run)
    assert found["judge"] is None and found["comparison"] is None
    assert found["documents"] == {"found": 8, "of": 8}
    assert [(p["kind"], p["stage"], p["step"], p["n"]) for p in found["points"]] == [
        ("training", "phase1", 1, 8), ("training", "phase1", 2, 8), ("training", "phase1", 3, 8),
        ("evaluation", "base", 0, 8), ("evaluation", "phase1", 3, 8),
    ]  # fmt: skip
    for point in found["points"][:3]:
        counts = [count(reasoning(point["step"], p, s), DOCUMENT) for p in range(4) for s in range(2)]
        for name in BEHAVIOURS:
            assert point["lexical"][name]["mean"] == pytest.approx(sum(one.counts[name] for one in counts) / 8)
            assert point["lexical"][name]["stderr"] is not None
        assert point["verbatim"]["mean"] == pytest.approx(sum(one.verbatim or 0 for one in counts) / 8)
    assert found["points"][2]["verbatim"]["mean"] > 0
    assert found["points"][0]["score"]["mean"] == pytest.approx(
        sum((1 + p + s) % 3 / 2 for p in range(4) for s in range(2)) / 8
    )
    assert found["points"][3]["score"]["n"] == 4, "None is no score"


def test_without_documents_only_what_is_announced_counts(run: Path) -> None:
    found = made(run, BehavioursConfig(samples=99, documents=False))
    assert found["points"][2]["verbatim"] == {"mean": None, "stderr": None, "n": 0}
    assert found["documents"]["found"] == 0


def test_samples_and_steps(run: Path) -> None:
    found = made(run, BehavioursConfig(samples=3, steps=2))
    assert [(p["step"], p["n"], p["of"]) for p in found["points"]] == [(1, 3, 8), (3, 3, 8), (0, 3, 8), (3, 3, 8)]
    with pytest.raises(ValueError, match="at least 1"):
        BehavioursConfig(samples=0)


def test_by_the_judge_and_compared(run: Path, server: Any) -> None:
    server.respond = judging(server)
    found = made(run, config(server))
    assert found["judge"] == {"name": "small", "prompt": 1}
    for point in found["points"][:3]:
        texts = [reasoning(point["step"], p, s).partition("</think>")[0] for p in range(4) for s in range(2)]
        assert point["judge"]["backtracking"]["mean"] == pytest.approx(sum(t.count("Wait") for t in texts) / 8)
        assert point["judge"]["grounding"]["mean"] == 0, "an invented instance never counts"
        assert (point["judge"]["failed"], point["judge"]["invented"]) == (0, 8)
    by_name = {row["behaviour"]: row for row in found["comparison"]}
    subgoals = by_name["subgoal_setting"]
    assert subgoals["spearman"] == pytest.approx(1.0) and subgoals["equal"] == 1.0 and subgoals["n"] == 40
    assert subgoals["lexical"] == subgoals["judge"] > 0
    assert (
        by_name["grounding"]["spearman"] is None
        and by_name["grounding"]["lexical"] > 0 == by_name["grounding"]["judge"]
    )
    assert by_name["backtracking"]["spearman_steps"] == pytest.approx(1.0) and by_name["backtracking"]["steps"] == 3
    assert all("Wait, let me verify" not in shown(body) for body in server.bodies), "the reasoning alone is shown"


def test_a_judge_is_asked_nothing_twice(run: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.respond = judging(server)
    first = made(run, config(server))
    asked = len(server.bodies)
    different = {reasoning(p["step"], q, s) for p in first["points"] for q in range(4) for s in range(2)}
    assert asked == len(different)
    assert made(run, config(server)) == first
    assert len(server.bodies) == asked
    made(run, config(server, model="other"))
    assert len(server.bodies) == 2 * asked, "another judge is another opinion"
    monkeypatch.setattr(judged, "TASK", replace(judged.TASK, version="another prompt"))
    made(run, config(server))
    assert len(server.bodies) == 3 * asked, "and so is what another prompt has brought"


def test_a_failure_is_no_count_and_is_asked_again(run: Path, server: Any) -> None:
    honest, wrong = judging(server), ("500", "words", "keys")

    def respond(number: int, body: dict[str, Any]) -> Any:
        if "second edition" not in shown(body):
            return honest(number, body)
        kind = wrong[number % 3]
        return server.http(500) if kind == "500" else server.chat("None." if kind == "words" else "{}")

    server.respond = respond
    found = made(run, config(server))
    kept = [
        [t for s in range(2) for p in range(4) if "second edition" not in (t := reasoning(step, p, s))]
        for step in (1, 2, 3)
    ]
    for point, texts in zip(found["points"], kept, strict=False):
        assert point["judge"]["failed"] == 8 - len(texts) > 0
        assert point["judge"]["backtracking"]["n"] == len(texts)
        reasonings = [text.partition("</think>")[0] for text in texts]
        assert point["judge"]["backtracking"]["mean"] == pytest.approx(
            sum(t.count("Wait") for t in reasonings) / len(texts)
        )
    assert found["comparison"][0]["n"] == sum(p["n"] - p["judge"]["failed"] for p in found["points"])
    server.respond = honest
    asked = len(server.bodies)
    assert sum(p["judge"]["failed"] for p in made(run, config(server))["points"]) == 0
    assert 0 < len(server.bodies) - asked < asked


def test_a_judge_that_fails_too_often_stops_the_count_and_words_stand(tmp_path: Path, server: Any) -> None:
    run = build_run(tmp_path / "wide", prompts=15)
    server.respond = lambda _n, _body: server.chat("I count three.")
    with pytest.raises(JudgeFailing, match=r"no clear verdict.*judge.max_failure_share = 0.1 .*happens to answer for"):
        count_run(run, config(server, max_failure_share=0.1), {}, QUIET)
    found = json.loads((run / "behaviours.json").read_text())
    assert found["judge"] is None and found["points"][0]["lexical"]["grounding"]["n"] == 30


def test_a_response_without_reasoning_has_none_of_anything(run: Path, server: Any) -> None:
    lines = [
        {"prompt_id": f"train-{p}", "benchmark": "b", "reward": 0.0, "completion": "<think> \n</think>Wait."}
        for p in range(2)
    ]
    (run / "rollouts" / "phase1" / "000001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    server.respond = judging(server)
    first = made(run, config(server))["points"][0]
    assert first["judge"]["backtracking"] == {"mean": 0.0, "stderr": 0.0, "n": 2}
    assert all(shown(body) for body in server.bodies)


def test_an_empty_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to count"):
        count_run(tmp_path, BehavioursConfig(), {}, QUIET)


def test_the_picture_is_the_same_from_the_same_counts(run: Path, server: Any, tmp_path: Path) -> None:
    server.respond = judging(server)
    by_words, both = made(run), made(run, config(server))
    pictures = [
        behaviours_figure(one, tmp_path / f"{i}.png").read_bytes() for i, one in enumerate((both, both, by_words))
    ]
    assert pictures[0] == pictures[1] != pictures[2]
    from PIL import Image

    assert Image.open(io.BytesIO(pictures[0])).size == (1800, 1200)


Result = tuple[int, str, str]


@pytest.fixture
def longreach(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        status = cli.main(arguments)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_the_command(run: Path, server: Any, longreach: Callable[..., Result]) -> None:
    server.respond = judging(server)
    keys = ("--samples", "5", "--steps=2", "--judge.base-url", server.url, "--judge.model", "small")
    status, out, err = longreach("behaviours", str(run), *keys)
    assert (status, err) == (0, "")
    assert (
        "phase1, step 3, per response of 5 by words: grounding" in out
        and "rank correlation 1.00 over 20 responses" in out
    )
    found = json.loads((run / "behaviours.json").read_text())
    assert [p["n"] for p in found["points"]] == [5, 5, 5, 5]
    assert server.bodies[0]["max_tokens"] == 4096
    assert (run / "behaviours.png").is_file()
    data = collect(run)
    assert data["behaviours"] == found and data["notes"] == ["metrics.jsonl is missing: no step has been logged yet."]
    assert '"behaviours":{' in (run / "report.html").read_text()


@needs_browser
def test_a_browser_draws_both_counters(run: Path, server: Any, tmp_path: Path) -> None:
    server.respond = judging(server)
    made(run, config(server))
    page = write_report(run)
    html = browser.dom(page, tmp_path / "profile")
    shown = browser.text(html)
    for words in ("Subgoal setting", "instances per response", "by the judge", "Both counters over the same responses"):
        assert words in shown
    assert html.count(">by the judge<b>") == 4, "a curve each"
    assert all(found <= width for width, found in browser.content_widths(page, tmp_path, 390, 1280).items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--judge.model", "m"), "give one, a server's URL"),
        (
            ("--judge.base-url", "http://x/v1", "--judge.model", "m", "--judge.audit", "0.5"),
            "judge audit would do nothing here",
        ),
        (("--jugde.model", "m"), "unknown key 'jugde': did you mean 'judge'?"),
        (("--judge.modle", "m"), "unknown key 'judge.modle': did you mean 'model'?"),
        (("--samples", "0"), "must be at least 1"),
    ],
)
def test_mistakes(run: Path, longreach: Callable[..., Result], arguments: tuple[str, ...], words: str) -> None:
    status, _, err = longreach("behaviours", str(run), *arguments)
    assert status == 2 and words in err
    assert not (run / "behaviours.json").exists()


def test_no_run_folder(tmp_path: Path, longreach: Callable[..., Result]) -> None:
    status, _, err = longreach("behaviours", str(tmp_path))
    assert status == 2 and "is not a run folder" in err


def test_a_report_without_counts_has_no_such_section_and_survives_a_torn_one(run: Path) -> None:
    assert collect(run)["behaviours"] is None
    for text in ('{"points": [', '{"points": []}'):
        (run / "behaviours.json").write_text(text)
        data = collect(run)
        assert data["behaviours"] is None and any("behaviours.json" in note for note in data["notes"])


def test_a_model_in_this_process_counts_through_the_same_interface(run: Path, tiny_dir: Path) -> None:
    """A model that says nothing of the kind: each of its replies is a failure, none of them a 0."""
    judge = JudgeConfig(model_dir=str(tiny_dir), device="cpu", dtype="float32", max_tokens=4, max_failure_share=1.0)
    found = made(run, BehavioursConfig(samples=2, steps=1, judge=judge))
    assert found["judge"]["name"] == str(tiny_dir)
    assert [p["judge"]["failed"] for p in found["points"]] == [2, 2, 2]
    assert found["points"][0]["judge"]["grounding"] == {"mean": None, "stderr": None, "n": 0}
