"""The judge's client against a real HTTP server that behaves badly on purpose. No failure is ever a 0."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest

from longreach.rl.judge_base import JudgeFailing
from longreach.rl.judge_cache import VerdictCache
from longreach.rl.judge_config import JudgeConfig
from longreach.rl.judge_http import LONGEST_HOLD, MAX_REPLY, OpenAIJudge, retry_after
from longreach.rl.judge_prompt import Case

CASE = Case("Which city?", ("Paris",), "the French capital")


def judge(server: Any, **options: Any) -> OpenAIJudge:
    usual = {"backoff": 0.001, "timeout": 5.0, "breaker_pause": 0.05}
    url = server if isinstance(server, str) else server.url
    return OpenAIJudge(JudgeConfig(base_url=url, model="small", **{**usual, **options}), VerdictCache(None, print))


def ask(one: OpenAIJudge, *cases: Case) -> list[float | None]:
    return asyncio.run(one.verdicts(cases or (CASE,)))


def cases(count: int) -> list[Case]:
    return [Case("q", ("a",), str(index)) for index in range(count)]


def test_no(server: Any) -> None:
    server.respond = lambda _n, _body: server.chat("Another city. [[NO]]")
    assert ask(judge(server)) == [0.0]


# What comes back is no verdict: asked once where asking again is no use, and why is counted.
USELESS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "both verdicts": (lambda s: s.chat("[[YES]] or [[NO]]"), "no clear verdict"),
    "no verdict": (lambda s: s.chat("maybe"), "no clear verdict"),
    "verdict without brackets": (lambda s: s.chat("yes"), "no clear verdict"),
    "verdict not at the end": (lambda s: s.chat("[[YES]] would be my answer if"), "no clear verdict"),
    "verdict while thinking": (lambda s: s.chat("<think>so [[YES]]</think> hm"), "no clear verdict"),
    "verdict in unended thoughts": (lambda s: s.chat("<think>so [[YES]]"), "no clear verdict"),
    "verdict in a field of reasoning": (
        lambda s: s.chat(None, message={"reasoning_content": "[[YES]]", "reasoning": "[[YES]]"}),
        "no words",
    ),
    "words that are no text": (lambda s: s.chat({"text": "[[YES]]"}), "no words"),
    "no choices": (lambda s: s.http(200, '{"choices": []}'), "no chat completion"),
    "two choices that differ": (
        lambda s: s.http(
            200, json.dumps({"choices": [{"message": {"content": f"[[{word}]]"}} for word in ("YES", "NO")]})
        ),
        "no chat completion",
    ),
    "no message": (lambda s: s.http(200, '{"choices": [{}]}'), "no chat completion"),
    "a list": (lambda s: s.http(200, "[1]"), "no chat completion"),
    "a string": (lambda s: s.http(200, '"[[YES]]"'), "no chat completion"),
    "a page": (lambda s: s.http(200, "<html>[[YES]]</html>"), "no chat completion"),
    "nothing": (lambda s: s.http(200), "no chat completion"),
    "half of its JSON": (lambda s: s.http(200, '{"choices": [{"message": {"content": "[[YES]]'), "no chat completion"),
    "bytes that are no UTF-8": (lambda s: s.http(200, b'{"choices": "\xff\xfe"}'), "no chat completion"),
    "brackets without end": (lambda s: s.http(200, "[" * 200_000), "no chat completion"),
    "a number without end": (lambda s: s.http(200, "9" * 100_000), "no chat completion"),
    "a compressed reply": (
        lambda s: s.http(200, gzip.compress(b" " * 10_000_000), {"Content-Encoding": "gzip"}),
        "compressed reply",
    ),
    "a reply too large": (lambda s: s.http(200, b" " * (MAX_REPLY + 1)), "endless reply"),
    "a bad request": (lambda s: s.http(400, "too long"), "400"),
    "a redirect": (
        lambda s: s.http(302, "", {"Location": "http://127.0.0.1:9/elsewhere"}),
        "redirect 302",
    ),
    "a redirect to itself": (lambda s: s.http(307, "", {"Location": "/v1/chat/completions"}), "redirect 307"),
}  # fmt: skip


@pytest.mark.parametrize("name", USELESS)
def test_useless_replies_are_no_verdict(server: Any, name: str) -> None:
    answer, why = USELESS[name]
    server.respond = lambda _n, _body: answer(server)
    one = judge(server)
    assert ask(one) == [None]
    assert len(server.bodies) == 1
    assert one.metrics()[f"judge/failed/{why.replace(' ', '_')}"] == one.metrics()["judge/failures"] == 1.0


# The connection or the server fails: tried again, and once it works the verdict counts.
WORDS = b'{"choices": [{"message": {"content": "[[YES]]"}}]}'
BROKEN: dict[str, Callable[[Any], Any]] = {
    "500": lambda s: s.http(500),
    "503 with a verdict": lambda s: s.http(503, WORDS),
    "429": lambda s: s.http(429),
    "408": lambda s: s.http(408),
    "reset at once": lambda s: s.Raw([], reset=True),
    "reset within the head": lambda s: s.Raw([b"HTTP/1.1 200 OK\r\nContent-Le"], reset=True),
    "half a reply": lambda s: s.Raw([b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n", WORDS]),
    "half a chunk": lambda s: s.Raw([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n" + WORDS]),
    "no HTTP": lambda s: s.Raw([b"220 mail.example.org ESMTP\r\n"]),
    "closed without a word": lambda s: s.Raw([b""]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_replies_are_tried_again(server: Any, name: str) -> None:
    server.respond = lambda n, _body: BROKEN[name](server) if n < 2 else server.chat("[[YES]]")
    one = judge(server)
    assert ask(one) == [1.0]
    assert len(server.bodies) == 3
    assert (one.metrics()["judge/retries"], one.metrics()["judge/failures"]) == (2.0, 0.0)


@pytest.mark.parametrize("name", BROKEN)
def test_what_stays_broken_is_no_verdict_and_not_remembered(server: Any, name: str) -> None:
    server.respond = lambda _n, _body: BROKEN[name](server)
    one = judge(server, retries=1)
    assert ask(one) == [None]
    assert len(server.bodies) == 2
    assert one.metrics()["judge/failures"] == 1.0
    server.respond = lambda _n, _body: server.chat("[[NO]]")
    assert ask(one) == [0.0]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_stops_the_run(server: Any, status: int) -> None:
    server.respond = lambda _n, _body: server.http(status)
    with pytest.raises(JudgeFailing, match=rf"{status}.*api_key_env"):
        ask(judge(server), *cases(20))


def test_an_unreachable_server_is_no_verdict() -> None:
    one = judge("http://127.0.0.1:9/v1", retries=1)
    assert ask(one) == [None]
    assert one.metrics()["judge/failed/connection"] == 1.0


@pytest.mark.parametrize("drip", [False, True])
def test_a_slow_server_meets_the_timeout(server: Any, drip: bool) -> None:
    """Silent, or sending a byte now and then: a client that only times each read would wait for minutes."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"
    server.respond = lambda _n, _body: (
        server.Raw([head, *[b" "] * 200], pause=0.04) if drip else server.after(8, server.chat("[[YES]]"))
    )
    one, start = judge(server, timeout=0.1, retries=1), time.perf_counter()
    assert ask(one) == [None]
    assert time.perf_counter() - start < 7
    assert (one.metrics()["judge/calls"], one.metrics()["judge/failed/timeout"]) == (2.0, 1.0)


