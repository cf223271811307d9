"""Evaluation: every number equals one computed by hand, and a killed evaluation goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from longreach.engine import Completion, Sampling
from longreach.rl.evaluate import EvalConfig, evaluate, summarize
from longreach.rl.policy import OnDone, Policy
from longreach.rl.prompts import Prompt
from longreach.rl.ranks import Ranks
from longreach.rl.run import BatchLog

Make = Callable[..., Any]
# benchmark, prompt length, chance, scores of k = 4 completions
QUESTIONS: list[tuple[str, int, float | None, list[float | None]]] = [
    ("hop", 10, 0.5, [1.0, 0.0, 0.0, 1.0]),
    ("hop", 11, 0.25, [0.0, 0.0, 0.0, 0.0]),
    ("look", 10, 0.25, [1.0, 1.0, 1.0, 1.0]),
    ("look", 20, None, [1.0, None, 0.0, None]),
    ("look", 21, None, [None, None, None, None]),
    ("sum", 30, 0.125, [0.0, 1.0, 0.0, 0.0]),
]
BOUNDS = [10, 20]


class StubPolicy:
    """Completions whose tokens name the prompt and the seed; no model."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.ranks = tokenizer, Ranks()
        self.calls: list[tuple[list[str], int, Sampling, int]] = []

    def sample(self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, seed: int, on_done: OnDone) -> Any:
        self.calls.append(([p.example.id for p in prompts], group_size, sampling, seed))
        return [
            [Completion((len(p.ids), i), (-1.0, -1.0), (0.0, 0.0), "stop") for i in range(group_size)] for p in prompts
        ]

    def text(self, completion: Completion) -> str:
        return f"length {completion.ids[0]}, sample {completion.ids[1]}"


@pytest.fixture
def questions(make_prompts: Make) -> list[Prompt]:
    prompts = make_prompts(*[length for _, length, _, _ in QUESTIONS])
    return [
        replace(
            p, example=replace(p.example, benchmark=benchmark, columns={} if chance is None else {"chance": chance})
        )
        for p, (benchmark, _, chance, _) in zip(prompts, QUESTIONS, strict=True)
    ]


@pytest.fixture
def run(policy: Policy, questions: list[Prompt], scripted: Make) -> Make:
    """`evaluate` with the scripted scores; gives summary, rows and the stub."""

    def evaluated(
        config: EvalConfig, *, name: str = "phase1", log: BatchLog | None = None, on_batch: Any = lambda count: None
    ) -> Any:
        stub: Any = StubPolicy(policy.tokenizer)
        reward = scripted(lambda example, place: QUESTIONS[int(example.id[1:])][3][place])
        made = evaluate(
            stub, reward, questions, config, bounds=BOUNDS, seed=3, name=name, step=12, log=log, on_batch=on_batch
        )  # fmt: skip
        return *made, stub

    return evaluated


def test_accuracies_and_errors_are_those_computed_by_hand(run: Make) -> None:
    summary, _, _ = run(EvalConfig(k=4))
    assert (summary["stage"], summary["step"], summary["k"]) == ("phase1", 12, 4)
    hop, look, total = summary["benchmarks"]
    assert [hop["name"], look["name"], total["name"]] == ["hop", "look", "sum"]
    assert (hop["accuracy"], hop["n"]) == (0.25, 2)
    assert hop["stderr"] == pytest.approx(sqrt(((0.5 - 0.25) ** 2 + 0.25**2) / 1 / 2))
    assert (look["accuracy"], look["n"], look["left_out"]) == (0.75, 2, 6)  # means 1 and 0.5; the third has no verdict
    assert (total["accuracy"], total["stderr"], total["n"]) == (0.25, None, 1)


def test_pass_at_k_is_unbiased_and_needs_k_verdicts(run: Make) -> None:
    hop, look, total = run(EvalConfig(k=4))[0]["benchmarks"]
    assert hop["pass_at"] == pytest.approx({"1": 0.25, "2": (1 - 1 / 6) / 2, "4": 0.5})  # 2 of 4: 1 - C(2,2)/C(4,2)
    assert look["pass_at"] == pytest.approx({"1": 0.75, "2": 1.0, "4": 1.0})
    assert total["pass_at"] == pytest.approx({"1": 0.25, "2": 0.5, "4": 1.0})
    assert hop["pass_at_stderr"]["1"] == pytest.approx(hop["stderr"])
    assert set(run(EvalConfig(k=3))[0]["benchmarks"][0]["pass_at"]) == {"1", "2", "3"}


