"""The tables against brute force: means over questions, pass@k by drawing, every count by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from longreach.rl.benchmarks.questions import Question
from longreach.rl.benchmarks.registry import SEVEN
from longreach.rl.benchmarks.scores import Score, Scored
from longreach.rl.benchmarks.summary import ks_of, means, passes, summarize
from longreach.rl.rows import Example

Settings = Callable[..., Any]


def score(sample: int, rule: float, judge: float | None, **more: Any) -> Score:
    values: dict[str, Any] = {
        "score": max(rule, judge or 0.0), "unjudged": False, "asked": judge is not None, "published": rule, "reason": "wrong",
        "answer": "x", "finish_reason": "stop", "tokens": 10, "failed": None, "rules": {"strict": rule},
    }  # fmt: skip
    return Score(**{"sample": sample, "rule": rule, "judge": judge, **values, **more})


def question(benchmark: str, index: int, scores: list[Score], length: int = 100, cut: int = 0) -> Scored:
    example = Example(f"{benchmark}-{index}", benchmark, ("x",), context="c", question="q")
    return Scored(Question(benchmark, example, np.zeros(length - cut, np.int32), length), tuple(scores))


@pytest.fixture
def many() -> list[Scored]:
    draw = random.Random(0)
    return [
        question(
            name, i,
            [score(s, float(draw.random() < 0.4), draw.choice([0.0, 1.0, None])) for s in range(4)],
            length=draw.randint(10, 400), cut=draw.choice([0, 5]),
        )
        for name in SEVEN
        for i in range(15)
    ]  # fmt: skip


def test_means_are_over_questions_first(many: list[Scored], settings: Settings) -> None:
    made = summarize(many, settings("dir", samples=4, rules=["strict"]))
    for benchmark in made["benchmarks"]:
        mine = [one for one in many if one.question.benchmark == benchmark["name"]]
        by_question = [np.mean([s.score for s in one.scores]) for one in mine]
        assert benchmark["score"]["mean"] == pytest.approx(np.mean(by_question))
        judged = [[s.judge for s in one.scores if s.judge is not None] for one in mine]
        known = [np.mean(values) for values in judged if values]
        assert benchmark["judge"]["mean"] == pytest.approx(np.mean(known))
        assert (benchmark["judge"]["n"], benchmark["judge"]["left_out"]) == (len(known), len(mine) - len(known))
        assert benchmark["score"]["low"] < benchmark["score"]["mean"] < benchmark["score"]["high"]
        assert benchmark["rules"]["strict"]["mean"] == pytest.approx(benchmark["rule"]["mean"])
        assert sum(b["n"] for b in benchmark["buckets"]) == len(mine)
    average = made["average"]
    assert average["score"]["mean"] == pytest.approx(np.mean([b["score"]["mean"] for b in made["benchmarks"]]))
    assert average["pass_at"]["2"]["mean"] == pytest.approx(
        np.mean([b["pass_at"]["2"]["mean"] for b in made["benchmarks"]])
    )
    spread = average["score"]["high"] - average["score"]["low"]
    assert spread < min(b["score"]["high"] - b["score"]["low"] for b in made["benchmarks"])


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(many: list[Scored]) -> None:
    for k in (1, 2, 3, 4):
        for one, value in zip(many, passes(many, k), strict=True):
            draws = list(itertools.combinations([s.score for s in one.scores], k))
            assert value == pytest.approx(sum(max(draw) >= 1.0 for draw in draws) / len(draws))
    assert passes(many, 1) == pytest.approx(means(many, "score"))


def test_which_k() -> None:
    assert [ks_of(n) for n in (1, 2, 5, 16)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8, 16]]


def test_buckets_hold_lower_less_than_length_up_to_upper(settings: Settings) -> None:
    lengths = [64, 65, 128, 129, 257]
    scored = [question("qasper", i, [score(0, float(i % 2), None)], length) for i, length in enumerate(lengths)]
    made = summarize(scored, settings("dir", buckets=[64, 128, 256], rules=["strict"]))["buckets"]
    assert [(b["upper"], b["n"]) for b in made] == [(64, 1), (128, 2), (256, 1), (None, 1)]
    assert [b["mean"] for b in made] == [0.0, 0.5, 1.0, 0.0]


def test_every_count_and_list(settings: Settings) -> None:
    scored = [
        question("qasper", 0, [score(0, 0.0, 0.0, failed="500", reason="request_failed", asked=False, tokens=None), score(1, 1.0, 1.0)], cut=3),
        question("qasper", 1, [score(0, 0.0, None, unjudged=True, asked=True), score(1, 0.0, 0.0, finish_reason="length")]),
        question("musique", 0, [score(0, 1.0, 0.0), score(1, 0.0, 1.0)]),
    ]  # fmt: skip
    made = summarize(scored, settings("dir", samples=2, rules=["strict"]))
    assert made["counts"] == {
        "questions": 3, "responses": 6, "prompts_cut": 1, "answers_cut": 1, "failed_requests": 1, "judge_failures": 1, "tokens": 50,
    }  # fmt: skip
    assert made["failures"] == [{"benchmark": "qasper", "id": "qasper-0", "sample": 0, "why": "500"}]
    assert made["judge_failures"] == [{"benchmark": "qasper", "id": "qasper-1", "sample": 0, "answer": "x"}]
    assert made["agreement"]["musique"] == {"both": 0, "rule_only": 1, "judge_only": 1, "neither": 0}
    assert made["agreement"]["qasper"] == {"both": 1, "rule_only": 0, "judge_only": 0, "neither": 1}, (
        "a failure is no opinion"
    )
    [qasper, _] = made["benchmarks"]
    assert qasper["score"]["mean"] == 0.25 and qasper["counts"]["failed_requests"] == 1
    assert made["average"] is None


def test_the_same_seed_gives_the_same_tables(many: list[Scored], settings: Settings) -> None:
    keys = {"samples": 4, "rules": ["strict"]}
    assert summarize(many, settings("dir", **keys)) == summarize(many, settings("dir", **keys))
    assert summarize(many, settings("dir", **keys)) != summarize(many, settings("dir", seed=1, **keys))
