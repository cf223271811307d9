"""A run whose judge fails stops instead of training on noise, keeps what it sampled, and goes on as if nothing had been."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longreach.rl import train
from longreach.rl.console import Console
from longreach.rl.policy import Policy
from longreach.rl.rollouts import Unjudged
from longreach.rl.run import RunFolder, read_lines

Make = Callable[..., Any]


class Opinions:
    """A judge's server with an opinion on everything, which can be told to fail from its n-th answer on."""

    def __init__(self, server: Any) -> None:
        self.server, self.healthy = server, 10**9
        self.answered: list[str] = []
        server.respond = self.respond

    def respond(self, _n: int, body: dict[str, Any]) -> Any:
        user = body["messages"][1]["content"]
        with self.server.lock:
            if len(self.answered) >= self.healthy:
                return self.server.http(500)
            self.answered.append(user)
        yes = hashlib.sha256(user.encode()).digest()[0] % 2
        return self.server.chat("[[YES]]" if yes else "[[NO]]")


@pytest.fixture
def opinions(server: Any) -> Opinions:
    return Opinions(server)


@pytest.fixture
def recipe(make_recipe: Make, server: Any) -> Any:
    judge = {
        "base_url": server.url, "model": "m", "tail": 200, "retries": 0, "backoff": 0.0, "max_failure_share": 0.1,
        "breaker_failures": 1000,
    }  # fmt: skip
    phase = {"upper": 500, "max_completion": 12, "steps": 3, "learning_rate": 1e-2}
    return make_recipe(
        sft=None, data__eval=[], retrospective=None, phases=[phase], reward={"judge": judge},
        rl={"group_size": 6, "batch_prompts": 3, "micro_batch_tokens": 600}, run={"save_every": 9},
    )  # fmt: skip


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call of the generator."""
    calls: list[int] = []
    original = Policy.sample
    monkeypatch.setattr(Policy, "sample", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    return calls


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def go(recipe: Any, run_dir: Path) -> None:
    train(recipe, run_dir, console=Console(quiet=True))


@pytest.fixture
def whole(recipe: Any, opinions: Opinions, sampled: list[int], tmp_path: Path) -> Path:
    """A run with a healthy judge."""
    run_dir = tmp_path / "whole"
    go(recipe, run_dir)
    assert len(sampled) == 3
    sampled.clear()
    return run_dir


def test_a_run_reports_what_judging_cost_and_where_rule_and_judge_agree(whole: Path) -> None:
    for line in metrics(whole):
        assert line["judge/calls"] >= 1
        assert line["reward/judge_time"] > 0
        assert 0 <= line["reward/judge_wait"] <= line["timing_s/reward"] + 1e-3
        judged = sum(value for name, value in line.items() if name.startswith("reward/agreement/"))
        assert judged >= 1
        assert line["judge/breaker"] == 0.0


@pytest.mark.parametrize("failing_step", [1, 2])
def test_it_stops_keeps_its_completions_and_goes_on_to_the_same_weights(
    failing_step: int, whole: Path, recipe: Any, opinions: Opinions, sampled: list[int], tmp_path: Path
) -> None:
    run_dir, lines = tmp_path / "again", metrics(whole)
    opinions.healthy = (
        len(opinions.answered) + (int(lines[failing_step - 2]["judge/calls"]) if failing_step > 1 else 0) + 1
    )
    before = len(opinions.answered)
    with pytest.raises(Unjudged, match=r"gave no verdict on \d+ of the last .*\(500: \d+\).*max_failure_share = 0.1"):
        go(recipe, run_dir)
    kept = list(read_lines(RunFolder(run_dir).unjudged_file))
    assert len(kept) == 18
    assert {line["step"] for line in kept} == {failing_step}
    assert all(line["reward"] is None and line["advantage"] is None and line["completion_ids"] for line in kept)
    assert len(sampled) == failing_step
    assert not RunFolder(run_dir).rollouts_file("phase1", failing_step).exists()

    with pytest.raises(Unjudged):  # still down: nothing is lost by trying
        go(recipe, run_dir)
    assert len(list(read_lines(RunFolder(run_dir).unjudged_file))) == 18

    opinions.healthy = 10**9
    go(recipe, run_dir)
    assert len(sampled) == 3, "what was sampled once is not sampled again"
    assert not RunFolder(run_dir).unjudged_file.exists()
    answered = opinions.answered[before:]
    assert len(answered) == len(set(answered)), "no question was answered twice"
    assert (run_dir / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    for step in (1, 2, 3):
        files = [RunFolder(folder).rollouts_file("phase1", step).read_bytes() for folder in (run_dir, whole)]
        assert files[0] == files[1]


def test_a_refused_key_keeps_the_completions_too(recipe: Any, server: Any, sampled: list[int], tmp_path: Path) -> None:
    server.respond = lambda _n, _body: server.http(401)
    with pytest.raises(Unjudged, match="401"):
        go(recipe, tmp_path / "run")
    assert len(list(read_lines(RunFolder(tmp_path / "run").unjudged_file))) == 18
    Opinions(server)
    go(recipe, tmp_path / "run")
    assert len(sampled) == 3


def test_with_dynamic_sampling_every_batch_is_kept(
    recipe: Any, opinions: Opinions, sampled: list[int], tmp_path: Path
) -> None:
    dynamic = replace(
        recipe, rl=replace(recipe.rl, dynamic_sampling=True, max_batches=3, batch_prompts=4, group_size=3)
    )
    go(dynamic, tmp_path / "whole")
    batches, first = len(sampled), int(metrics(tmp_path / "whole")[0]["judge/calls"])
    assert batches > 3, "a step took more than one batch"
    asked, opinions.healthy = len(opinions.answered), len(opinions.answered) + first - 1
    with pytest.raises(Unjudged):
        go(
            replace(dynamic, reward=replace(dynamic.reward, judge=replace(_judge(dynamic), max_failure_share=0.01))),
            tmp_path / "x",
        )
    assert len(opinions.answered) == asked + first - 1
    kept = list(read_lines(RunFolder(tmp_path / "x").unjudged_file))
    assert len(kept) == 12 * (len(sampled) - batches)
    assert len({line["group"] for line in kept}) == len(kept) // 3


def _judge(recipe: Any) -> Any:
    assert recipe.reward.judge is not None
    return recipe.reward.judge


def test_completions_of_other_weights_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, stays in ((4, True), (3, False), (5, False)):
        folder.write_lines(folder.unjudged_file, [{"step": step, "stage": "phase1"}])
        folder.rewind(3, ())
        assert folder.unjudged_file.exists() == stays