def test_a_body_without_end_is_left_after_the_limit(server: Any) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    server.respond = lambda _n, _body: server.Raw([head, *[b"10000\r\n" + b" " * 65536 + b"\r\n"] * 4096])
    one = judge(server)
    assert ask(one) == [None]
    assert one.metrics()["judge/failed/endless_reply"] == 1.0


def test_the_deadline_bounds_all_tries_together(server: Any) -> None:
    server.respond = lambda _n, _body: server.http(500)
    one, start = judge(server, retries=1000, backoff=0.05, deadline=1.2), time.perf_counter()
    assert ask(one) == [None]
    assert time.perf_counter() - start < 20
    assert 2 <= len(server.bodies) < 24


def test_heeds_retry_after_for_all_requests(server: Any) -> None:
    first = threading.Event()

    def respond(_n: int, _body: dict[str, Any]) -> Any:
        if not first.is_set():
            first.set()
            return server.http(429, "", {"Retry-After": "1"})
        return server.chat("[[YES]]")

    server.respond = respond
    one = judge(server, concurrency=1, breaker_failures=1)
    assert ask(one, *cases(3)) == [1.0] * 3
    assert server.times[1] - server.times[0] >= 1.0
    assert one.metrics()["judge/retries"] == 1
    assert one.breaker.opened == 0, "a server that asks for patience is well"


