"""What every judge is, wherever it runs: it answers cases in order, counts how it fares, and says when it is no use."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from .judge_prompt import Case

WINDOW, FEWEST = 100, 20
"""The share of failures is taken over so many cases, and over no fewer: one early failure is no trend."""


class JudgeFailing(ValueError):
    """The judge gives too few verdicts to train on, or refuses to be asked at all."""


class Judge(Protocol):
    """What a reward asks of a judge. An asynchronous context: within it connections stay open; entering twice is fine."""

    by_group: bool = False
    """Whether it is asked for a group at a time (it works on batches), or for each completion as it ends."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is still under way is called off."""

    async def verdicts(self, cases: Sequence[Case]) -> list[float | None]:
        """1.0 (same), 0.0 (not the same) or None (no verdict) for each case, in order."""
        ...

    def overdue(self, count: int) -> None:
        """Nobody waits any longer for so many cases: they had no verdict."""

    def check(self) -> None:
        """Raises JudgeFailing where too many of the last cases had no verdict."""

    def metrics(self) -> dict[str, float]:
        """Counters since the judge was made, under `judge/...` names."""
        ...


class Tally:
    """Counts of one judge, and its share of failures among the last cases that it was asked for."""

    def __init__(self, max_failure_share: float, stakes: str) -> None:
        self._max_share, self._stakes = max_failure_share, stakes
        self.counts = Counter({"calls": 0, "retries": 0, "failures": 0, "cache_hits": 0})
        self._recent: deque[str | None] = deque(maxlen=WINDOW)

    def verdict(self) -> None:
        self._recent.append(None)

    def failure(self, why: str) -> None:
        self.counts["failures"] += 1
        self.counts[f"failed/{why.replace(' ', '_')}"] += 1
        self._recent.append(why)

    def check(self, who: str) -> None:
        reasons = Counter(why for why in self._recent if why is not None)
        failed, asked = reasons.total(), len(self._recent)
        if failed <= self._max_share * max(asked, FEWEST):
            return
        told = ", ".join(f"{why}: {count}" for why, count in reasons.most_common(3))
        raise JudgeFailing(
            f"{who} gave no verdict on {failed} of the last {asked} answers ({told}), more than judge.max_failure_share = "
            f"{self._max_share} allows: {self._stakes}. Mend the judge and give the same command again; its verdicts so far "
            "are kept"
        )

    def metrics(self) -> dict[str, float]:
        """`judge/failure_rate` is of the last cases, the rest since the judge was made."""
        rate = sum(why is not None for why in self._recent) / max(1, len(self._recent))
        return {**{f"judge/{name}": float(count) for name, count in self.counts.items()}, "judge/failure_rate": rate}
