"""Completions on their way to a verdict while others are still being generated.

Whoever generates hands each completion in as it ends. Rules run in a helper thread, the judge is asked from an event loop
in another; results come back by index, so neither the order in which completions end nor the order in which the judge
answers changes anything. An exception of either comes out of `results`, in the main thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar

from .background import Background
from .judge_base import Judge
from .judge_prompt import Case
from .rows import Example

V = TypeVar("V")

PAUSE = 0.005
"""Seconds: a time line with thousands of rules of a few microseconds each would show nothing more."""


class Ended(NamedTuple):
    """A completion that has ended."""

    example: Example
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Looked(Generic[V]):
    """What the rule made of a completion, whether the judge was asked, and what it said (None: no verdict)."""

    rule: V
    asked: bool
    judged: float | None


class Scoring(Generic[V]):
    """Of one batch of completions. `look` gives the rule's verdict and what to ask the judge, if anything.

    `judge_seconds` is the time in which the judge had a case, `waited` the part of it that `results` waited for;
    `judge_spans` and `rule_spans` say when either was at work, pauses shorter than `PAUSE` left out.
    """

    def __init__(
        self, look: Callable[[Ended], tuple[V, Case | None]], judge: Judge | None, *, group_size: int, max_wait: float
    ) -> None:
        self._look, self._judge, self._max_wait = look, judge, max_wait
        self._together = group_size if judge is not None and judge.by_group else 1
        self._waiting: dict[int, dict[int, Ended]] = {}
        self._under_way: dict[int, Future[dict[int, Looked[V]]]] = {}
        self._asking: set[asyncio.Task[list[float | None]]] = set()
        self._late = False
        self._since = 0.0
        self.judge_spans: list[tuple[float, float]] = []
        self.rule_spans: list[tuple[float, float]] = []
        self.judge_seconds = self.waited = 0.0

    def __enter__(self) -> Self:
        self._background = Background("scoring").__enter__()
        self._rules = ThreadPoolExecutor(1, thread_name_prefix="rules")  # one: in the order they come
        try:
            if self._judge is not None:
                self._background.submit(self._judge.__aenter__()).result()
        except BaseException as error:  # the block is never entered, so nobody else would end the thread
            self._background.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for future in self._under_way.values():
            future.cancel()
        if self._judge is not None:
            self._background.submit(self._judge.__aexit__(kind, error, trace)).result()
        self._rules.shutdown(cancel_futures=True)
        self._background.__exit__(kind, error, trace)

    def __contains__(self, index: int) -> bool:
        """Whether the completion was handed in."""
        group = index // self._together
        return index in self._waiting.get(group, ()) or group in self._under_way

    def add(self, index: int, ended: Ended) -> None:
        """Completion number `index`, in any order: of group index // group_size."""
        assert index not in self, index
        group = index // self._together
        members = self._waiting.setdefault(group, {})
        members[index] = ended
        if len(members) == self._together:
            self._send(group)

    def results(self) -> dict[int, Looked[V]]:
        """Of all completions handed in, by index and in its order. Waits for rules, and `max_wait` seconds for the judge.

        Raises what a rule or the judge raised, the first by index.
        """
        for group in sorted(self._waiting):
            self._send(group)
        start = time.perf_counter()
        found: dict[int, Looked[V]] = {}
        for group in sorted(self._under_way):
            found |= self._result(self._under_way[group], start + self._max_wait)
        self.waited += time.perf_counter() - start
        return found  # groups in order, and each one's members

    def _send(self, group: int) -> None:
        members = self._waiting.pop(group)
        self._under_way[group] = self._background.submit(self._batch(dict(sorted(members.items()))))

    def _result(self, future: Future[dict[int, Looked[V]]], until: float) -> dict[int, Looked[V]]:
        if not self._late:
            try:
                return future.result(max(0.0, until - time.perf_counter()))
            except TimeoutError:
                if future.done():  # the rule's or the judge's own
                    raise
                self._background.submit(self._stop_asking()).result()
        return future.result()

    async def _batch(self, members: dict[int, Ended]) -> dict[int, Looked[V]]:
        loop = asyncio.get_running_loop()
        looked = [await loop.run_in_executor(self._rules, self._timed_look, ended) for ended in members.values()]
        cases = [case for _, case in looked if case is not None]
        assert self._judge is not None or not cases, "a case, and nobody to judge it"
        judged = iter(await self._ask(cases))
        return {
            index: Looked(rule, case is not None, None if case is None else next(judged))
            for index, (rule, case) in zip(members, looked, strict=True)
        }

    async def _ask(self, cases: list[Case]) -> list[float | None]:
        if self._judge is None or not cases:
            return []
        task = asyncio.create_task(self._judge.verdicts(cases))
        if not self._asking:
            self._since = time.perf_counter()
        self._asking.add(task)
        if self._late:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            if not self._late:
                raise
            self._judge.overdue(len(cases))
            return [None] * len(cases)
        finally:
            self._asking.discard(task)
            if not self._asking:
                now = time.perf_counter()
                self.judge_seconds += now - self._since
                _extend(self.judge_spans, self._since, now)

    def _timed_look(self, ended: Ended) -> tuple[V, Case | None]:
        start = time.perf_counter()
        try:
            return self._look(ended)
        finally:
            _extend(self.rule_spans, start, time.perf_counter())

    async def _stop_asking(self) -> None:
        self._late = True
        for task in self._asking:
            task.cancel()


def _extend(spans: list[tuple[float, float]], start: float, end: float) -> None:
    if spans and start - spans[-1][1] < PAUSE:
        spans[-1] = (spans[-1][0], end)
    else:
        spans.append((start, end))
