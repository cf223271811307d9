"""A loop in a thread of its own: results and exceptions come back, and nothing outlives the block."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from longreach.rl.background import Background


async def later(value: int, seconds: float = 0.01) -> int:
    await asyncio.sleep(seconds)
    return value


async def wrong() -> None:
    raise KeyError("mine")


def test_results_and_exceptions_come_back() -> None:
    with Background("scoring") as background:
        futures = [background.submit(later(i, 0.05)) for i in range(10)]
        assert [future.result(5) for future in futures] == list(range(10))
        with pytest.raises(KeyError, match="mine"):
            background.submit(wrong()).result(5)


def test_what_is_under_way_is_called_off_with_its_clean_up() -> None:
    said: list[str] = []

    async def long() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            said.append("cleaned up")

    start = time.perf_counter()
    with Background("scoring") as background:
        future = background.submit(long())
        background.submit(later(0)).result(5)
    assert time.perf_counter() - start < 5
    assert future.cancelled()
    assert said == ["cleaned up"]


def test_helper_threads_have_ended_when_the_block_has() -> None:
    before, done = set(threading.enumerate()), list[int]()

    async def helped() -> None:
        await asyncio.to_thread(lambda: (time.sleep(0.2), done.append(1)))

    with Background("scoring") as background:
        background.submit(helped())
        background.submit(later(0, 0.05)).result(5)
    assert done == [1], "a thread can't be called off: it is waited for"
    assert set(threading.enumerate()) == before


def test_blocks_follow_each_other_and_stand_side_by_side() -> None:
    for _ in range(3):
        with Background("one") as one, Background("two") as two:
            assert (one.submit(later(1)).result(5), two.submit(later(2)).result(5)) == (1, 2)
