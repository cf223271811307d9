"""The rule reward: a table of adversarial cases, its reasons, bounded time, and properties that hold for any text."""

from __future__ import annotations

import ast
import builtins
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import longreach.rl
from longreach.rl.matching import ANSWER_TYPES
from longreach.rl.rewards import rule_reward
from longreach.rl.rows import Example
from longreach.rl.rules import NOT_JUDGED, REASONS, SCORINGS, score_example

from .hostile import SIZE, hostile_texts

CASES: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("rule_cases.jsonl").read_text(encoding="utf-8").splitlines()
]
GOLDS = {"span": "Paris", "number": "5", "list": "5; 6", "date": "5 October 1987", "choice": "B", "yes_no": "yes"}
# Seconds of CPU for a million characters. The slowest took 0.3 s when this was written; backtracking takes hours.
BOUND = 3.0


def verdict(case: dict[str, Any]) -> Any:
    golds = [case["gold"]] if isinstance(case["gold"], str) else case["gold"]
    scoring = case.get("scoring", "strict")
    return rule_reward(
        case["completion"], golds, answer_type=case["type"], choices=case.get("choices"), scoring=scoring
    )


@pytest.mark.parametrize("case", CASES, ids=[f"line {number}" for number, _ in enumerate(CASES, 1)])
def test_table(case: dict[str, Any]) -> None:
    made = verdict(case)
    assert (made.score, made.reason) == (case["score"], case["reason"]), case["why"]


def test_the_table_is_whole() -> None:
    assert len(CASES) >= 300
    assert all(case["why"] and case["score"] == float(case["reason"] == "correct") for case in CASES)
    assert {case["reason"] for case in CASES} == set(REASONS) - {"partial"}  # only F1 is partial
    assert {case["type"] for case in CASES} == set(ANSWER_TYPES) - {"free"}
    assert set(REASONS) > NOT_JUDGED


def test_free_is_a_span() -> None:
    assert rule_reward("the answer is Paris", ["Paris"], answer_type="free").score == 1.0
    assert rule_reward("the answer is 5.0", ["5"], answer_type="free").score == 0.0  # where auto reads a number
    assert rule_reward("the answer is 5.0", ["5"]).score == 1.0


def test_scorings_differ_as_told() -> None:
    """Completions that tell every scoring from every other."""

    def scores(completion: str, *golds: str) -> list[float]:
        return [rule_reward(completion, golds, answer_type="span", scoring=scoring).score for scoring in SCORINGS]

    assert SCORINGS == ("strict", "cover", "qwenlong-l1", "qwenlong-l1-eval", "longbench", "longbench-em")
    answer = "Therefore, the answer is (Paris, the capital)."
    assert scores("</think>" + answer, "Paris") == [0.0, 1.0, 1.0, 1.0, pytest.approx(2 / 3), 0.0]
    assert scores(answer, "Paris") == [0.0, 1.0, 0.0, 1.0, pytest.approx(2 / 3), 0.0]
    assert scores("</think>" + answer, "Oslo", "Paris capital") == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert scores("</think>the answer is the", "Paris") == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    made = rule_reward("</think>" + answer, ["Paris"], scoring="longbench")
    assert (made.reason, made.extracted) == ("partial", "(Paris, the capital)")


@pytest.mark.parametrize(
    "completion, finish, reason",
    [
        ("the answer is 12", "stop", "correct"),
        ("the answer is 12", "length", "truncated"),  # 12|34
        ("the answer is 12.", "length", "truncated"),  # 12.|5
        ("the answer is Paris.", "length", "wrong"),
        ("the answer is 12\n", "length", "correct"),
        ("the answer is \\boxed{12} by", "length", "correct"),
        ("the answer is \\boxed{12", "length", "truncated"),
        ("I will", "length", "truncated"),
        ("I will", "stop", "no_answer"),
        ("<think>12", "length", "truncated"),
    ],
)
def test_what_the_length_limit_cuts(completion: str, finish: str, reason: str) -> None:
    row = Example("n", "b", ("12",), context="c", question="q")
    for scoring in ("strict", "cover"):
        assert score_example(row, completion, finish, scoring).reason == reason
    assert score_example(row, completion, "length", "longbench") == rule_reward(completion, ["12"], scoring="longbench")


