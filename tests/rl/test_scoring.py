"""Rules and judge work beside generation: the results don't hang on when what ends, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from longreach.rl.data import Example
from longreach.rl.judge import Case, Judge
from longreach.rl.scoring import Ended, Looked, Scoring

EXAMPLE = Example("q", "b", ("x",), context="c", question="Where?")


class SlowJudge(Judge):
    """Says 1.0 to even numbers after `seconds`; counts what it is given at a time, and whether it was closed."""

    def __init__(self, seconds: float = 0.0, by_group: bool = False) -> None:
        self.seconds, self.by_group = seconds, by_group
        self.batches: list[list[str]] = []
        self.open = self.late = 0
        self.answer: Callable[[str], float | None] = lambda text: float(int(text) % 2 == 0)

    async def __aenter__(self) -> SlowJudge:
        self.open += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.open -= 1

    async def verdicts(self, cases: Sequence[Case]) -> list[float | None]:
        self.batches.append([case.prediction for case in cases])
        await asyncio.sleep(self.seconds)
        return [self.answer(case.prediction) for case in cases]

    def overdue(self, count: int) -> None:
        self.late += count

    def metrics(self) -> dict[str, float]:
        return {}


def look(ended: Ended) -> tuple[str, Case | None]:
    """The rule says what it saw; multiples of three aren't judged."""
    return f"rule {ended.text}", None if int(ended.text) % 3 == 0 else Case("Where?", ("x",), ended.text)


def scoring(judge: Judge | None, group_size: int = 1, max_wait: float = 30.0, rule: Any = look) -> Scoring[str]:
    return Scoring(rule, judge, group_size=group_size, max_wait=max_wait)


def add(one: Scoring[str], *indices: int) -> None:
    for index in indices:
        one.add(index, Ended(EXAMPLE, str(index), "stop"))


def expected(count: int) -> list[Looked[str]]:
    return [Looked(f"rule {i}", i % 3 != 0, None if i % 3 == 0 else float(i % 2 == 0)) for i in range(count)]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before]
    assert not left, left


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_results_come_by_index_whatever_ends_when(seed: int, by_group: bool) -> None:
    order = list(range(24))
    random.Random(seed).shuffle(order)
    judge = SlowJudge(0.01, by_group)
    with scoring(judge, group_size=4) as one:
        add(one, *order)
        assert list(one.results().values()) == expected(24)
    assert judge.open == 0
    if by_group:
        wanted = sorted([str(i) for i in range(start, start + 4) if i % 3] for start in range(0, 24, 4))
        assert sorted(judge.batches) == wanted, "whole groups, in their order, whatever ended first"
    else:
        assert {len(batch) for batch in judge.batches} == {1}


def test_without_a_judge_the_rule_is_all() -> None:
    with scoring(None, rule=lambda ended: (f"rule {ended.text}", None)) as one:
        add(one, 1, 0)
        assert list(one.results().values()) == [Looked("rule 0", False, None), Looked("rule 1", False, None)]
    assert one.judge_seconds == 0.0


def test_a_group_that_never_gets_whole_is_judged_all_the_same() -> None:
    judge = SlowJudge(by_group=True)
    with scoring(judge, group_size=4) as one:
        add(one, 4, 5, 1, 2)
        assert 5 in one and 2 in one and 0 not in one
        assert [found.rule for found in one.results().values()] == ["rule 1", "rule 2", "rule 4", "rule 5"]


def test_the_judge_works_while_the_main_thread_does() -> None:
    """Ten completions end 0.05 s apart, the judge takes 0.2 s for each: all but the last ones' time is hidden."""
    with scoring(SlowJudge(0.2)) as one:
        for index in (1, 2, 4, 5, 7, 8, 10, 11, 13, 14):
            add(one, index)
            time.sleep(0.05)  # generation
        start = time.perf_counter()
        one.results()
        waited = time.perf_counter() - start
    assert one.judge_seconds > 0.5, "the union of its working times"
    assert 0 < one.waited <= waited
    assert one.waited < one.judge_seconds / 2


