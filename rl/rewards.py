"""The reward of a completion: max(rule, judge), or a function of yours with TRL's signature.

The strict rule reads the announced answer and compares it (`answers.py`, `numbers.py`); `published` is the released
QwenLong-L1 rule, kept for comparison. The judge is asked only where the rule gives less than 1. None means "no
verdict": such a completion is left out of its group's statistics and never becomes a 0. Rewards are outcome only:
no format reward, no process reward.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from . import answers as strict
from .functions import checked_values, load_function, trl_columns
from .judge import Case, Judge, JudgeConfig, make_judge
from .prompts import question_of
from .published import published_score
from .ranks import Ranks
from .rows import Example
from .seeds import derive

SCORINGS = ("strict", "published")
# Reasons for which there is nothing to show a judge: it would be asked to guess.
_NOT_JUDGED = frozenset(("placeholder", "empty", "truncated"))
# Characters of a completion without announced answer that the judge sees.
_TAIL = 500
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Verdict:
    """score: 0.0 or 1.0. reason: correct | wrong | hedged | no_answer | placeholder | empty | truncated.

    extracted: the announced answer, None if there is none.
    """

    score: float
    reason: str
    extracted: str | None


@dataclass(frozen=True)
class RewardConfig:
    """rule: use the rule. scoring: strict | published. function: "module:function" or "path/file.py:function".

    The reward is the maximum of the parts in use; for a function alone set rule to false.
    """

    rule: bool = True
    scoring: str = "strict"
    function: str | None = None
    judge: JudgeConfig | None = None

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"reward scoring {self.scoring!r} is unknown; choose one of {', '.join(SCORINGS)}")
        if not (self.rule or self.function or self.judge):
            raise ValueError("no reward at all: set rule = true, or give a function or a judge")


@dataclass(frozen=True)
class Scored:
    """reward: None when there is no verdict. parts: one per part in use ("rule", "judge", the function's name)."""

    reward: float | None
    parts: dict[str, float | None]
    reason: str


def rule_reward(
    completion: str,
    answers: Sequence[str],
    *,
    answer_type: str = "auto",
    choices: Sequence[str] | None = None,
    scoring: str = "strict",
) -> Verdict:
    """Score one completion against its gold answers by rule (QwenLong-L1, arXiv 2505.17667, eq. 12).

    Any one gold answer suffices. The answer is what follows the last "answer is" or stands in the last `\\boxed{}`
    after the last `</think>`; its first line. answer_type "auto" takes each gold answer for what it looks like.
    Raises ValueError for no answers, an unknown answer_type or an unknown scoring.
    """
    answers = (answers,) if isinstance(answers, str) else answers
    if not answers:
        raise ValueError("no gold answers to compare with; give at least one")
    if answer_type not in strict.ANSWER_TYPES:
        raise ValueError(f"answer_type {answer_type!r} is unknown; choose one of {', '.join(strict.ANSWER_TYPES)}")
    if scoring == "published":
        score, extracted = published_score(completion, answers, answer_type)
        unread = "truncated" if strict.after_thinking(completion) is None else "no_answer"
        return Verdict(score, "correct" if score else unread if extracted is None else "wrong", extracted)
    if scoring != "strict":
        raise ValueError(f"scoring {scoring!r} is unknown; choose one of {', '.join(SCORINGS)}")
    text = strict.after_thinking(completion)
    if text is None:
        return Verdict(0.0, "truncated", None)
    extracted = strict.extract_answer(text)
    if extracted is None:
        return Verdict(0.0, "no_answer" if text.strip() else "empty", None)
    form = strict.normal_form(extracted)
    if strict.PLACEHOLDER in form:
        return Verdict(0.0, "placeholder", extracted)
    if any(strict.matches(extracted, gold, answer_type, choices) for gold in answers):
        return Verdict(1.0, "correct", extracted)
    if not form:
        return Verdict(0.0, "empty", extracted)
    hedged = strict.is_hedged(extracted, answers, answer_type, choices)
    return Verdict(0.0, "hedged" if hedged else "wrong", extracted)


def make_reward(config: RewardConfig, environ: Mapping[str, str] = os.environ, ranks: Ranks | None = None) -> Reward:
    """The reward that a config describes. environ is where the judge's API key is looked up.

    Raises ValueError if the function cannot be found or the key is not set.
    """
    function = load_function(config.function) if config.function else None
    judge = make_judge(config.judge, environ) if config.judge else None
    return Reward(config, function, judge, ranks)


class Reward:
    """Scores completions. Holds the judge's cache and counters, no other state.

    On many ranks all of them score the same completions. Each rank judges the cases that are its own, always the same ones,
    so that a case is asked once; a user's function sees the whole batch on rank 0, as it would on one process.
    """

    def __init__(
        self, config: RewardConfig, function: Callable[..., Any] | None, judge: Judge | None, ranks: Ranks | None = None
    ) -> None:
        self.ranks = ranks or Ranks()
        self.config = config
        self.function = function
        self.judge = judge
        self._name = getattr(function, "__name__", type(function).__name__)
        if self._name in ("rule", "judge"):
            raise ValueError(f"reward function is named {self._name!r}, which is a part of its own; rename it")

    def metrics(self) -> dict[str, float]:
        """The judge's counters since the start, of all ranks; empty without a judge."""
        if self.judge is None:
            return {}
        counted = self.ranks.every(self.judge.metrics())
        return {name: sum(part[name] for part in counted) for name in counted[0]}

    def score(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        finish_reasons: Sequence[str],
    ) -> list[Scored]:
        """Score completions, one example each (repeated for each completion of a group), in order.

        An exception of the user's function goes through. Raises ValueError if it returns a wrong number of values,
        or one that is neither a finite number nor None.
        """
        assert len(examples) == len(prompts) == len(completions) == len(completion_ids) == len(finish_reasons)
        rules = [
            self._rule(*row) if row[0].answers else None
            for row in zip(examples, completions, finish_reasons, strict=True)
        ]
        wanted = [self.judge is not None and rule is not None and not self._settled(rule) for rule in rules]
        cases = [
            Case(question_of(example), example.answers, _prediction(completion, rule))
            for example, completion, rule, ask in zip(examples, completions, rules, wanted, strict=True)
            if ask and rule is not None
        ]
        # Called here and not in the event loop: a plain function may run a loop of its own.
        returned = (
            self.function(**trl_columns(examples, prompts, completions, completion_ids))
            if self.function and self.ranks.main
            else None
        )
        mine = [i for i, case in enumerate(cases) if self._owner(case) == self.ranks.rank]
        verdicts_of_mine, returned = _run(self._gather([cases[i] for i in mine], returned))
        values = self.ranks.first(
            lambda: (
                checked_values(returned, len(completions), self._name) if self.function else [None] * len(completions)
            )
        )
        told = {
            i: v for part in self.ranks.every(dict(zip(mine, verdicts_of_mine, strict=True))) for i, v in part.items()
        }
        judged = [told[i] for i in range(len(cases))]
        verdicts = iter(judged)
        asked = [next(verdicts) if ask else None for ask in wanted]
        return [self._combine(*row) for row in zip(rules, wanted, asked, values, strict=True)]

    def _rule(self, example: Example, completion: str, finish_reason: str) -> Verdict:
        verdict = rule_reward(
            completion,
            example.answers,
            answer_type=example.answer_type,
            choices=example.choices,
            scoring=self.config.scoring,
        )
        if finish_reason != "length" or self.config.scoring != "strict":
            return verdict
        # Cut by the length limit: the answer may go on ("12|34"), or may have been about to come.
        cut = verdict.reason == "no_answer" or strict.is_cut(strict.after_thinking(completion) or "")
        return Verdict(0.0, "truncated", verdict.extracted) if cut else verdict

    def _owner(self, case: Case) -> int:
        """The rank that judges a case."""
        return derive(0, case.question, *case.answers, case.prediction) % self.ranks.size

    def _settled(self, rule: Verdict) -> bool:
        """Whether the judge has nothing to add."""
        return rule.reason in _NOT_JUDGED or (self.config.rule and rule.score >= 1.0)

    async def _gather(self, cases: list[Case], returned: Any) -> tuple[list[float | None], Any]:
        """(verdicts, what the user's function returned); an async function and the judge wait at the same time."""

        async def ask() -> list[float | None]:
            return await self.judge.verdicts(cases) if self.judge and cases else []

        async def settle(value: Awaitable[Any]) -> Any:
            return await value if inspect.isawaitable(value) else value

        verdicts, values = await asyncio.gather(ask(), settle(returned))
        return verdicts, values

    def _combine(self, rule: Verdict | None, asked: bool, judged: float | None, value: float | None) -> Scored:
        parts: dict[str, float | None] = {}
        if self.config.rule:
            parts["rule"] = rule.score if rule else None
        if self.judge is not None:
            nothing_to_judge = rule is not None and rule.reason in _NOT_JUDGED
            parts["judge"] = 0.0 if nothing_to_judge and not self.config.rule else judged
        if self.function is not None:
            parts[self._name] = value
        known = [part for part in parts.values() if part is not None]
        best = max(known, default=None)
        reason = rule.reason if rule else "no_gold"
        if asked and judged is None and (best is None or best < 1.0):
            # max(rule, unknown) is unknown: a 0 here would be a made-up label inside the group.
            return Scored(None, parts, "judge_failed")
        if judged is not None and rule is not None and judged > rule.score:
            reason = "judged_correct"
        return Scored(best, parts, reason)


def _prediction(completion: str, rule: Verdict) -> str:
    return rule.extracted or (strict.after_thinking(completion) or "").strip()[-_TAIL:]


def _run(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine to its end from plain code, also where this thread already runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, coroutine).result()
