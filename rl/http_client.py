"""A patient client for one OpenAI-compatible server: what the judge and the evaluation of a served model share.

Many requests at once with a bound, rate limits, retries with jitter, one deadline over all tries of an answer, and a
circuit breaker. The server is not trusted: a reply is read up to a size, redirects are not followed, and what a body means
is the caller's `read` to say, which tells a value from a reason and whether to ask again.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import httpx

from .judge_breaker import Breaker
from .judge_limits import Limits

LONGEST_HOLD = 600.0
"""Seconds that a server may have us wait: more is an outage, whatever it calls it."""

_BYTES_PER_TOKEN = 3
"""For a request's tokens before the server has counted them: fewer than any tokenizer's usual, to be on the safe side."""

_REFUSED = (401, 403, 404)
_AGAIN = (408, 409, 425, 429)
_DETAIL = 2000
"""Bytes that are read of what a server says about a request that it refuses."""

T = TypeVar("T")


class Patience(Protocol):
    """How hard a server is asked; `JudgeConfig` says what each number means."""

    @property
    def concurrency(self) -> int: ...
    @property
    def requests_per_minute(self) -> int: ...
    @property
    def tokens_per_minute(self) -> int: ...
    @property
    def timeout(self) -> float: ...
    @property
    def deadline(self) -> float: ...
    @property
    def retries(self) -> int: ...
    @property
    def backoff(self) -> float: ...
    @property
    def breaker_failures(self) -> int: ...
    @property
    def breaker_pause(self) -> float: ...


@dataclass(frozen=True)
class Reply(Generic[T]):
    """`value`: what was asked for, None if there is none for the reason `why`; `again`: worth another try.

    `detail`: the server's own words on a request that it refuses; `tokens`: what the request has cost, where it tells.
    """

    value: T | None = None
    why: str = ""
    again: bool = False
    retry_after: float | None = None
    tokens: float | None = None
    detail: str = ""


class Client(Generic[T]):
    """An asynchronous context, entered as often as one likes: counters, breaker and limits outlive it, connections don't.

    `read` makes a reply of a whole body; `refused` is the exception for a key, path or model that the server won't have.
    `outage`: seconds that the server may be down before requests fail unasked.
    """

    def __init__(
        self, settings: Patience, *, read: Callable[[bytes], Reply[T]], refused: Callable[[int], Exception],
        api_key: str | None = None, max_reply: int, outage: float, counts: Counter[str] | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.counts = settings, Counter() if counts is None else counts
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_pause)
        self.limits = Limits(settings.requests_per_minute, settings.tokens_per_minute)
        self._read, self._refused, self._max_reply, self._outage = read, refused, max_reply, outage
        # A compressed reply could be a thousand times its size.
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        # Its own generator: the jitter of a retry must not move the run's random state.
        self._jitter = random.Random()
        self._depth = 0

    async def __aenter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._slots = asyncio.Semaphore(self.settings.concurrency)
            pool = httpx.Limits(max_connections=self.settings.concurrency)
            # A request's time is bounded in _post as a whole, so that a server that drips bytes meets the bound too.
            self._http = httpx.AsyncClient(headers=self._headers, timeout=None, limits=pool, follow_redirects=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            await self._http.aclose()

    @property
    def down(self) -> bool:
        """Whether the server has been out for longer than `outage`."""
        return self.breaker.outage() > self._outage

    @property
    def idle(self) -> bool:
        """Whether nobody is within the block."""
        return self._depth == 0

    @property
    def last(self) -> bool:
        """Whether the next to leave is the last one within it."""
        return self._depth == 1

    async def post(self, url: str, body: dict[str, Any], *, size: int, most: int) -> Reply[T]:
        """What came of a request, all its tries together. Raises what `refused` makes.

        `size`: bytes of the prompt; `most`: tokens that the answer may have. Both are for the limit of tokens a minute.
        """
        async with self._slots:
            return await self._complete(url, body, size / _BYTES_PER_TOKEN + most)

    async def get(self, url: str) -> Reply[T]:
        """As `post`, of a page that costs no tokens."""
        async with self._slots:
            return await self._complete(url, None, 0.0)

    async def _complete(self, url: str, body: dict[str, Any] | None, tokens: float) -> Reply[T]:
        settings = self.settings
        end, reply = time.monotonic() + settings.deadline, Reply[T]()
        for attempt in range(settings.retries + 1):
            pause, taken = self.limits.take(tokens)
            await asyncio.sleep(pause)
            end += pause
            closed = await self._wait_for_turn(end)
            if closed is not None:
                return Reply(why=reply.why or closed)
            self.counts["calls"] += 1
            self.counts["retries"] += attempt > 0
            reply = await self._post(url, body, end)
            if reply.tokens is not None:
                self.limits.used(taken, reply.tokens)
            if not reply.again:
                return reply
            if attempt < settings.retries and not await self._back_off(attempt, reply, end):
                return reply
        return reply

    async def _wait_for_turn(self, end: float) -> str | None:
        """Waits while the server asked for a pause or the breaker is open; why not, where that lasts too long."""
        while pause := self.limits.held():
            if time.monotonic() + pause > end:
                return "told to retry later"
            await asyncio.sleep(pause)
        while pause := self.breaker.claim():
            if time.monotonic() + pause > end or self.down:
                return "breaker open"
            await asyncio.sleep(pause)
        return None

    async def _back_off(self, attempt: int, reply: Reply[T], end: float) -> bool:
        """Waits before the next try: what the server asks of all, else doubling with jitter. False: there is no time."""
        if reply.retry_after is not None:
            self.limits.hold(min(reply.retry_after, LONGEST_HOLD))
        held = self.limits.held()  # not all at once when it ends
        wait = held + self.settings.backoff * (1 if held else 2**attempt) * self._jitter.uniform(0.5, 1.5)
        if time.monotonic() + wait > end:
            return False
        await asyncio.sleep(wait)
        return True

    async def _post(self, url: str, body: dict[str, Any] | None, end: float) -> Reply[T]:
        """One request, and what the breaker should know of it."""
        try:
            async with asyncio.timeout(min(self.settings.timeout, max(0.0, end - time.monotonic()))):
                reply = await self._exchange(url, body)
        except TimeoutError:
            reply = Reply[T](why="timeout", again=True)
        except httpx.RequestError:
            reply = Reply[T](why="connection", again=True)
        except BaseException:  # called off, or a refusal: nothing is known of the server's health
            self.breaker.abandoned()
            raise
        if reply.again and reply.why != "429":  # a server that asks for patience is well
            self.breaker.failed()
        else:
            self.breaker.succeeded()
        return reply

    async def _exchange(self, url: str, body: dict[str, Any] | None) -> Reply[T]:
        async with self._http.stream("GET" if body is None else "POST", url, json=body) as response:
            status = response.status_code
            if status in _REFUSED:
                raise self._refused(status)
            if status in _AGAIN or status >= 500:
                return Reply(
                    why=str(status), again=True, retry_after=retry_after(response.headers.get("retry-after", ""))
                )
            if 300 <= status < 400:
                return Reply(why=f"redirect {status}")
            if response.headers.get("content-encoding", "identity") != "identity":
                return Reply(why="compressed reply" if status == 200 else str(status))
            most = self._max_reply if status == 200 else _DETAIL
            read = bytearray()
            async for chunk in response.aiter_raw():
                read += chunk
                if len(read) > most:
                    break
            if status != 200:
                return Reply(why=str(status), detail=bytes(read[:_DETAIL]).decode(errors="replace"))
            if len(read) > most:
                return Reply(why="endless reply")
        return self._read(bytes(read))


def retry_after(value: str) -> float | None:
    """Seconds that a Retry-After header asks for; None if it says nothing of the kind."""
    value = value.strip()[:64]
    if value.isascii() and value.isdecimal():
        return float(value)
    date = email.utils.parsedate_tz(value)
    try:
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
    except (ValueError, OverflowError):  # a day that no calendar has
        return None
