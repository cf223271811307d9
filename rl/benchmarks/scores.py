"""What each response is worth: by the rule, by the judge, and by the larger of the two.

Every answer is judged, also those that the rule accepts, as in the published evaluation: else the judge alone would be
unknown. A failed request is wrong in each column and stays in the denominator. Where there was no answer to show the
judge, it says no; where it was asked and gave no verdict, its column is None and the score falls back to the rule's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from ..judge_base import Judge
from ..judge_config import JudgeConfig
from ..prompts import question_of
from ..rewards import Reward, RewardConfig
from ..rules import Verdict, score_example
from ..scoring import Ended, Looked
from .needles import share_found
from .questions import Question
from .results import Response
from .settings import EvaluationConfig

PUBLISHED = "qwenlong-l1-eval"
"""The rule of the published table."""

FOREVER = 1e9
"""Seconds."""


@dataclass(frozen=True)
class Score:
    """Of one sample. `judge` None: there is none, or (`unjudged`) it gave no verdict. `reason` is the rule's, or request_failed.

    `named` is RULER's own score of a needle test.
    """

    sample: int
    score: float
    rule: float
    judge: float | None
    unjudged: bool
    asked: bool
    published: float | None
    reason: str
    answer: str | None
    finish_reason: str
    tokens: int | None
    failed: str | None
    rules: Mapping[str, float]
    named: float | None = None

    def dump(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Scored:
    """A question with what its samples are worth, in order."""

    question: Question
    scores: tuple[Score, ...]

    def dump(self) -> dict[str, Any]:
        q = self.question
        return {
            "benchmark": q.benchmark, "id": q.example.id, "question": question_of(q.example),
            "answers": list(q.example.answers), "length": q.length, "cut": q.is_cut,
            "samples": [score.dump() for score in self.scores],
        }  # fmt: skip


class Scorer:
    """A block within which responses are handed in as they end, and looked at meanwhile.

    Two of training's scorings: questions of a benchmark that needs no judge go to the one without.
    """

    def __init__(self, config: EvaluationConfig, judge: Judge | None, questions: Sequence[Question]) -> None:
        self.config, self.judge, self.questions = config, judge, questions
        self._places = {question.key: place for place, question in enumerate(questions)}
        self._responses: dict[int, Response] = {}

    def __enter__(self) -> Self:
        # Of all answers, and without an end to the waiting: each verdict has its deadline.
        every = None if self.config.judge is None else replace(self.config.judge, audit=1.0, max_wait=FOREVER)
        self._stack = ExitStack()
        self._by_judge = self._stack.enter_context(_reward(self.config, every, self.judge).scoring(self.config.samples))
        self._by_rule = self._stack.enter_context(_reward(self.config, None, None).scoring(1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, response: Response) -> None:
        """A response that has ended; one that failed is wrong without a look."""
        place = self._places[response.key]
        index = place * self.config.samples + response.sample
        self._responses[index] = response
        if response.failed is None:
            scoring = self._by_judge if self.questions[place].judged else self._by_rule
            scoring.add(index, Ended(self.questions[place].example, response.text, response.finish_reason))

    def results(self) -> list[Scored]:
        """All questions, in order. Raises JudgeFailing where the judge refuses to be asked."""
        looked = self._by_rule.results() | self._by_judge.results()
        k = self.config.samples
        return [
            Scored(question, tuple(
                _score(question, self._responses[i], looked.get(i), self.config) for i in range(place * k, place * k + k)
            ))
            for place, question in enumerate(self.questions)
        ]  # fmt: skip


def _reward(config: EvaluationConfig, settings: JudgeConfig | None, judge: Judge | None) -> Reward:
    return Reward(RewardConfig(scoring=config.scoring, judge=settings), None, judge)


def _score(
    question: Question, response: Response, looked: Looked[Verdict | None] | None, config: EvaluationConfig
) -> Score:
    judged_by_none = config.judge is None or not question.judged
    if looked is None:
        assert response.failed is not None
        return Score(
            response.sample, 0.0, 0.0, None if judged_by_none else 0.0, False, False,
            0.0 if PUBLISHED in config.rules else None, "request_failed", None, "", None, response.failed,
            dict.fromkeys(config.rules, 0.0), 0.0 if question.is_needle else None,
        )  # fmt: skip
    assert looked.rule is not None, "a benchmark's question without gold answers"
    rules = {
        name: score_example(question.example, response.text, response.finish_reason, name).score
        for name in config.rules
    }
    judge = None if judged_by_none else looked.judged if looked.asked else 0.0
    rule, published = looked.rule.score, rules.get(PUBLISHED)
    return Score(
        response.sample, _larger(rule, judge), rule, judge, looked.asked and looked.judged is None, looked.asked,
        None if published is None else _larger(published, judge), looked.rule.reason, looked.rule.extracted,
        response.finish_reason, response.tokens, None, rules,
        share_found(question.example, response.text) if question.is_needle else None,
    )  # fmt: skip


def _larger(rule: float, judge: float | None) -> float:
    return rule if judge is None else max(rule, judge)
