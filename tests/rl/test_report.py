"""The report: what it shows equals what the run wrote, whatever that was, and nothing in it can run or phone out."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from longreach.rl import report, report_samples
from longreach.rl.report import collect, write_report
from longreach.rl.report_data import embed, evenly
from longreach.rl.report_pool import histogram
from longreach.rl.report_samples import shorten
from longreach.rl.timeline import TRAIN_PARTS

from . import browser
from .browser import needs_browser

EVIL = "</script><script>document.title='owned'</script><!--<script><img src=x onerror=alert(1)>\u2028\ud800{{STYLE}}"
ACCURACY = {"base": 0.0625, "sft": 0.3125, "phase1": 0.5, "phase2": 0.71875}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rollout(stage: str, step: int, prompt: int, sample: int, completion: str) -> dict[str, Any]:
    return {
        "step": step,
        "stage": stage,
        "prompt_id": f"train-{prompt}",
        "benchmark": "look-up",
        "prompt_length": 100 + prompt,
        "completion_ids": [1, 2, 3],
        "completion": completion,
        "logprobs": [-0.5, -0.25, -0.125],
        "kept_logmass": [0.0, 0.0, 0.0],
        "finish_reason": "stop",
        "rewards": {"rule": 1.0, "judge": None},
        "reward": float(sample % 2),
        "advantage": 0.35,
        "reason": "judged_correct",
        "rule_reason": "wrong",
        "extracted": EVIL,
    }


def evaluation(run: Path, stage: str, right: int) -> None:
    """Eight questions of 100..800 tokens in buckets of 400; the first `right` of them are answered."""
    scores = [1.0 if index < right else 0.0 for index in range(8)]
    rows = [
        {
            "prompt_id": f"eval-{index}",
            "benchmark": "look-up",
            "prompt_length": 100 * (index + 1),
            "question": f"which figure, {EVIL}?",
            "answers": ["4,120"],
            "completions": [f"{stage} says 4,120", EVIL],
            "scores": [score, None],
            "reasons": ["exact", "no verdict"],
        }
        for index, score in enumerate(scores)
    ]
    write_lines(run / "evals" / f"{stage}.completions.jsonl", rows)
    buckets = [
        {"upper": upper, "accuracy": ACCURACY[stage] + 0.001 * place, "stderr": 0.03125, "n": 4}
        for place, upper in enumerate((400, 800))
    ]
    benchmark = {"name": "look-up", "headline": True, "accuracy": ACCURACY[stage], "stderr": None, "n": 8}
    whole = {"stage": stage, "step": 3, "k": 2, "chance": 0.0625, "buckets": buckets}
    rules = {"strict": {"accuracy": 0.5, "stderr": 0.125, "n": 8}, "longbench": {"accuracy": float("nan"), "n": 0}}
    whole["benchmarks"] = [benchmark | {"pass_at": {"1": 0.5, "2": float("nan")}, "buckets": buckets, "rules": rules}]
    (run / "evals" / f"{stage}.json").write_text(json.dumps(whole))


def build_run(run: Path) -> Path:
    run.mkdir()
    (run / "recipe.toml").write_text('name = "tiny <b>"\n[[phases]]\nsteps = 3\n[[phases]]\nsteps = 3\n')
    metrics: list[dict[str, Any]] = []
    for index, stage in enumerate(("sft", "phase1", "phase2")):
        for stage_step in range(1, 4):
            step = 3 * index + stage_step
            row = {"stage": stage, "step": step, "stage_step": stage_step, "loss": 1 / step, "timing_s/step": 0.5}
            if stage != "sft":
                row |= {"reward": 0.1 * step, "entropy": float("nan") if step == 5 else 0.7, "kl": None}
                path = run / "rollouts" / stage / f"{step:06d}.jsonl"
                texts = ["fine", EVIL]
                write_lines(path, [rollout(stage, step, p, s, texts[s]) for p in range(2) for s in range(2)])
            metrics.append(row)
    write_lines(run / "metrics.jsonl", metrics)
    for stage, right in (("base", 0), ("sft", 3), ("phase1", 4), ("phase2", 6)):
        evaluation(run, stage, right)
    pool = [
        {"prompt_id": "a", "mean_reward": 0.0, "difficulty": math.inf, "selected": True, "why": "mean reward 0"},
        {"prompt_id": "b", "mean_reward": 1.0, "difficulty": 1.0, "selected": False, "why": "solved"},
        {"prompt_id": "c", "mean_reward": None, "difficulty": None, "selected": False, "why": "no verdict"},
    ]
    shared = {"benchmark": "look-up", "prompt_length": 7, "samples": 2}
    write_lines(run / "pool" / "phase1.jsonl", [row | shared for row in pool])
    stages = [json.loads((run / "evals" / f"{name}.json").read_text()) for name in ACCURACY]
    summary = {"chance": 0.0625, "stages": [{"name": s["stage"], "buckets": s["buckets"]} for s in stages]}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "model").mkdir()
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "tiny")


class Page(HTMLParser):
    """The page as a browser's parser splits it: tags with attributes, and the text of script and style elements."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=False)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.data = json.loads(next(raw for raw in self.raw if raw.startswith("{")))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.raw[-1] += data