def test_a_retry_after_past_the_deadline_is_given_up_at_once(server: Any) -> None:
    server.respond = lambda _n, _body: server.http(429, "", {"Retry-After": "100000"})
    one, start = judge(server, deadline=60.0), time.perf_counter()
    assert ask(one, *cases(40)) == [None] * 40
    assert time.perf_counter() - start < 30
    assert len(server.bodies) <= 32, "those that had no slot yet don't ask a server that said no"
    assert one.limits.held() <= LONGEST_HOLD


def test_retry_after_in_all_its_forms() -> None:
    assert retry_after("7") == 7.0
    assert retry_after(" 0 ") == 0.0
    assert retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == 0.0
    assert 50 < (retry_after(formatdate(time.time() + 60, usegmt=True)) or 0) <= 61
    for nonsense in (
        "",
        "-1",
        "soon",
        "²",
        "١",
        "1e9",
        "inf",
        "Fri, 99 Foo 0000 99:99:99 GMT",
        "1 Jan 99999999 0:0:0",
        "x" * 10**6,
    ):
        assert retry_after(nonsense) in (None, 0.0), nonsense
    assert retry_after("9" * 300) is not None, "an absurd number is a long wait, which the deadline cuts"


def test_the_breaker_spares_a_dead_server_and_an_outage_costs_only_time(server: Any) -> None:
    """Sixty requests meet a server that is down for 0.5 s: all verdicts arrive, and few requests were wasted."""
    server.respond = lambda _n, _body: (
        server.http(500) if time.monotonic() < server.times[0] + 0.5 else server.chat("[[YES]]")
    )
    one = judge(server, concurrency=4, breaker_failures=4, breaker_pause=0.1, retries=30)
    assert ask(one, *cases(60)) == [1.0] * 60
    assert len(server.bodies) < 60 + 20
    assert one.metrics()["judge/breaker"] == 0.0
    assert one.metrics()["judge/breaker_opened"] >= 1


def test_a_long_outage_fails_fast(server: Any) -> None:
    """Five hundred cases with a second each would be minutes, four at a time; the first ones wait, the rest don't."""
    server.respond = lambda _n, _body: server.http(500)
    one = judge(server, concurrency=4, breaker_failures=4, breaker_pause=0.2, deadline=1.0, retries=50)
    start = time.perf_counter()
    assert ask(one, *cases(500)) == [None] * 500
    assert time.perf_counter() - start < 60
    assert len(server.bodies) < 60
    assert one.metrics()["judge/breaker"] in (0.5, 1.0)
    server.respond = lambda _n, _body: server.chat("[[YES]]")
    time.sleep(0.25)
    assert ask(one) == [1.0], "the next step's first request is the probe"
    assert one.metrics()["judge/breaker"] == 0.0


