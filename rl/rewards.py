"""The reward of a completion: max(rule, judge), or a function of yours with TRL's signature.

The rule reads the announced answer and compares it (`rules.py`, which has the published rules for comparison too). The
judge is asked only where the rule gives less than 1, and of a share of the rest, which changes no reward and shows a rule
that is gamed. Both work while other completions are still being generated (`scoring.py`). None means "no verdict": such
a completion is left out of its group's statistics and never becomes a 0. Rewards are outcome only: no format reward, no
process reward.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import inspect
import os
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import answers as strict
from .functions import checked_values, load_function, trl_columns
from .judge import Case, Judge, JudgeConfig, JudgeFailing, make_judge
from .prompts import question_of
from .ranks import Ranks
from .rows import Example
from .rules import NOT_JUDGED, SCORINGS, Verdict, check_scoring, rule_reward, score_example
from .scoring import Ended, Looked, Scoring
from .seeds import derive

__all__ = ["SCORINGS", "Reward", "RewardConfig", "Scored", "Verdict", "make_reward", "rule_reward"]

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


def make_reward(
    config: RewardConfig,
    environ: Mapping[str, str] = os.environ,
    home: Path | None = None,
    warn: Callable[[str], object] = warnings.warn,
    ranks: Ranks | None = None,
) -> Reward:
    """The reward that a config describes. environ is where the judge's API key is looked up, `home` the run folder.

    Raises ValueError if the function cannot be found, the key is not set, or the judge's model or cache can't be read.
    """
    function = load_function(config.function) if config.function else None
    judge = make_judge(config.judge, environ, home, warn) if config.judge else None
    return Reward(config, function, judge, ranks)


class Reward:
    """Scores completions. Holds the judge's cache and counters, no other state.

    On many ranks each completion is handed in on one of them, and all know what became of it; a user's function sees the
    whole batch on rank 0, as it would on one process.
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
        names = dict.fromkeys(name for part in counted for name in part)
        return {name: _over_ranks(name, [part[name] for part in counted if name in part]) for name in names}

    def alone(self) -> Reward:
        """The same judge with its counters, for completions that this rank scores without the others."""
        made = copy.copy(self)
        made.ranks = Ranks()
        return made

    def scoring(self, group_size: int) -> Scoring[Verdict | None]:
        """A block within which completions are handed in as they end; `finish` scores them."""
        settings = self.config.judge or JudgeConfig
        return Scoring(self._look, self.judge, group_size=group_size, max_wait=settings.max_wait)

    def score(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        finish_reasons: Sequence[str],
    ) -> list[Scored]:
        """Score completions that are all there, one example each, in order. Errors as `finish`.

        On many ranks each looks at its own share, and answers to a question that are alike are one rank's.
        """
        with self.scoring(max(1, len(completions))) as scoring:
            for index, ended in enumerate(zip(examples, completions, finish_reasons, strict=True)):
                if derive(0, question_of(ended[0]), ended[1]) % self.ranks.size == self.ranks.rank:
                    scoring.add(index, Ended(*ended))
            return self.finish(scoring, examples, prompts, completions, completion_ids)

    def finish(
        self,
        scoring: Scoring[Verdict | None],
        examples: Sequence[Example],
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
    ) -> list[Scored]:
        """The scores of all completions, which were handed in before, by ascending index; one example each (repeated within a group).

        An exception of the user's function goes through. Raises ValueError if it returns a wrong number of values,
        or one that is neither a finite number nor None, and JudgeFailing if the judge is no use.
        """
        assert len(examples) == len(prompts) == len(completions) == len(completion_ids)
        values = self.ranks.first(lambda: self._values(examples, prompts, completions, completion_ids))
        looked = self._looked(scoring)
        return [self._combine(looked[index], value) for index, value in zip(sorted(looked), values, strict=True)]

    def _values(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
    ) -> list[float | None]:
        """The user's function of all completions at once, in this thread: it may compare them, draw random numbers, or
        run a loop."""
        if self.function is None:
            return [None] * len(completions)
        returned = self.function(**trl_columns(examples, prompts, completions, completion_ids))
        returned = _run(_settle(returned)) if inspect.isawaitable(returned) else returned
        return checked_values(returned, len(completions), self._name)

    def _looked(self, scoring: Scoring[Verdict | None]) -> dict[int, Looked[Verdict | None]]:
        """What became of all completions, each handed in on one rank. A judge that is no use on one is so on all."""
        mine: dict[int, Looked[Verdict | None]] = {}
        failing = None
        try:
            mine = scoring.results()  # a judge that refuses to be asked says so here
            if self.judge is not None:
                self.judge.check()
        except JudgeFailing as error:
            failing = error
        every = self.ranks.every((mine, failing))
        for _, problem in every:
            if problem is not None:
                raise problem
        return {index: looked for part, _ in every for index, looked in part.items()}

    def _look(self, ended: Ended) -> tuple[Verdict | None, Case | None]:
        """The rule's verdict, and what to ask the judge. Runs in another thread: it reads this object and no more."""
        example = ended.example
        rule = self._rule(example, ended.text, ended.finish_reason) if example.answers else None
        shown = self._shown(ended.text, rule) if self.judge is not None and rule is not None else None
        if shown is None or rule is None:
            return rule, None
        case = Case(question_of(example), example.answers, shown)
        accepted = self.config.rule and rule.score >= 1.0
        return rule, None if accepted and not self._audited(case) else case

    def _rule(self, example: Example, completion: str, finish_reason: str) -> Verdict:
        return score_example(example, completion, finish_reason, self.config.scoring)

    def _shown(self, completion: str, rule: Verdict) -> str | None:
        """The answer as the judge sees it; None where it would have to guess."""
        if rule.reason in NOT_JUDGED:
            return None
        if rule.extracted is not None:
            return rule.extracted
        tail = self.config.judge.tail if self.config.judge else 0
        return ((strict.after_thinking(completion) or "").strip()[-tail:] if tail else "") or None

    def _audited(self, case: Case) -> bool:
        """Whether an accepted answer is judged all the same: the same ones in each run."""
        share = self.config.judge.audit if self.config.judge else 0.0
        draw = hashlib.sha256(repr(case).encode(errors="backslashreplace")).digest()[:8]
        return int.from_bytes(draw) < share * 2**64

    def _combine(self, looked: Looked[Verdict | None], value: float | None) -> Scored:
        rule, judged = looked.rule, looked.judged
        parts: dict[str, float | None] = {}
        if self.config.rule:
            parts["rule"] = rule.score if rule else None
        if self.judge is not None:
            # Not asked though it alone decides: there was no answer to show it.
            parts["judge"] = 0.0 if rule is not None and not looked.asked and not self.config.rule else judged
        if self.function is not None:
            parts[self._name] = value
        known = [part for part in parts.values() if part is not None]
        best = max(known, default=None)
        reason = rule.reason if rule else "no_gold"
        if looked.asked and judged is None and (best is None or best < 1.0):
            # max(rule, unknown) is unknown: a 0 here would be a made-up label inside the group.
            return Scored(None, parts, "judge_failed", rule)
        if judged is not None and rule is not None and judged != rule.score:
            reason = "judged_correct" if judged > rule.score else "disputed" if self.config.rule else reason
        return Scored(best, parts, reason, rule)


def _over_ranks(name: str, values: Sequence[float]) -> float:
    """One number of the ranks' own: counters add up, a rate is their mean, and a breaker is as open as the most open one."""
    if name == "judge/breaker":
        return max(values)
    return sum(values) / (len(values) if name.endswith("_rate") else 1)


async def _settle(value: Awaitable[Any]) -> Any:
    return await value


def _run(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine to its end from plain code, also where this thread already runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, coroutine).result()
