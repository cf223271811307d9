"""The time line: spans that add up to what metrics say, overlap that shows, kills that do no harm, and a trace that opens."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from longreach.engine import Sampling
from longreach.engine.generate import GeneratorConfig
from longreach.rl import cli
from longreach.rl.console import Console
from longreach.rl.judge import JudgeConfig
from longreach.rl.policy import Policy
from longreach.rl.prompts import Prompt
from longreach.rl.recipe import Recipe
from longreach.rl.report import collect
from longreach.rl.rewards import RewardConfig, make_reward
from longreach.rl.rollouts import roll_out
from longreach.rl.run import RunFolder, Stopwatch, read_lines
from longreach.rl.scoring import PAUSE, _extend
from longreach.rl.timeline import LANES, OTHER, hidden, intervals, read_timeline, seconds, trace, within
from longreach.rl.train import train

ROUNDING = 1e-6


def line(
    *spans: list[Any], kind: str = "step", stage: str = "phase1", step: int = 1, at: float = 1000.0
) -> dict[str, Any]:
    return {"kind": kind, "stage": stage, "step": step, "at": at, "spans": list(spans)}


STEP = line(
    ["gen", 0.0, 4.0], ["judge", 1.0, 2.0], ["judge", 3.0, 5.5], ["rules", 0.5, 0.6], ["reward", 4.0, 5.5], ["old_log_prob", 5.5, 6.0],
    ["ref", 6.0, 6.5], ["update_actor", 6.5, 9.0], ["step", 0.0, 9.25],
)  # fmt: skip
EVALUATION = line(["evaluation", 0.0, 2.0], kind="evaluation", at=1010.0)


@pytest.fixture(scope="module")
def made(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a reference, in the course of which each kind of line is written."""
    run_dir = tmp_path_factory.mktemp("timed") / "run"
    train(make_recipe(rl__kl_weight=0.1, rl__updates=2), run_dir, console=Console(quiet=True))
    return run_dir


def test_spans_add_up_to_the_metrics(made: Path) -> None:
    lines = [one for one in read_timeline(made / "timeline.jsonl") if one["kind"] == "step"]
    metrics = list(read_lines(made / "metrics.jsonl"))
    assert [(one["stage"], one["step"]) for one in lines] == [(one["stage"], one["step"]) for one in metrics]
    for timed, logged in zip(lines, metrics, strict=True):
        sums = seconds(timed)
        names = {name.removeprefix("timing_s/") for name in logged if name.startswith("timing_s/")}
        expected = {"step", "update_actor"} | (
            {"gen", "reward", "old_log_prob", "ref"} if timed["stage"] != "sft" else set()
        )
        assert names == expected <= set(sums)
        for name in names:
            spans = sum(span.name == name for span in intervals(timed))
            assert sums[name] == pytest.approx(logged[f"timing_s/{name}"], abs=2 * ROUNDING * spans)
        assert sum(value for name, value in sums.items() if name in {*expected, OTHER} - {"step"}) == pytest.approx(
            sums["step"], abs=1e-4
        )


def test_the_parts_of_a_step_follow_one_another(made: Path) -> None:
    for one in read_timeline(made / "timeline.jsonl"):
        spans = intervals(one)
        assert all(0 <= span.start <= span.end for span in spans)
        for name in {span.name for span in spans}:
            mine = [span for span in spans if span.name == name]
            assert all(a.end <= b.start for a, b in pairwise(mine)), name
        if one["kind"] == "step":
            [step] = [span for span in spans if span.name == "step"]
            assert all(step.start - ROUNDING <= span.start and span.end <= step.end + ROUNDING for span in spans)
    starts = [one["at"] for one in read_timeline(made / "timeline.jsonl")]
    assert starts == sorted(starts) and abs(starts[0] - time.time()) < 600


def test_evaluations_passes_and_checkpoints_are_there(made: Path) -> None:
    found = [
        (one["kind"], one["stage"], one["step"])
        for one in read_timeline(made / "timeline.jsonl")
        if one["kind"] != "step"
    ]
    assert [one for one in found if one[0] == "evaluation"] == [
        ("evaluation", "base", 0), ("evaluation", "sft", 2), ("evaluation", "phase1", 5), ("evaluation", "phase2", 8),
    ]  # fmt: skip
    assert [one for one in found if one[0] == "difficulty"] == [("difficulty", "phase1", 5)]
    assert [step for kind, _, step in found if kind == "checkpoint"] == [2, 4, 5, 7, 8]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    watch = Stopwatch()
    for step in range(1, 5):
        with watch("gen"):
            pass
        folder.add_timeline("step", "phase1", step, watch)
    folder.add_timeline("checkpoint", "", 2, watch)
    with folder.timeline_file.open("a") as file:
        file.write('{"kind": "step", "stage": "phase1", "step": 5, "at": 1.0, "spa')
    assert [one["step"] for one in read_timeline(folder.timeline_file)] == [1, 2, 3, 4, 2], "a torn line is left out"
    RunFolder(tmp_path, writes=False).rewind(1, ())
    RunFolder(tmp_path, writes=False).add_timeline("step", "phase1", 9, watch)
    assert [one["step"] for one in read_timeline(folder.timeline_file)] == [1, 2, 3, 4, 2], "of another rank"
    folder.rewind(2, ())
    folder.add_timeline("step", "phase1", 3, watch)
    assert [(one["kind"], one["step"]) for one in map(json.loads, folder.timeline_file.read_text().splitlines())] == [
        ("step", 1), ("step", 2), ("checkpoint", 2), ("step", 3),
    ]  # fmt: skip


