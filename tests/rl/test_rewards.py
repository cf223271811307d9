"""Rule reward (strict and published), user functions, and how the parts are combined."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from longreach.rl.data import Example
from longreach.rl.judge import Case, Judge, JudgeConfig
from longreach.rl.rewards import Reward, RewardConfig, Verdict, make_reward, rule_reward
from longreach.rl.spans import normal_form


def strict(answer: str, gold: str | list[str], answer_type: str = "auto", choices: list[str] | None = None) -> float:
    golds = [gold] if isinstance(gold, str) else gold
    return rule_reward(
        f"<think>hm</think>Therefore, the answer is {answer}.", golds, answer_type=answer_type, choices=choices
    ).score


def published(answer: str, gold: str, answer_type: str) -> float:
    text = f"<think>hm</think>Therefore, the answer is {answer}."
    return rule_reward(text, [gold], answer_type=answer_type, scoring="qwenlong-l1").score


# Every hole of the released code: (answer, gold, type, what the released rule gives).
HOLES = [
    ("the", "Paris", "span", 1.0),
    ("the", "2024", "span", 1.0),
    ("e", "Peter", "span", 1.0),
    ("3", "13", "span", 1.0),
    ("2", "2024", "span", 1.0),
    ("not Paris", "Paris", "span", 1.0),
    ("Paris or London", "London", "span", 1.0),
    ("paris london rome 2024 2023", "2024", "span", 1.0),
    ("10", "1000", "number", 1.0),
    ("100", "100000", "number", 1.0),
    ("-5", "5", "number", 1.0),
    ("0.12", "12", "number", 1.0),
    ("1001", "1000", "number", 1.0),
    ("1002", "1000", "number", 0.0),
    ("0.004", "0.001", "number", 0.0),
]


@pytest.mark.parametrize("answer, gold, answer_type, released", HOLES)
def test_holes_of_the_released_rule_are_closed(answer: str, gold: str, answer_type: str, released: float) -> None:
    assert strict(answer, gold, answer_type) == 0.0
    assert strict(answer, gold) == 0.0
    assert published(answer, gold, answer_type) == released


def test_published_rule_reads_what_the_released_one_read() -> None:
    assert published("Paris", "Paris", "span") == 1.0
    assert published("Berlin", "Paris", "span") == 0.0
    assert published("32.4", "32.4", "number") == 1.0
    assert published("approximately 5", "5", "number") == 0.0
    choice = "</think>The correct answer is (B)"
    assert rule_reward(choice, ["B"], answer_type="choice", scoring="qwenlong-l1").score == 1.0
    assert rule_reward("The correct answer is C.", ["B"], answer_type="choice", scoring="qwenlong-l1").score == 0.0
    assert rule_reward("B", ["B"], answer_type="choice", scoring="qwenlong-l1").score == 0.0
    assert (
        rule_reward("Therefore, The Answer Is Paris", ["Paris"], answer_type="span", scoring="qwenlong-l1").score == 0.0
    )
    assert rule_reward("\\boxed{32.4}", ["32.4"], answer_type="number", scoring="qwenlong-l1").score == 0.0


@pytest.mark.parametrize(
    "completion, reason",
    [
        ("The Answer Is Paris", "correct"),
        ("the correct answer is: **Paris**.", "correct"),
        ("**Therefore, the answer is** Paris", "correct"),
        ("so \\boxed{\\text{Paris}}.", "correct"),
        ("the answer is \\boxed{Paris}", "correct"),
        ('"Therefore, the answer is Paris".', "correct"),
        ("The answer is (Paris).", "correct"),
        ("the answer is London. No: the answer is Paris\nbecause it says so", "correct"),
        ("the answer is\n\nPARIS!", "correct"),
        ("the answer is Paris<|im_end|>", "correct"),
        ("<think>the answer is London</think> the answer is Paris", "correct"),
        ("the answer is Paris. On reflection the answer is London.", "wrong"),
        ("the answer is Paris</think> I am not sure", "no_answer"),
        ("<think>the answer is Paris", "truncated"),
        ("Paris", "no_answer"),
        ("  ", "empty"),
        ("the answer is", "empty"),
        ("the answer is ...", "empty"),
        ("the answer is a", "empty"),
        ("the answer is (insert answer here).", "placeholder"),
        ("the answer is Paris or London", "hedged"),
        ("the answer is Paris/London", "hedged"),
        ("the answer is London, Paris", "hedged"),
    ],
)
def test_where_the_answer_is_found(completion: str, reason: str) -> None:
    verdict = rule_reward(completion, ["Paris"])
    assert verdict.reason == reason
    assert verdict.score == float(reason == "correct")


@pytest.mark.parametrize(
    "answer, gold, same",
    [
        ("stanley hall", ["G. Stanley Hall", "Stanley Hall"], True),
        ("The U.S.", "US", True),
        ("Ｐａｒｉｓ", "paris", True),
        ("Café", "Cafe\u0301", True),
        ("October 5, 1987", "October 5 1987", True),
        ("foul-mouthed", "Foul\u2011mouthed", True),
        ("New York", "New York City", False),
        ("version 1.5", "version 15", False),
        ("12-5", "125", False),
        ("C", "C++", False),
        ("vitamin", "vitamin A", False),
        ("巴黎。", "巴黎", True),
        ("cannot", "can not", False),
    ],
)
def test_spans(answer: str, gold: str | list[str], same: bool) -> None:
    assert strict(answer, gold, "span") == float(same)


def test_empty_normal_form_matches_nothing() -> None:
    assert normal_form("the") == normal_form(" ?! ") == ""
    assert strict("?", "!", "span") == 0.0
    assert strict("the", "a", "span") == 0.0


@pytest.mark.parametrize(
    "answer, gold, same",
    [
        ("$1,577.00", "1577", True),
        ("1577", "$1577.00", True),
        ("€1,577", "$1577.00", False),
        ("1.577 billion", "1577 million", True),
        ("1,577", "1577 million", False),
        ("(1,234)", "-1234", False),  # the template's own parentheses; anything else would forgive the sign
        ("(1,234)", "(1,234)", True),
        ("((1,234))", "-1234", True),
        ("$(1,234)", "-1234", True),
        ("\u22121,234", "-1234", True),
        ("1,234", "-1234", False),
        ("65.4%", "65.4%", True),
        ("65.4 percent", "65.4%", True),
        ("0.654", "65.4%", True),
        ("65.4", "65.4%", False),
        ("12", "0.12", False),
        ("0.6612", "0.66", True),  # rounds to the gold
        ("0.67", "0.66", False),
        ("0.24", "0.2", False),  # rounds to the gold, but by 20 %
        ("24.2634", "24.26", True),
        ("12346", "12345", False),  # integers printed in full are exact
        ("35.4", "35", False),
        ("20683.4 million", "20683 million", True),
        ("20700 million", "20683 million", False),
        ("approximately 5", "5", True),
        ("5 or 6", "5", False),
        ("5-6", "5", False),
        ("1.234,56", "1234.56", True),
        ("1 234 567", "1234567", True),
        ("35 stores", "35", True),
        ("5 months", "5 years", False),
        ("5 hundred", "5", False),
        ("1/2", "0.5", True),
        ("\\boxed{32.4}", "32.4", True),
        ("$42$", "42", True),
        ("1e3", "1000", True),
        ("inf", "1000", False),
        ("nan", "1000", False),
        ("yes", "1", False),
    ],
)
def test_numbers(answer: str, gold: str, same: bool) -> None:
    assert strict(answer, gold, "number") == float(same)


@pytest.mark.parametrize(
    "answer",
    [
        "5" + "`" * 40000 + "6",
        "9" * 40000,
        "1," * 20000 + "x",
        "1e999",
        "-" + " " * 40000 + "x",
        "5" + " " * 40000 + "5",
        "a/" * 20000,
        "a" + "_" * 40000 + "b",
        "\\boxed{" * 5000,
        "the answer is " * 5000,
        "<|" * 20000,
    ],
)
def test_hostile_completions_cost_little(answer: str) -> None:
    start = time.process_time()
    for answer_type in ("number", "span", "choice", "auto"):
        assert strict(answer, "B" if answer_type == "choice" else "5", answer_type) == 0.0
    assert time.process_time() - start < 10  # a pattern that backtracks takes minutes


@pytest.mark.parametrize(
    "answer, gold, choices, same",
    [
        ("B", "B", None, True),
        ("(b)", "B", None, True),
        ("B.", "(B)", None, True),
        ("option B", "B", None, True),
        ("B. Rome", "B", None, True),
        ("A", "B", None, False),
        ("B or C", "B", None, False),
        ("(B) or (C)", "B", None, False),
        ("B. Rome or C", "B", None, False),
        ("B, C", "B", None, False),
        ("Rome", "B", ["Paris", "Rome"], True),
        ("B", "Rome", ["Paris", "Rome"], True),
        ("B. Rome", "Rome", ["Paris", "Rome"], True),
        ("B. Paris", "B", ["Paris", "Rome"], False),
        ("C", "B", ["Paris", "Rome"], False),
    ],
)
def test_choices(answer: str, gold: str, choices: list[str] | None, same: bool) -> None:
    assert strict(answer, gold, "choice", choices) == float(same)
    assert strict(answer, gold, "auto", choices) == float(same)


@pytest.mark.parametrize(
    "answer, gold, same",
    [
        ("Yes", "yes", True),
        ("True", "yes", True),
        ("no", "yes", False),
        ("yes and no", "yes", False),
        ("Yes, it did", "yes", True),
        ("yes, or no", "yes", False),
        ("No.", "no", True),
        ("not yes", "yes", False),
    ],
)
def test_yes_and_no(answer: str, gold: str, same: bool) -> None:
    assert strict(answer, gold) == float(same)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'words'"):
        rule_reward("x", ["y"], answer_type="words")
    with pytest.raises(ValueError, match="'soft'"):
        rule_reward("x", ["y"], scoring="soft")
    with pytest.raises(ValueError, match="gold"):
        rule_reward("x", [])
    with pytest.raises(ValueError, match="'soft'"):
        RewardConfig(scoring="soft")
    with pytest.raises(ValueError, match="no reward"):
        RewardConfig(rule=False)


PLAIN = Example("q1", "bench", ("Paris",), context="c", question="Where?", columns={"level": 3})
CHAT = Example("q2", "bench", ("Rome",), messages=({"role": "user", "content": "Where?"},), columns={"hint": "x"})
RIGHT, WRONG, NONE = "the answer is Paris.", "the answer is Berlin.", "Berlin it is"


def score(reward: Reward, examples: Sequence[Example], completions: Sequence[str], finish: str = "stop"):
    prompts = [f"prompt of {example.id}" for example in examples]
    ids = [[1, 2] for _ in completions]
    return reward.score(examples, prompts, completions, ids, [finish] * len(completions))


class FixedJudge(Judge):
    def __init__(self, verdict: float | None) -> None:
        self.verdict, self.cases = verdict, list[Case]()

    async def verdicts(self, cases: Sequence[Case]) -> list[float | None]:
        self.cases += cases
        await asyncio.sleep(0)
        return [self.verdict for _ in cases]

    def metrics(self) -> dict[str, float]:
        return {"judge/calls": float(len(self.cases))}


@pytest.mark.parametrize(
    "verdict, reward, reason", [(1.0, 1.0, "judged_correct"), (0.0, 0.0, "wrong"), (None, None, "judge_failed")]
)
def test_judge_is_asked_only_where_the_rule_fails(verdict: float | None, reward: float | None, reason: str) -> None:
    judge = FixedJudge(verdict)
    scored = score(Reward(RewardConfig(), None, judge), [PLAIN] * 2, [RIGHT, WRONG])
    assert [case.prediction for case in judge.cases] == ["Berlin"]
    assert judge.cases[0].question == "Where?"
    assert scored[0].parts == {"rule": 1.0, "judge": None}
    assert (scored[0].reward, scored[0].reason) == (1.0, "correct")
    assert scored[1].parts == {"rule": 0.0, "judge": verdict}
    # What the rule said is kept where the judge has the last word.
    assert scored[1].rule == Verdict(0.0, "wrong", "Berlin")
    assert (scored[1].reward, scored[1].reason) == (reward, reason)


def test_judge_sees_a_tail_only_if_asked_for_and_nothing_of_a_non_answer() -> None:
    judge = FixedJudge(1.0)
    completions = [NONE, "the answer is (insert answer here)", "", "<think>Paris, I guess"]
    scored = score(Reward(RewardConfig(), None, judge), [PLAIN] * 4, completions)
    assert judge.cases == [], "no announced answer, so nothing to show"
    assert [one.reward for one in scored] == [0.0] * 4
    config = RewardConfig(judge=JudgeConfig(base_url="http://x/v1", model="m", tail=7))
    scored = score(Reward(config, None, judge), [PLAIN] * 4, completions)
    assert [case.prediction for case in judge.cases] == ["n it is"]
    assert [one.reward for one in scored] == [1.0, 0.0, 0.0, 0.0]


def test_judge_alone_judges_what_the_rule_would_accept_too() -> None:
    judge = FixedJudge(1.0)
    scored = score(Reward(RewardConfig(rule=False, function="unused:f"), None, judge), [PLAIN] * 2, [RIGHT, ""])
    assert len(judge.cases) == 1
    assert [one.parts for one in scored] == [{"judge": 1.0}, {"judge": 0.0}]


def test_an_answer_cut_by_the_length_limit_does_not_count() -> None:
    reward = make_reward(RewardConfig(), {})
    example = Example("n", "b", ("12",), context="c", question="q")
    cut = score(
        reward, [example] * 4, ["the answer is 12", "the answer is 12.", "well", "the answer is 12\nso"], "length"
    )
    assert [one.reason for one in cut] == ["truncated", "truncated", "truncated", "correct"]
    assert score(reward, [example], ["the answer is 12"])[0].reward == 1.0


def test_trl_function_gets_columns_as_lists() -> None:
    seen = {}

    def length_reward(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.25, None]

    config = RewardConfig(rule=False, function="unused:f")
    scored = score(Reward(config, length_reward, None), [PLAIN, CHAT], [RIGHT, WRONG])
    assert [one.reward for one in scored] == [0.25, None]
    assert scored[0].parts == {"length_reward": 0.25}
    assert seen["prompts"] == ["prompt of q1", [{"role": "user", "content": "Where?"}]]
    assert seen["completions"] == [RIGHT, [{"role": "assistant", "content": WRONG}]]
    assert seen["completion_ids"] == [[1, 2], [1, 2]]
    assert seen["answers"] == [["Paris"], ["Rome"]]
    assert seen["level"] == [3, None]
    assert seen["hint"] == [None, "x"]
    assert seen["answer_type"] == ["auto", "auto"]
    assert seen["id"] == ["q1", "q2"]


def test_parts_are_combined_by_their_maximum() -> None:
    def half(completions, **_):
        return [0.5 for _ in completions]

    scored = score(Reward(RewardConfig(function="unused:half"), half, None), [PLAIN] * 2, [RIGHT, WRONG])
    assert [one.reward for one in scored] == [1.0, 0.5]
    assert scored[1].parts == {"rule": 0.0, "half": 0.5}


def test_async_function_runs_beside_the_judge_inside_and_outside_a_loop() -> None:
    async def slow(completions, **_):
        await asyncio.sleep(0)
        return [0.5] * len(completions)

    reward = Reward(RewardConfig(function="unused:slow"), slow, FixedJudge(0.0))
    assert score(reward, [PLAIN], [WRONG])[0].reward == 0.5

    async def within_a_loop() -> float | None:
        return score(reward, [PLAIN], [WRONG])[0].reward

    assert asyncio.run(within_a_loop()) == 0.5


@pytest.mark.parametrize(
    "values, message", [([1.0], "1 values for 2"), ([1.0, math.nan], "nan"), ([math.inf, 0.0], "inf")]
)
def test_bad_values_of_a_function_name_it(values: list[float], message: str) -> None:
    def mine(**_):
        return values

    with pytest.raises(ValueError, match=f"mine.*{message}"):
        score(Reward(RewardConfig(function="unused:mine"), mine, None), [PLAIN] * 2, [RIGHT, WRONG])


def test_an_exception_of_a_function_comes_through() -> None:
    async def broken(**_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        score(Reward(RewardConfig(function="unused:broken"), broken, FixedJudge(1.0)), [PLAIN], [WRONG])


def test_function_is_found_by_module_or_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def ones(completions, **_):\n    return [1.0] * len(completions)\n")
    reward = make_reward(RewardConfig(rule=False, function=f"{path}:ones"), {})
    assert score(reward, [PLAIN], [WRONG])[0].parts == {"ones": 1.0}
    assert make_reward(RewardConfig(rule=False, function="math:prod"), {}).function is math.prod
    for spec in ("ones", f"{path}:twos", f"{tmp_path}/no.py:ones", "no_such_module:f"):
        with pytest.raises(ValueError, match="reward function"):
            make_reward(RewardConfig(function=spec), {})


def test_rule_without_gold_gives_no_verdict() -> None:
    free = Example("s", "b", (), context="c", question="q", response="r")
    assert score(make_reward(RewardConfig(), {}), [free], [RIGHT])[0].reward is None