def test_each_type_and_scoring_is_quick_on_hostile_texts() -> None:
    kinds, scorings = list(GOLDS.items()), list(SCORINGS)
    for number, (name, text) in enumerate(hostile_texts(20_000).items()):
        tries = [(kind, "strict") for kind in kinds[number % 2 :: 2]] + [(kinds[number % 6], scorings[number // 6 % 6])]
        start = time.process_time()
        for (kind, gold), scoring in tries:
            made = rule_reward("</think>" + text, [gold], answer_type=kind, scoring=scoring)
            assert made.reason in REASONS
        assert time.process_time() - start < BOUND, name


@pytest.mark.slow
def test_a_million_characters_take_bounded_time() -> None:
    kinds = list(GOLDS.items())
    for number, (name, text) in enumerate(hostile_texts().items()):
        assert len(text) > SIZE // 2
        kind, gold = kinds[number % 6]
        scoring = ("strict", "strict", "cover", *SCORINGS[2:])[number // 6 % 7]
        start = time.process_time()
        rule_reward("</think>" + text, [gold], answer_type=kind, scoring=scoring)
        assert time.process_time() - start < BOUND, f"{name}, {kind}, {scoring}"


def test_nothing_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of eval, exec or compile in the code, and none while the whole table is scored under each scoring."""
    folder = Path(longreach.rl.__file__).parent
    names = "answers choices dates longbench matching numbers published rules spans"
    for name in names.split():
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
        assert not called & {"eval", "exec", "compile", "__import__", "getattr", "globals"}, name

    def forbidden(*_: Any) -> None:
        raise AssertionError("evaluated")

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "eval", forbidden)
        patched.setattr(builtins, "exec", forbidden)
        for case in CASES:
            for scoring in SCORINGS:
                verdict(case | {"scoring": scoring})


# What policies write: words of the rules' own languages, signs, and anything else.
PIECES = st.one_of(
    st.sampled_from(
        "the answer is|Therefore, |Answer: |\\boxed{|}|(|)|**|Paris|London| or |not |5|1,234|1.5|%|$|-| million|\n|\n\n"
        "|<think>|</think>|巴黎|是|。|B|yes|October|1987|;|, |\u200b|\u202e|<|im_end|>|insert answer here".split("|")
    ),
    st.text(max_size=6),
)
TEXTS = st.lists(PIECES, max_size=14).map("".join)
KINDS = st.sampled_from(ANSWER_TYPES)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(TEXTS, st.sampled_from(list(GOLDS.values())), KINDS, st.sampled_from(SCORINGS))
@example("the answer is \ud800", "Paris", "span", "strict")
def test_any_text_has_a_verdict(text: str, gold: str, kind: str, scoring: str) -> None:
    made = rule_reward(text, [gold], answer_type=kind, scoring=scoring)
    assert 0.0 <= made.score <= 1.0 and math.isfinite(made.score)
    assert made.reason in REASONS
    assert (made.score == 1.0) == (made.reason == "correct")
    assert made == rule_reward(text, [gold], answer_type=kind, scoring=scoring)
    assert made.score == 0.0 or made.extracted


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXTS, st.sampled_from(list(GOLDS.values())), KINDS)
def test_invisible_characters_and_reasoning_change_nothing(text: str, gold: str, kind: str) -> None:
    plain = rule_reward("</think>" + text, [gold], answer_type=kind)
    assert rule_reward("the answer is Oslo</think>" + text, [gold], answer_type=kind) == plain
    assert rule_reward("</think>" + "\u200b".join(text), [gold], answer_type=kind).score == plain.score or "<" in text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=30), st.sampled_from(["Paris", "5", "B", "yes", "5 October 1987"]))
def test_an_answer_beside_the_gold_one_never_counts(other: str, gold: str) -> None:
    """Naming the gold answer and another one is no answer, whatever the other one is."""
    if not any(letter.isalnum() for letter in other):
        return
    for text in (f"{gold} or Q{other}", f"Q{other} or {gold}", f"Q{other}; {gold}"):
        line = " ".join(text.split())
        assert rule_reward(f"Therefore, the answer is {line}", [gold]).score == 0.0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.from_regex(r"[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8}){0,3}", fullmatch=True))
def test_the_gold_answer_is_right_however_it_is_dressed(gold: str) -> None:
    for dress in ("{}", "({})", "**{}**", '"{}"', "`{}`", "the {}", "{}!", "{}.\n\nIt stands there.", "\\text{{{}}}"):
        assert rule_reward(f"Therefore, the answer is {dress.format(gold)}", [gold], answer_type="span").score == 1.0
    assert rule_reward(f"\\boxed{{{gold}}}", [gold], answer_type="span").score == 1.0
    assert rule_reward(f"the answer is {gold.upper()}", ["Oslo", gold], answer_type="span").score == 1.0
    assert rule_reward(f"the answer is {gold}x", [gold], answer_type="span").score == 0.0