def test_numbers_shown_equal_the_inputs(run: Path) -> None:
    data = Page(write_report(run)).data
    assert data["metrics"]["step"] == list(range(1, 10))
    assert data["metrics"]["series"]["loss"] == [1 / step for step in range(1, 10)]
    assert data["metrics"]["series"]["reward"] == [None] * 3 + [0.1 * step for step in range(4, 10)]
    assert data["metrics"]["seconds"] == 4.5
    summary = json.loads((run / "summary.json").read_text())
    shown = data["accuracy"]["stages"]
    assert [{"name": stage["name"], "buckets": stage["buckets"]} for stage in shown] == summary["stages"]
    assert data["accuracy"]["chance"] == 0.0625
    assert shown[1]["benchmarks"][0]["accuracy"] == ACCURACY["sft"]
    assert data["status"]["finished"] is True
    assert data["notes"] == []
    assert data["recipe"]["name"] == "tiny <b>"


def test_rules_are_shown_side_by_side(run: Path) -> None:
    for stage in collect(run)["accuracy"]["stages"]:
        made = stage["benchmarks"][0]["rules"]
        assert made == {
            "strict": {"accuracy": 0.5, "stderr": 0.125, "n": 8},
            "longbench": {"accuracy": None, "stderr": None, "n": 0},
        }


def test_a_runs_rollouts_show_what_the_rule_said(run: Path) -> None:
    rows = [row for row in collect(run)["samples"]["rows"] if row["kind"] == "training"]
    assert {(row["reason"], row["rule_reason"], row["extracted"]) for row in rows} == {
        ("judged_correct", "wrong", EVIL)
    }


def test_difference_is_paired_by_question_within_buckets(run: Path) -> None:
    """SFT answers eval-0..2, phase 2 eval-0..5: by hand +1/4 in (0, 400] and +2/4 in (400, 800]."""
    first, second = collect(run)["accuracy"]["differences"]
    assert (first["before"], first["after"], first["upper"], first["n"]) == ("sft", "phase2", 400, 4)
    assert first["mean"] == 0.25
    assert first["stderr"] == pytest.approx(0.25)
    assert second["mean"] == 0.5
    assert second["stderr"] == pytest.approx(math.sqrt(1 / 12))


def test_null_and_nan_are_gaps_not_zeros(run: Path) -> None:
    data = Page(write_report(run)).data
    assert data["metrics"]["series"]["entropy"] == [None, None, None, 0.7, None, 0.7, 0.7, 0.7, 0.7]
    assert "kl" not in data["metrics"]["series"]
    assert data["accuracy"]["stages"][0]["benchmarks"][0]["pass_at"] == {"1": 0.5, "2": None}
    assert data["pools"][0]["rows"][0]["difficulty"] is None
    assert {row["reward"] for row in data["samples"]["rows"] if row["reason"] == "no verdict"} == {None}


