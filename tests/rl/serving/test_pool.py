"""Which server a prompt goes to."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from longreach.rl.serving.pool import PREFIX_TOKENS, SLACK, Host, Pool, choose


def hosts(count: int) -> list[Host]:
    return [Host(f"http://host{i}:8000", up=True, version=0) for i in range(count)]


def prompt(document: int, question: int, length: int = PREFIX_TOKENS) -> list[int]:
    return [*range(document, document + length), question]


def test_prompts_of_one_document_meet_at_one_server_and_documents_spread() -> None:
    free, homes = hosts(4), Counter[str]()
    for document in range(200):
        chosen = {choose(free, prompt(document, question), 10).url for question in range(5)}
        assert len(chosen) == 1
        homes.update(chosen)
    assert len(homes) == 4 and min(homes.values()) > 25, homes


def test_a_server_that_goes_moves_no_prompt_of_the_others() -> None:
    free = hosts(4)
    before = [choose(free, prompt(d, 0), 1).url for d in range(100)]
    after = [choose(free[:3], prompt(d, 0), 1).url for d in range(100)]
    stayed = [(b, a) for b, a in zip(before, after, strict=True) if b != free[3].url]
    assert all(b == a for b, a in stayed) and len(stayed) < 100


def test_one_with_more_than_its_share_is_passed_over_for_the_one_with_least() -> None:
    free = hosts(3)
    home = choose(free, prompt(1, 0), 100)
    others = [host for host in free if host is not home]
    home.tokens, others[0].tokens, others[1].tokens = 1000, 900, 950
    assert choose(free, prompt(1, 0), 100) is home, "a little more than the others have: the cache is worth it"
    home.tokens = 1500
    assert choose(free, prompt(1, 0), 100) is others[0]


def test_load_stays_even_whatever_the_prompts_are() -> None:
    free = hosts(3)
    for question in range(60):
        choose(free, prompt(5, question), 100).tokens += 100  # one document: all prefer the same server
    loads = [host.tokens for host in free]
    assert max(loads) <= SLACK * sum(loads) / 3, loads
    assert min(loads) > 0.8 * sum(loads) / 3, loads


def test_a_place_is_waited_for_and_the_one_avoided_is_taken_if_there_is_no_other() -> None:
    async def course() -> None:
        pool = Pool(hosts(2), concurrency=1)
        first = await pool.take([1], 10)
        second = await pool.take([1], 10)
        assert first is not None and second is not None
        assert {first.url, second.url} == {host.url for host in pool.hosts}
        third = asyncio.create_task(pool.take([1], 10, avoid={first.url}))
        await asyncio.sleep(0.01)
        assert not third.done(), "both are full"
        await pool.give_back(first, 10)
        await asyncio.sleep(0.01)
        assert not third.done(), "the other one is up, and will have a place"
        await pool.now(second, up=False, version=0)
        assert await third is first, "now there is no other"

    asyncio.run(course())


@pytest.mark.parametrize("version", [None, 3], ids=["not known", "old"])
def test_weights_of_another_version_are_not_asked(version: int | None) -> None:
    async def course() -> None:
        pool = Pool(hosts(2), concurrency=4)
        pool.hosts[0].version = version
        assert await pool.behind(0) == [pool.hosts[0]]
        for _ in range(4):
            assert await pool.take([1], 1) is pool.hosts[1]
        waiting = asyncio.create_task(pool.take([1], 1))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await pool.now(pool.hosts[0], up=True, version=0)
        assert await waiting is pool.hosts[0]
        assert await pool.behind(1) == pool.hosts

    asyncio.run(course())