def test_of_a_step_that_stands_twice_the_later_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    lines = [
        line(["step", 0.0, 1.0]),
        EVALUATION,
        EVALUATION,
        line(["step", 0.0, 2.0]),
        line(["step", 0.0, 1.0], stage="sft"),
    ]
    bad = [
        {"kind": "step"},
        3,
        None,
        {**STEP, "spans": [["gen", 0.0]]},
        {**STEP, "spans": [["gen", 0.0, "1"]]},
        {**STEP, "at": None},
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in [*lines, *bad]))
    assert list(read_timeline(path)) == [EVALUATION, EVALUATION, lines[3], lines[4]]


def test_seconds_and_what_is_hidden() -> None:
    sums = seconds(STEP)
    assert (sums["judge"], sums["gen"], sums[OTHER]) == (3.5, 4.0, 0.25)
    assert hidden(STEP) == 2.0, "1 to 2, and 3 to 4"
    assert hidden(STEP, "rules") == pytest.approx(0.1)
    assert hidden(EVALUATION) == 0.0
    assert seconds(EVALUATION) == {"evaluation": 2.0}


def test_what_was_sampled_while_the_step_before_trained_costs_this_one_its_wait() -> None:
    ahead = [["gen", -3.0, 0.5], ["reward", 0.5, 0.75], ["wait_for_rollouts", 0.0, 0.8], ["update_actor", 0.8, 2.0], ["step", 0.0, 2.0]]  # fmt: skip
    sums = seconds(line(*ahead, ["update_weights", 2.0, 2.5]))
    assert (sums["gen"], sums["reward"], sums["update_weights"]) == (0.0, 0.0, 0.0)
    assert (sums["wait_for_rollouts"], sums["update_actor"]) == (0.8, 1.2) and sums[OTHER] == pytest.approx(0.0)


def test_the_judges_work_stands_where_it_was_done(
    policy: Policy, make_prompts: Callable[..., list[Prompt]], server: Any
) -> None:
    """One prompt a batch: judged while the next ones are generated, and the last one's judge is waited for."""
    policy = copy.copy(policy)
    policy.generator = GeneratorConfig(60)
    policy.model.get_decoder().register_forward_hook(lambda *_: time.sleep(0.004))
    server.respond = lambda _n, _body: server.after(0.15, server.chat("[[YES]]"))
    reward = make_reward(RewardConfig(rule=False, judge=JudgeConfig(base_url=server.url, model="m", tail=200)), {})
    watch = Stopwatch()
    roll_out(policy, reward, make_prompts(*[9] * 6), 3, Sampling(16, 1.0), seed=3, stage="s", step=1, watch=watch)
    spans = [[name, start - watch.start, end - watch.start] for name, start, end in watch.spans]
    sums, one = seconds(line(*spans)), line(*spans)
    assert sums["judge"] == pytest.approx(watch.seconds["reward/judge_time"], abs=PAUSE * len(spans))
    assert 0.5 * sums["judge"] < hidden(one) < sums["judge"], "the last answer comes after generation"
    assert hidden(one, "judge", "reward") == pytest.approx(watch.seconds["reward/judge_wait"], abs=0.1)
    assert 0 < sums["rules"] < sums["gen"]


def test_short_pauses_are_no_pauses() -> None:
    spans: list[tuple[float, float]] = []
    for start, end in ((0.0, 1.0), (1.0 + PAUSE / 2, 2.0), (2.0 + PAUSE * 2, 3.0)):
        _extend(spans, start, end)
    assert spans == [(0.0, 2.0), (2.0 + PAUSE * 2, 3.0)]