def test_a_completion_is_never_markup(run: Path) -> None:
    page = Page(write_report(run))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not [
        tag for tag, attributes in page.tags if tag == "img" or any(name.startswith("on") for name in attributes)
    ]
    texts = {row["text"] for row in page.data["samples"]["rows"]}
    assert EVIL.replace("\ud800", "\ufffd") in texts
    embedded = next(raw for raw in page.raw if raw.startswith("{"))
    assert not set("<>&") & set(embedded)


def test_the_script_sets_text_only() -> None:
    script = "".join((report.ASSETS / name).read_text() for name in report.SCRIPTS)
    for way_in in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
        assert way_in not in script


def test_every_part_of_a_step_has_a_colour_of_its_own() -> None:
    """Without one a bar is black: unseen on a dark page, and its mark in the legend is empty."""
    style = (report.ASSETS / "report.css").read_text()
    found = [re.search(rf"\.p-{place}\b[^{{]*{{ --c: ([^;]+);", style) for place in range(len(TRAIN_PARTS) + 1)]
    assert len({match[1] for match in found if match}) == len(found)


def test_the_page_needs_no_network(run: Path) -> None:
    page = Page(write_report(run))
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|url\(|fetch\(|XMLHttpRequest|WebSocket", page.text)
    assert not [attributes for _, attributes in page.tags if {"src", "href", "action"} & set(attributes)]
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a) or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_torn_lines_are_left_out_and_told(run: Path) -> None:
    for path in (run / "metrics.jsonl", run / "rollouts" / "phase2" / "000009.jsonl", run / "pool" / "phase1.jsonl"):
        content = path.read_bytes()
        # Cut inside a multi-byte character too: a torn line need not even be text.
        path.write_bytes(content[: content.rstrip().rfind(b"\n") + 1] + '{"step": "é'.encode()[:-1])
    middle = run / "evals" / "sft.completions.jsonl"
    middle.write_text(middle.read_text().replace("{", "[", 1))
    (run / "summary.json").write_text('{"chance": 0.06, "sta')
    data = collect(run)
    assert data["metrics"]["step"] == list(range(1, 9))
    assert data["pools"][0]["total"] == 2
    assert [stage["name"] for stage in data["accuracy"]["stages"]] == list(ACCURACY)
    told = "\n".join(data["notes"])
    for part in ("metrics.jsonl: the last line is torn", "rollouts/phase2/000009.jsonl: the last", "pool/phase1.jsonl"):
        assert part in told
    assert "evals/sft.completions.jsonl: 1 unreadable line(s)" in told
    assert "summary.json cannot be read" in told


def test_resumed_run_counts_a_step_once(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "phase2", "step": 9, "reward": 0.25}) + "\n")
    data = collect(run)
    assert data["metrics"]["total"] == 9
    assert data["metrics"]["series"]["reward"][-1] == 0.25
    assert "logged twice" in data["notes"][0]


def test_every_part_may_be_missing(run: Path) -> None:
    for part in ("summary.json", "pool", "rollouts", "evals", "metrics.jsonl", "recipe.toml"):
        path = run / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        page = Page(write_report(run))
    assert {note.split(":")[0].rstrip(".") for note in page.data["notes"]} == {
        "metrics.jsonl is missing",
        "recipe.toml is missing",
        "No evaluation has been written yet",
    }


def test_sft_only_run(tmp_path: Path) -> None:
    run = tmp_path / "sft"
    write_lines(run / "metrics.jsonl", [{"stage": "sft", "step": 1, "stage_step": 1, "loss": 2.5}])
    data = collect(run)
    assert data["metrics"]["series"] == {"loss": [2.5]}
    assert data["status"]["finished"] is False
    assert data["status"]["waiting"] == ["sft"]
    evaluation(run, "sft", 2)
    assert collect(run)["status"]["waiting"] == []
    assert collect(run)["accuracy"]["differences"] == []