def test_the_rule_runs_in_one_thread_that_is_not_ours() -> None:
    seen: list[tuple[str, str]] = []

    def spy(ended: Ended) -> tuple[str, None]:
        seen.append((ended.text, threading.current_thread().name))
        return "r", None

    with scoring(None, rule=spy) as one:
        add(one, *range(20))
        one.results()
    assert [text for text, _ in seen] == [str(i) for i in range(20)], "in the order they were handed in"
    assert len({name for _, name in seen}) == 1 and threading.current_thread().name not in {name for _, name in seen}


def test_an_exception_of_a_rule_comes_out_in_the_main_thread() -> None:
    def broken(ended: Ended) -> tuple[str, Case | None]:
        if ended.text in ("3", "5"):
            raise KeyError(ended.text)
        return look(ended)

    judge = SlowJudge(0.01)
    with scoring(judge, rule=broken) as one:
        add(one, *reversed(range(8)))
        with pytest.raises(KeyError, match="3"):
            one.results()
    assert judge.open == 0


def failing_with(error: Exception) -> Callable[[str], float | None]:
    def answer(text: str) -> float | None:
        raise error

    return answer


def run(judge: Judge, meanwhile: Callable[[], object] = lambda: None) -> None:
    with scoring(judge) as one:
        add(one, *range(8))
        meanwhile()
        one.results()


@pytest.mark.parametrize("error", [RuntimeError("its own"), TimeoutError("its own")], ids=repr)
def test_an_exception_of_the_judge_comes_out_and_the_rest_is_called_off(error: Exception) -> None:
    judge = SlowJudge(0.05)
    judge.answer = failing_with(error)
    with pytest.raises(type(error), match="its own"):
        run(judge)
    assert judge.open == 0


def test_a_judge_that_cannot_be_opened_leaves_no_thread() -> None:
    class Closed(SlowJudge):
        async def __aenter__(self) -> SlowJudge:
            raise OSError("no cache")

    with pytest.raises(OSError, match="no cache"), scoring(Closed()):
        pass


def test_leaving_early_waits_for_nothing() -> None:
    def generate() -> None:
        time.sleep(0.05)
        raise ValueError("generation went wrong")

    judge, start = SlowJudge(30.0), time.perf_counter()
    with pytest.raises(ValueError, match="generation"):
        run(judge, generate)
    assert time.perf_counter() - start < 5
    assert judge.open == 0


def test_ctrl_c_ends_the_wait() -> None:
    judge, start = SlowJudge(30.0), time.perf_counter()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(judge, timer.start)
    timer.join()
    assert time.perf_counter() - start < 5
    assert judge.open == 0


def test_training_waits_so_long_and_no_longer() -> None:
    """What is there by then counts; the rest has no verdict, and the judge is told."""

    asked = threading.Semaphore(0)

    class Uneven(SlowJudge):
        async def verdicts(self, cases: Sequence[Case]) -> list[float | None]:
            asked.release()
            await asyncio.sleep(0.0 if int(cases[0].prediction) < 5 else 60.0)
            return [1.0 for _ in cases]

    judge = Uneven()
    with scoring(judge, max_wait=0.5) as one:
        add(one, *range(9))
        for _ in range(6):  # a busy machine may take longer than the wait to ask at all
            assert asked.acquire(timeout=30.0)
        start = time.perf_counter()
        found = list(one.results().values())
    assert 0.5 <= time.perf_counter() - start < 30
    assert [one.judged for one in found] == [None, 1.0, 1.0, None, 1.0, None, None, None, None]
    assert [one.rule for one in found] == [f"rule {i}" for i in range(9)], "the rule's word is not lost"
    assert judge.late == 3


def test_the_wait_begins_when_generation_has_ended() -> None:
    judge = SlowJudge(1.0)
    with scoring(judge, max_wait=0.9) as one:
        add(one, 1)
        time.sleep(0.8)
        assert one.results()[1].judged == 0.0
    assert judge.late == 0
