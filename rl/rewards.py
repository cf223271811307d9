"""The reward of a completion: max(rule, judge), or a function of yours with TRL's signature.

The rule reads the announced answer and compares it (`rules.py`, which has the published rules for comparison too). The
judge is asked only where the rule gives less than 1. None means "no verdict": such a completion is left out of its
group's statistics and never becomes a 0. Rewards are outcome only: no format reward, no process reward.
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
from .rows import Example
from .rules import NOT_JUDGED, SCORINGS, Verdict, check_scoring, rule_reward, score_example

__all__ = ["SCORINGS", "Reward", "RewardConfig", "Scored", "Verdict", "make_reward", "rule_reward"]

# Characters of a completion without announced answer that the judge sees.
_TAIL = 500
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RewardConfig:
    """rule: use the rule. scoring: one of `rules.SCORINGS`. function: "module:function" or "path/file.py:function".

    The reward is the maximum of the parts in use; for a function alone set rule to false.
    """

    rule: bool = True
    scoring: str = "strict"
    function: str | None = None
    judge: JudgeConfig | None = None

    def __post_init__(self) -> None:
        check_scoring(self.scoring)
        if not (self.rule or self.function or self.judge):
            raise ValueError("no reward at all: set rule = true, or give a function or a judge")


@dataclass(frozen=True)
class Scored:
    """reward: None when there is no verdict. parts: one per part in use ("rule", "judge", the function's name).

    reason: the rule's, or what the judge made of it. rule: the rule's own verdict; None without gold answers.
    """

    reward: float | None
    parts: dict[str, float | None]
    reason: str
    rule: Verdict | None = None


def make_reward(config: RewardConfig, environ: Mapping[str, str] = os.environ) -> Reward:
    """The reward that a config describes. environ is where the judge's API key is looked up.

    Raises ValueError if the function cannot be found or the key is not set.
    """
    function = load_function(config.function) if config.function else None
    judge = make_judge(config.judge, environ) if config.judge else None
    return Reward(config, function, judge)


class Reward:
    """Scores completions. Holds the judge's cache and counters, no other state."""

    def __init__(self, config: RewardConfig, function: Callable[..., Any] | None, judge: Judge | None) -> None:
        self.config = config
        self.function = function
        self.judge = judge
        self._name = getattr(function, "__name__", type(function).__name__)
        if self._name in ("rule", "judge"):
            raise ValueError(f"reward function is named {self._name!r}, which is a part of its own; rename it")

    def metrics(self) -> dict[str, float]:
        """The judge's counters since the start; empty without a judge."""
        return self.judge.metrics() if self.judge else {}

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
            self.function(**trl_columns(examples, prompts, completions, completion_ids)) if self.function else None
        )
        judged, returned = _run(self._gather(cases, returned))
        values = checked_values(returned, len(completions), self._name) if self.function else [None] * len(completions)
        verdicts = iter(judged)
        asked = [next(verdicts) if ask else None for ask in wanted]
        return [self._combine(*row) for row in zip(rules, wanted, asked, values, strict=True)]

    def _rule(self, example: Example, completion: str, finish_reason: str) -> Verdict:
        return score_example(example, completion, finish_reason, self.config.scoring)

    def _settled(self, rule: Verdict) -> bool:
        """Whether the judge has nothing to add."""
        return rule.reason in NOT_JUDGED or (self.config.rule and rule.score >= 1.0)

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
            nothing_to_judge = rule is not None and rule.reason in NOT_JUDGED
            parts["judge"] = 0.0 if nothing_to_judge and not self.config.rule else judged
        if self.function is not None:
            parts[self._name] = value
        known = [part for part in parts.values() if part is not None]
        best = max(known, default=None)
        reason = rule.reason if rule else "no_gold"
        if asked and judged is None and (best is None or best < 1.0):
            # max(rule, unknown) is unknown: a 0 here would be a made-up label inside the group.
            return Scored(None, parts, "judge_failed", rule)
        if judged is not None and rule is not None and judged > rule.score:
            reason = "judged_correct"
        return Scored(best, parts, reason, rule)


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