def test_finished_once_the_model_is_written(run: Path) -> None:
    (run / "model").rmdir()
    (run / "recipe.toml").write_text("[[phases]]\n" * 10)
    status = collect(run)["status"]
    assert status["finished"] is False
    assert status["waiting"] == [f"phase{number}" for number in range(3, 11)]


def test_evaluations_within_a_phase_stay_out_of_the_table(run: Path) -> None:
    middle = json.loads((run / "evals" / "phase2.json").read_text()) | {"stage": "phase2-000002", "step": 8}
    (run / "evals" / "phase2-000002.json").write_text(json.dumps(middle))
    accuracy = collect(run)["accuracy"]
    assert [stage["name"] for stage in accuracy["stages"]] == list(ACCURACY)
    assert [(stage["name"], stage["step"]) for stage in accuracy["within"]] == [("phase2-000002", 8)]
    assert accuracy["differences"][0]["after"] == "phase2"


def test_an_id_is_unique_in_its_benchmark_only(run: Path) -> None:
    """The other benchmark has the same ids with opposite scores; without the benchmark they would replace the first."""
    for stage in ACCURACY:
        path = run / "evals" / f"{stage}.completions.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [*rows, *(row | {"benchmark": "other", "scores": [0.0]} for row in rows)])
        whole = json.loads((run / "evals" / f"{stage}.json").read_text())
        whole["benchmarks"].append(whole["benchmarks"][0] | {"name": "other"})
        (run / "evals" / f"{stage}.json").write_text(json.dumps(whole))
    first, second = collect(run)["accuracy"]["differences"]
    assert (first["n"], first["mean"]) == (8, 0.125)
    assert (second["n"], second["mean"]) == (8, 0.25)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        write_report(tmp_path / "none")