def test_requests_a_minute_are_bounded(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of 0.3 s: of 12 requests at 4 a minute the fifth waits for one of them, and the ninth for two."""
    monkeypatch.setattr("longreach.rl.judge_limits.MINUTE", 0.3)
    one, start = judge(server, requests_per_minute=4), time.monotonic()
    assert ask(one, *cases(12)) == [1.0] * 12
    assert server.times[4] - start >= 0.3
    assert server.times[8] - start >= 0.6
    assert one.metrics()["judge/rate_limited_s"] > 0.6


def test_tokens_a_minute_are_bounded_and_corrected_by_what_the_server_counts(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longreach.rl.judge_limits.MINUTE", 0.3)

    def waited(**usage: Any) -> float:
        server.respond = lambda _n, _body: server.chat("[[YES]]", **usage)
        # A request is reserved at some 1,400 tokens; the limit holds two of them.
        one = judge(server, tokens_per_minute=3000, concurrency=1)
        assert ask(one, *cases(8)) == [1.0] * 8
        return one.metrics()["judge/rate_limited_s"]

    assert waited() > 0.5
    assert waited(usage={"total_tokens": 10}) == 0.0
    assert waited(usage={"total_tokens": "many"}) > 0.5
    assert waited(usage=[1]) > 0.5


def test_concurrency_is_bounded_and_used(server: Any) -> None:
    server.respond = lambda _n, _body: server.after(0.03, server.chat("[[YES]]"))
    assert ask(judge(server, concurrency=3), *cases(12)) == [1.0] * 12
    assert server.most == 3


def test_verdicts_keep_their_order(server: Any) -> None:
    def by_prediction(_n: int, body: dict[str, Any]) -> Any:
        even = int(body["messages"][1]["content"].split('"')[3]) % 2 == 0
        return server.after(0.02 if even else 0, server.chat("[[YES]]" if even else "[[NO]]"))

    server.respond = by_prediction
    assert ask(judge(server), *cases(8)) == [1.0, 0.0] * 4


def test_equal_cases_are_asked_once_and_then_remembered(server: Any) -> None:
    one = judge(server)
    assert ask(one, CASE, CASE, Case("Which city?", ("Paris",), "Rome")) == [1.0, 1.0, 1.0]
    assert len(server.bodies) == 2
    assert ask(one) == [1.0]
    assert len(server.bodies) == 2
    assert one.metrics()["judge/cache_hits"] == 2


def test_a_failing_judge_stops_the_run_and_says_why(server: Any) -> None:
    server.respond = lambda n, _body: server.http(500) if n % 3 == 0 else server.chat("[[YES]]")
    one = judge(server, retries=0, concurrency=1, max_failure_share=0.4)
    ask(one, *cases(60))
    one.check()
    assert one.metrics()["judge/failure_rate"] == pytest.approx(1 / 3)
    server.respond = lambda _n, _body: server.chat("hm")
    ask(one, *[Case("p", ("a",), str(i)) for i in range(30)])
    with pytest.raises(
        JudgeFailing, match=r"50 of the last 90 .*no clear verdict: 30, 500: 20.*max_failure_share = 0.4"
    ):
        one.check()


def test_one_early_failure_is_no_trend(server: Any) -> None:
    server.respond = lambda n, _body: server.http(500) if n < 4 else server.chat("[[YES]]")
    one = judge(server, retries=0, concurrency=1)
    assert ask(one, *cases(4)) == [None] * 4
    one.check()  # 4 of 4, but 0.2 of the 20 that a share is taken over at least
    server.respond = lambda _n, _body: server.http(500)
    ask(one, Case("p", ("a",), "1"))
    with pytest.raises(JudgeFailing, match="5 of the last 5"):
        one.check()


def test_called_off_in_the_middle_leaves_nothing_behind(server: Any) -> None:
    server.respond = lambda _n, _body: server.after(0.5, server.chat("[[YES]]"))
    one = judge(server)

    async def interrupted() -> int:
        asking = asyncio.create_task(one.verdicts(cases(5)))
        await asyncio.sleep(0.1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return len(asyncio.all_tasks())

    assert asyncio.run(interrupted()) == 1
    assert ask(one, CASE) == [1.0], "and it can be asked again, from another loop"
