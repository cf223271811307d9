"""The published rules as they behave.

published_outcomes.jsonl holds what the released functions themselves answered when they were run on these completions
(QwenLong-L1's docqa and docmath, training and evaluation; LongBench's qa_f1_score): facts, none of their code. Where
one raised, the file says so, and ours gives 0.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from longreach.rl.rewards import rule_reward
from longreach.rl.rules import SCORINGS

OUTCOMES: list[dict[str, Any]] = [
    json.loads(line)
    for line in Path(__file__).with_name("published_outcomes.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("scoring", [scoring for scoring in SCORINGS if scoring not in ("strict", "cover")])
@pytest.mark.parametrize("kind", ["span", "number"])
def test_outcomes_are_those_of_the_released_functions(kind: str, scoring: str) -> None:
    rows = [row for row in OUTCOMES if row["type"] == kind and scoring in row["scores"]]
    if scoring.startswith("longbench") and kind == "number":
        assert not rows  # LongBench knows no numbers
        return
    wrong = []
    for row in rows:
        made = rule_reward(row["completion"], [row["gold"], "another"], answer_type=kind, scoring=scoring)
        if scoring.startswith("longbench"):
            made = rule_reward(row["completion"], [row["gold"]], answer_type=kind, scoring=scoring)
        expected = 0.0 if row["scores"][scoring] == "raises" else row["scores"][scoring]
        if made.score != expected:
            wrong.append((row["completion"], row["gold"], expected, made))
    assert not wrong
    assert len(rows) > 150 and {0, 1} <= {row["scores"][scoring] for row in rows}


def test_deviations_are_the_listed_ones() -> None:
    """Their code raises on a gold without a number, on infinities, on integers beyond a float; ours says 0."""
    raised = [row for row in OUTCOMES if "raises" in row["scores"].values()]
    reasons = Counter(
        "no number in the gold" if not any(letter.isdigit() for letter in row["gold"].replace("about 5", "")) else "digits"
        for row in raised
    )  # fmt: skip
    assert reasons["digits"] and reasons["no number in the gold"]
    assert score("5", "yes", "number") == score("5", "about 5", "number") == 0.0
    huge = "9" * 400 + ".0"
    assert score(huge, huge, "number") == 0.0
    assert score("9" * 310, "1", "number", "qwenlong-l1-eval") == 0.0
    for digits in (4300, 4301):  # 0 past the interpreter's limit
        assert score("1" + "0" * (digits - 1), "0", "number") == float(digits > 4300)
    made = rule_reward("</think>The correct answer is (B)", ["Rome"], answer_type="choice", choices=["Paris", "Rome"], scoring="qwenlong-l1")  # fmt: skip
    assert made.score == 1.0


def score(answer: str, gold: str, kind: str, scoring: str = "qwenlong-l1") -> float:
    return rule_reward(f"</think>Therefore, the answer is {answer}", [gold], answer_type=kind, scoring=scoring).score


def test_only_the_first_gold_answer_counts_in_qwenlong_and_any_in_longbench() -> None:
    text = "</think>the answer is London"
    for scoring, right in (("qwenlong-l1", 0.0), ("qwenlong-l1-eval", 0.0), ("longbench", 1.0), ("longbench-em", 1.0)):
        assert rule_reward(text, ["Paris", "London"], answer_type="span", scoring=scoring).score == right


@pytest.mark.parametrize(
    "completion, letter",
    [
        ("</think>The correct answer is (B).", "B"),
        ("</think>The correct answer is B", "B"),
        ("</think>**The correct answer is (B)**", "B"),
        ("</think>The correct answer is A, no: The correct answer is (B)", "B"),  # parentheses first
        ("</think>The correct answer is (B). The correct answer is (C)", "B"),  # the first of them
        ("</think>the correct answer is (B)", None),
        ("</think>The correct answer is (E)", None),
        ("</think>B", None),
    ],
)
def test_choices_as_published(completion: str, letter: str | None) -> None:
    for scoring in ("qwenlong-l1", "qwenlong-l1-eval", "longbench", "longbench-em"):
        made = rule_reward(completion, ["B"], answer_type="choice", scoring=scoring)
        assert (made.extracted, made.score) == (letter, float(letter == "B"))
        assert made.reason == ("correct" if letter else "no_answer")
    wrong = rule_reward("The correct answer is (C)", ["B"], answer_type="choice", scoring="longbench")
    assert (wrong.score, wrong.reason) == (0.0, "wrong")


def test_reasons_of_the_published_rules() -> None:
    def reason(text: str, scoring: str) -> str:
        return rule_reward(text, ["Paris"], answer_type="span", scoring=scoring).reason

    assert reason("the answer is Paris", "qwenlong-l1") == "truncated"  # no closed reasoning
    assert reason("the answer is Paris", "qwenlong-l1-eval") == "correct"
    assert reason("</think>Paris", "qwenlong-l1") == "no_answer"
    assert reason("", "qwenlong-l1") == reason("", "longbench") == "empty"
    assert reason("</think>the answer is Oslo", "qwenlong-l1") == "wrong"


def test_longbench_scores_the_answer_where_one_is_announced_and_else_the_whole_response() -> None:
    def f1(text: str) -> float:
        return rule_reward(text, ["Paris"], answer_type="span", scoring="longbench").score

    assert f1("Paris") == f1("<think>Oslo</think>Paris") == f1("Therefore, the answer is Paris.") == 1.0
    assert f1("It is Paris") == 0.5
    assert f1("Oslo") == 0.0