def test_sample_keeps_the_last_steps_and_says_how_many(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_group = len(embed([row for row in collect(run)["samples"]["rows"] if row["kind"] == "training"])) // 12
    monkeypatch.setattr(report_samples, "TRAINING_BYTES", 5 * one_group)
    samples = collect(run)["samples"]
    rows = [row for row in samples["rows"] if row["kind"] == "training"]
    assert samples["training"] == [len(rows), 24]
    assert {(row["stage"], row["step"]) for row in rows} >= {("phase2", 9), ("phase1", 6)}
    groups: dict[tuple[int, str], int] = {}
    for row in rows:
        groups[row["step"], row["prompt_id"]] = groups.get((row["step"], row["prompt_id"]), 0) + 1
    assert set(groups.values()) == {2}
    assert len(groups) < 12


def test_evaluation_sample_shows_the_same_questions_at_each_stage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [row for row in collect(run)["samples"]["rows"] if row["kind"] == "evaluation"]
    monkeypatch.setattr(report_samples, "EVALUATION_BYTES", len(embed(every)) // 2)
    samples = collect(run)["samples"]
    assert samples["evaluation"][1] == 64
    rows = [row for row in samples["rows"] if row["kind"] == "evaluation"]
    complete = {q for q in {row["prompt_id"] for row in rows} if sum(row["prompt_id"] == q for row in rows) == 8}
    assert len(complete) >= 3
    assert len({row["prompt_id"] for row in rows} - complete) <= 1


def test_large_run_stays_bounded(tmp_path: Path) -> None:
    run = tmp_path / "large"
    for step in range(1, 41):
        rows = [rollout("phase1", step, p, s, "<&>" * 3000) for p in range(4) for s in range(8)]
        write_lines(run / "rollouts" / "phase1" / f"{step:06d}.jsonl", rows)
    metrics = [{"stage": "phase1", "step": step, "reward": 0.123456789 * step} for step in range(1, 5001)]
    write_lines(run / "metrics.jsonl", metrics)
    path = write_report(run)
    assert path.stat().st_size < 4_000_000
    data = Page(path).data
    assert data["metrics"]["step"][-1] == 5000
    assert len(data["metrics"]["step"]) == 2000
    assert data["samples"]["training"][1] == 40 * 32
    assert any("2,000 evenly spaced steps of 5,000" in note for note in data["notes"])


def test_long_text_keeps_its_end_and_says_what_is_cut() -> None:
    text, cut = shorten("a" * 5000 + "the answer is 42")
    assert cut == 5016 - 1200 - 2400
    assert text.endswith("the answer is 42")
    assert f"[... {cut:,} characters ...]" in text
    assert shorten("short") == ("short", 0)


def test_evenly_keeps_the_last() -> None:
    assert evenly([1, 2, 3], 3) == [1, 2, 3]
    assert evenly(list(range(10)), 3) == [2, 5, 9]


def test_pool_histogram_counts_every_scored_prompt_once() -> None:
    rewards = [0.0, 0.05, 0.1, 0.5, 0.95, 1.0, None]
    found = histogram([{"mean_reward": reward, "selected": reward == 0.0} for reward in rewards])
    assert found["selected"] == [1] + [0] * 9
    assert found["left"] == [1, 1, 0, 0, 0, 1, 0, 0, 0, 2]
    wide = histogram([{"mean_reward": -0.5, "selected": False}, {"mean_reward": 1.0, "selected": False}])
    assert (wide["edges"][0], wide["edges"][-1], wide["left"]) == (-0.5, 1.0, [1] + [0] * 8 + [1])


@needs_browser
def test_a_browser_draws_it(run: Path, tmp_path: Path) -> None:
    made = browser.dom(write_report(run), tmp_path / "profile")
    assert "<title>tiny &lt;b&gt; · tiny · Longreach run</title>" in made
    shown = browser.text(made)
    for title in (
        "Strict and published rules side by side",
        "Accuracy by prompt length",
        "Learning curves",
        "Retrospective pool",
        "Completions",
        "Recipe",
    ):
        assert title in shown
    for value in ("0.719", "0.720", "± 0.031", "+0.250", "+0.500", "24 of 24 training completions"):
        assert value in shown
    assert made.count("<img") == 0


@needs_browser
def test_long_names_widen_no_page_and_many_lengths_share_an_axis(run: Path, tmp_path: Path) -> None:
    """A prompt's id as long as a path, a benchmark named by a stranger, and the eight lengths and six phases of a long run."""
    uppers = [1024 * 2**power for power in range(7)]
    for number in range(1, 7):
        buckets = [{"upper": upper, "accuracy": 0.5, "stderr": 0.1, "n": 9} for upper in (*uppers, None)]
        benchmark = {"name": "a/" * 90, "headline": True, "accuracy": 0.5, "stderr": 0.1, "n": 9, "buckets": buckets}
        whole = {"stage": f"phase{number}", "step": number, "k": 1, "buckets": buckets, "benchmarks": [benchmark]}
        (run / "evals" / f"phase{number}.json").write_text(json.dumps(whole))
    for path in (run / "summary.json", run / "evals" / "base.json", run / "evals" / "sft.json"):
        path.unlink()
    row = rollout("phase2", 9, 0, 0, "x" * 900) | {"prompt_id": "u" * 300, "benchmark": "a/" * 90 + EVIL}
    write_lines(run / "rollouts" / "phase2" / "000009.jsonl", [row])
    page = write_report(run)
    assert all(found <= width for width, found in browser.content_widths(page, tmp_path, 390, 1280).items())
    made = browser.dom(page, tmp_path / "profile")
    labels = re.findall(r'<text x="[0-9.]+" y="([0-9]+)" text-anchor="middle">((?:≤|&gt;) [0-9,]+)</text>', made)
    assert [label for _, label in labels] == [*(f"≤ {upper:,}" for upper in uppers), "&gt; 65,536"]
    assert len({y for y, _ in labels}) == 2, "on two lines by turns"
    stages = {f"c-phase{number}" for number in range(1, 7)}
    assert all(f'class="dot {name}"' in made for name in stages)
