"""The results folder: lines that survive a kill, conditions that may not change, one process at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from longreach.rl.benchmarks.results import Response, ResultsFolder, differences, read_results

CONDITIONS: dict[str, Any] = {"model": {"name": "m"}, "asked": {"samples": 1, "seed": 0}, "scored": {"rule": "strict"}}


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    made = ResultsFolder(tmp_path / "out")
    made.open(CONDITIONS)
    return made


def again(folder: ResultsFolder) -> ResultsFolder:
    folder.close()
    return ResultsFolder(folder.root)


def test_responses_come_back_as_they_were(folder: ResultsFolder) -> None:
    texts = ["plain", "two\nlines\r", "\ud800 half a pair", "«ü» \u2028 \x00", ""]
    made = [Response("qasper", f"q{i}", 0, text, "stop", i) for i, text in enumerate(texts)]
    made.append(Response("qasper", "q9", 1, failed="timeout", again=True))
    for response in made:
        folder.add(response)
        assert folder.responses_file.read_bytes().endswith(b"\n"), "on disk as it returns"
    assert list(again(folder).responses().values()) == made


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_left_out_and_the_next_starts_afresh(folder: ResultsFolder, cut: int) -> None:
    for index in range(3):
        folder.add(Response("b", f"q{index}", 0, "ü" * 40, "stop"))
    folder.close()
    os.truncate(folder.responses_file, folder.responses_file.stat().st_size - cut)
    opened = again(folder)
    kept = [r.id for r in opened.responses().values()]
    assert kept in (["q0", "q1"], ["q0", "q1", "q2"]) and (len(kept) == 2) == (cut > 1)
    opened.add(Response("b", "q7", 0, "next", "stop"))
    assert [r.id for r in again(opened).responses().values()] == [*kept, "q7"]


def test_an_answer_outweighs_failures_before_and_after_it(folder: ResultsFolder) -> None:
    folder.add(Response("b", "q", 0, failed="500", again=True))
    folder.add(Response("b", "q", 0, failed="503", again=True))
    assert folder.responses()[("b", "q", 0)].failed == "503"
    folder.add(Response("b", "q", 0, "answer", "stop"))
    folder.add(Response("b", "q", 0, failed="400"))
    assert folder.responses()[("b", "q", 0)].text == "answer"


@pytest.mark.parametrize("line", ['{"id": 3}', "[]", "7", '{"benchmark": "b", "id": "q", "sample": "0"}', "null", '{"benchmark": "b", "id": "q", "sample": 0, "more": 1}'])  # fmt: skip
def test_lines_of_another_shape_are_left_out(folder: ResultsFolder, line: str) -> None:
    folder.responses_file.write_text(line + "\n")
    folder.add(Response("b", "q", 0, "x", "stop"))
    assert len(folder.responses()) == 1


def test_the_same_conditions_go_on_and_others_are_named(folder: ResultsFolder) -> None:
    again(folder).open(CONDITIONS)
    other = {**CONDITIONS, "asked": {"samples": 4, "top_k": 5}}
    with pytest.raises(
        ValueError,
        match=r"asked.samples: there 1, here 4; asked.seed: there 0, here null; asked.top_k: there null, here 5.*give another --out",
    ):
        again(folder).open(other)
    assert json.loads(folder.conditions_file.read_text()) == CONDITIONS


def test_rescoring_may_change_scoring_alone(folder: ResultsFolder) -> None:
    scored = {**CONDITIONS, "scored": {"rule": "cover"}}
    with pytest.raises(ValueError, match=r'scored.rule: there "strict", here "cover".*add --rescore'):
        again(folder).open(scored)
    opened = ResultsFolder(folder.root)
    opened.open(scored, rescore=True)
    assert json.loads(folder.conditions_file.read_text())["scored"] == {"rule": "cover"}
    opened.close()
    with pytest.raises(ValueError, match=r"asked.samples"):
        ResultsFolder(folder.root).open({**scored, "asked": {"samples": 2, "seed": 0}}, rescore=True)


def test_a_second_process_is_refused(folder: ResultsFolder) -> None:
    with pytest.raises(ValueError, match="another process is evaluating in"):
        ResultsFolder(folder.root).open(CONDITIONS)


def test_strange_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds thesis.tex and is no results folder"):
        ResultsFolder(tmp_path).open(CONDITIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        ResultsFolder(tmp_path / "thesis.tex").open(CONDITIONS)


def test_a_kill_before_the_conditions_were_written_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    for name in (".lock", "conditions.json.unfinished", "verdicts.jsonl"):
        (tmp_path / name).write_text("")
    ResultsFolder(tmp_path).open(CONDITIONS)


def test_differences_reach_every_level() -> None:
    assert list(differences({"a": {"b": 1, "c": [1]}}, {"a": {"b": 1, "c": [2]}, "d": "x"})) == [
        "a.c: there [1], here [2]", 'd: there null, here "x"',
    ]  # fmt: skip
    assert not list(differences({"a": 1}, {"a": 1}))
    [long] = differences("x" * 500, "y")
    assert len(long) < 120


def test_reading_what_is_no_results_file(tmp_path: Path) -> None:
    for text in ("", "[]", '{"conditions": {}}', "\udcff"):
        (tmp_path / "results.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match="no results file"):
            read_results(tmp_path)