def check_trace(made: dict[str, Any]) -> list[dict[str, Any]]:
    """What the trace-event format asks of a JSON object; the complete events."""
    made = json.loads(json.dumps(made, allow_nan=False))
    assert made["displayTimeUnit"] in ("ms", "ns")
    threads = {
        e["tid"]: e["args"]["name"] for e in made["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"
    }
    assert any(e["ph"] == "M" and e["name"] == "process_name" and e["args"]["name"] for e in made["traceEvents"])
    complete = [e for e in made["traceEvents"] if e["ph"] == "X"]
    assert len(complete) + sum(e["ph"] == "M" for e in made["traceEvents"]) == len(made["traceEvents"])
    for event in complete:
        assert isinstance(event["name"], str) and event["pid"] == 1 and event["tid"] in threads
        assert event["ts"] >= 0 and event["dur"] >= 0
    for thread in threads:  # on one thread complete events must nest or follow one another
        ends: list[float] = []
        for event in sorted((e for e in complete if e["tid"] == thread), key=lambda e: (e["ts"], -e["dur"])):
            while ends and ends[-1] <= event["ts"] + 1:
                ends.pop()
            assert not ends or event["ts"] + event["dur"] <= ends[-1] + 1
            ends.append(event["ts"] + event["dur"])
    return [{**event, "lane": threads[event["tid"]]} for event in complete]


def test_a_trace_is_whole_and_in_microseconds() -> None:
    unknown = line(["mystery", 0.5, 0.75], step=2, at=1020.0)
    events = check_trace(trace([STEP, EVALUATION, unknown], "a run"))
    assert len(events) == 11
    by_name = {event["name"]: event for event in events}
    assert (by_name["gen"]["ts"], by_name["gen"]["dur"], by_name["gen"]["lane"]) == (0.0, 4e6, "generation")
    assert [(e["ts"], e["dur"]) for e in events if e["lane"] == "judge"] == [(1e6, 1e6), (3e6, 2.5e6)]
    assert by_name["phase1 step 1"]["lane"] == by_name["evaluation"]["lane"] == "steps"
    assert by_name["evaluation"]["ts"] == 10e6 and by_name["evaluation"]["args"] == {"stage": "phase1", "step": 1}
    assert by_name["mystery"]["lane"] == OTHER and by_name["mystery"]["ts"] == 20.5e6
    assert trace([], "empty")["otherData"] == {"run": "empty", "begun": 0.0}


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", str(made)]) == 0
    events = check_trace(json.loads((made / "trace.json").read_text()))
    lanes = {event["lane"] for event in events}
    assert {"steps", "generation", "rules", "waiting for rewards", "training"} <= lanes <= {*LANES.values(), OTHER}
    out = tmp_path / "part.json"
    assert cli.main(["trace", str(made), "--out", str(out), "--first", "4", "--last=4"]) == 0
    assert {event["args"]["step"] for event in check_trace(json.loads(out.read_text()))} == {4}
    capsys.readouterr()
    for arguments, words in (
        ((str(tmp_path),), "is missing"), ((str(made), "--first", "99"), "nothing of steps 99"),
        ((str(made), "--rl.kind", "dapo"), "takes no recipe keys"),
    ):  # fmt: skip
        assert cli.main(["trace", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_steps_of_a_range() -> None:
    lines = [line(step=step) for step in range(5)]
    assert [one["step"] for one in within(lines, 1, 3)] == [1, 2, 3]
    assert [one["step"] for one in within(lines, 3, None)] == [3, 4]


def test_the_report_shows_it(made: Path, tmp_path: Path) -> None:
    data = collect(made)["time"]
    assert [(bar["stage"], bar["step"]) for bar in data["bars"]] == [
        (one["stage"], one["step"]) for one in data["lines"]
    ]
    assert [stage["stage"] for stage in data["stages"]] == ["sft", "phase1", "phase2"]
    metrics = {one["step"]: one for one in read_lines(made / "metrics.jsonl")}
    for bar in data["bars"]:
        assert sum(bar["seconds"]) == pytest.approx(metrics[bar["step"]]["timing_s/step"], abs=1e-4)
    assert set(data["passes"]) == {"evaluation", "difficulty", "checkpoint"}
    assert all(lane in LANES.values() for one in data["lines"] for lane, *_ in one["spans"])
    assert collect(tmp_path)["time"] is None


def test_the_report_says_how_much_of_the_judge_is_hidden(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    path.write_text(json.dumps(STEP) + "\n" + json.dumps({"kind": "step"}) + "\n" + json.dumps(STEP)[:40])
    data = collect(tmp_path)
    [stage] = data["time"]["stages"]
    assert (stage["judge"], stage["hidden"], stage["step"], stage["steps"]) == (3.5, 2.0, 9.25, 1)
    assert data["time"]["bars"][0]["seconds"] == [0.0, 0.0, 4.0, 1.5, 0.5, 0.5, 2.5, 0.25]
    assert sum("timeline.jsonl" in note for note in data["notes"]) == 2