def test_buckets_are_bounded_above_inclusively_and_the_rest_follows(run: Make) -> None:
    summary, _, _ = run(EvalConfig(k=4))
    first, second, above = summary["buckets"]
    assert (first["upper"], first["accuracy"], first["n"]) == (10, 0.75, 2)
    assert (second["upper"], second["accuracy"], second["n"]) == (20, 0.25, 2)
    assert (above["upper"], above["accuracy"], above["n"], above["left_out"]) == (None, 0.25, 1, 4)
    hop = summary["benchmarks"][0]
    assert [(b["upper"], b["accuracy"], b["n"]) for b in hop["buckets"]] == [(10, 0.5, 1), (20, 0.0, 1)]


def test_the_headline_alone_makes_the_top_table_and_the_chance(run: Make) -> None:
    summary, _, _ = run(EvalConfig(k=4, headline=("hop",)))
    assert [(b["name"], b["headline"]) for b in summary["benchmarks"]] == [
        ("hop", True),
        ("look", False),
        ("sum", False),
    ]
    assert summary["buckets"] == summary["benchmarks"][0]["buckets"]
    assert summary["chance"] == pytest.approx((0.5 + 0.25) / 2)
    whole = run(EvalConfig(k=4))[0]
    assert all(b["headline"] for b in whole["benchmarks"])
    assert whole["chance"] == pytest.approx((0.5 + 0.25 + 0.25 + 0.125) / 4)
    assert run(EvalConfig(k=4, headline=("none",)))[0]["chance"] is None


def test_rows_hold_what_the_run_folder_promises(run: Make, questions: list[Prompt]) -> None:
    _, rows, _ = run(EvalConfig(k=4))
    assert [row["prompt_id"] for row in rows] == [q.example.id for q in questions]
    assert [row["scores"] for row in rows] == [scores for *_, scores in QUESTIONS]
    first = rows[0]
    assert first["completions"] == [f"length 10, sample {i}" for i in range(4)]
    assert first["reasons"] == ["scripted"] * 4
    assert (first["prompt_length"], first["benchmark"], first["answers"], first["question"]) == (
        10,
        "hop",
        ["x"],
        "prompt 0",
    )
    json.dumps(rows, allow_nan=False)


def test_questions_are_sampled_in_batches_with_the_settings(run: Make) -> None:
    config = EvalConfig(k=2, batch=4, max_completion=9, temperature=0.5, top_p=0.8, top_k=3)
    seen: list[int] = []
    _, _, stub = run(config, on_batch=seen.append)
    assert [(ids, k, sampling) for ids, k, sampling, _ in stub.calls] == [
        (["p0", "p1", "p2", "p3"], 2, Sampling(9, 0.5, 0.8, 3)),
        (["p4", "p5"], 2, Sampling(9, 0.5, 0.8, 3)),
    ]
    assert seen == [4, 2]
    seeds = [seed for *_, seed in stub.calls]
    assert len(set(seeds)) == 2
    assert [seed for *_, seed in run(config, name="sft")[2].calls] == seeds, (
        "every stage of a run draws the same random numbers"
    )


class Killed(Exception):
    """A kill between two batches."""


def test_a_killed_evaluation_goes_on_after_its_last_whole_batch(run: Make, tmp_path: Path) -> None:
    config, path = EvalConfig(k=4, batch=2), tmp_path / "evals" / "phase1.batches.jsonl"
    whole = run(config)[:2]

    def die(count: int) -> None:
        if path.read_text(encoding="utf-8").count("\n") == 2:
            raise Killed

    with pytest.raises(Killed):
        run(config, log=BatchLog(path, {"step": 12}), on_batch=die)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text(lines[0] + "\n" + lines[1][: len(lines[1]) // 2], encoding="utf-8")  # the second one is torn
    summary, rows, stub = run(config, log=BatchLog(path, {"step": 12}))
    assert [ids for ids, *_ in stub.calls] == [["p2", "p3"], ["p4", "p5"]]
    assert json.dumps([summary, rows]) == json.dumps(list(whole))
    assert run(config, log=BatchLog(path, {"step": 12}))[2].calls == [], "the torn line did not swallow what follows"


def test_batches_of_other_weights_are_made_again(run: Make, tmp_path: Path) -> None:
    config, path = EvalConfig(k=4, batch=3), tmp_path / "log.jsonl"
    run(config, log=BatchLog(path, {"step": 11}))
    assert len(run(config, log=BatchLog(path, {"step": 12}))[2].calls) == 2
    assert run(config, log=BatchLog(path, {"step": 12}))[2].calls == []


def test_nothing_to_summarize_is_no_error() -> None:
    summary = summarize([], EvalConfig(), bounds=BOUNDS, name="base", step=0)
    assert (summary["chance"], summary["benchmarks"]) == (None, [])
    assert [(b["upper"], b["accuracy"], b["n"]) for b in summary["buckets"]] == [(10, None, 0), (20, None, 0)]
