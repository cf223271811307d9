"""The judge behind an OpenAI-compatible server: POST {base_url}/chat/completions.

Many requests at once with a bound, rate limits, retries with jitter, one deadline over all tries of an answer, a circuit
breaker, and a cache. `OpenAIClient` carries any task, `OpenAIJudge` gives verdicts on answers. The server is not trusted: a reply is read up to a size, as JSON of one shape, redirects are not
followed, and what is not a verdict is None, never 0. It gives up on voting: one deterministic sample per case.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self

import httpx

from . import judge_prompt
from .judge_base import Judge, JudgeFailing, Tally
from .judge_breaker import Breaker
from .judge_cache import VerdictCache, cache_key
from .judge_config import JudgeConfig
from .judge_limits import Limits
from .judge_prompt import Case
from .judge_task import C, Chat, Task, V

MAX_REPLY = 1 << 20
"""Bytes of a reply that are read: what is longer is no chat completion."""

LONGEST_HOLD = 600.0
"""Seconds that a server may have us wait: more is an outage, whatever it calls it."""

_BYTES_PER_TOKEN = 3
"""For a request's tokens before the server has counted them: fewer than any tokenizer's usual, to be on the safe side."""

_REFUSED = (401, 403, 404)
_AGAIN = (408, 409, 425, 429)


@dataclass(frozen=True)
class Reply:
    """`text`: the judge's words, None if there are none for the reason `why`; `again`: worth another try."""

    text: str | None = None
    why: str = ""
    again: bool = False
    retry_after: float | None = None
    tokens: float | None = None


class OpenAIClient(Generic[C, V]):
    """Asks one task of one server. Counters, breaker and limits outlive the block; connections and open requests don't."""

    def __init__(
        self, config: JudgeConfig, cache: VerdictCache[V], task: Task[C, V], api_key: str | None = None
    ) -> None:
        self.config, self.cache, self.task = config, cache, task
        self.tally = Tally(config.max_failure_share, task.stakes)
        self.breaker = Breaker(config.breaker_failures, config.breaker_pause)
        self.limits = Limits(config.requests_per_minute, config.tokens_per_minute)
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        # A compressed reply could be a thousand times its size.
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        # Its own generator: the jitter of a retry must not move the run's random state.
        self._jitter = random.Random()
        self._depth = 0
        self._asked: dict[str, asyncio.Task[V | None]] = {}

    async def __aenter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self.cache.refresh()
            self._slots = asyncio.Semaphore(self.config.concurrency)
            pool = httpx.Limits(max_connections=self.config.concurrency)
            # A request's time is bounded in _post as a whole, so that a server that drips bytes meets the bound too.
            self._client = httpx.AsyncClient(headers=self._headers, timeout=None, limits=pool, follow_redirects=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            asked, self._asked = list(self._asked.values()), {}
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            await self._client.aclose()

    async def answers(self, cases: Sequence[C]) -> list[V | None]:
        """In order. Equal cases are asked once. Raises JudgeFailing when the server refuses key, path or model."""
        async with self:
            return list(await asyncio.gather(*map(self._answer, cases)))

    def overdue(self, count: int) -> None:
        for _ in range(count):
            self.tally.failure("overdue")

    def check(self) -> None:
        self.tally.check(f"the judge at {self.config.base_url}")

    def metrics(self) -> dict[str, float]:
        return self.tally.metrics() | {
            "judge/breaker": self.breaker.state,
            "judge/breaker_opened": float(self.breaker.opened),
            "judge/rate_limited_s": self.limits.waited,
        }

    async def _answer(self, case: C) -> V | None:
        messages = self.task.messages(case)
        key = cache_key(self.task.version, self.config.model, messages)
        known = self.cache.get(key)
        if known is not None or key in self._asked:
            self.tally.counts["cache_hits"] += 1
        if known is not None:
            return known
        if key not in self._asked:
            self._asked[key] = asyncio.create_task(self._ask(key, case, messages))
        return await asyncio.shield(self._asked[key])  # one that is called off may be awaited by others

    async def _ask(self, key: str, case: C, messages: Chat) -> V | None:
        try:
            async with self._slots:
                reply = await self._complete(messages)
        finally:
            self._asked.pop(key, None)
        verdict = None if reply.text is None else self.task.parse(case, reply.text)
        if verdict is None:
            self.tally.failure(reply.why or "no clear verdict")
            return None
        self.tally.verdict()
        self.cache.put(key, verdict)
        return verdict

    async def _complete(self, messages: Chat) -> Reply:
        """The judge's words, or why it failed for good."""
        size = sum(len(message["content"].encode()) for message in messages)
        end, reply = time.monotonic() + self.config.deadline, Reply()
        for attempt in range(self.config.retries + 1):
            pause, taken = self.limits.take(size / _BYTES_PER_TOKEN + self.config.max_tokens)
            await asyncio.sleep(pause)
            end += pause
            closed = await self._wait_for_turn(end)
            if closed is not None:
                return Reply(why=reply.why or closed)
            self.tally.counts["calls"] += 1
            self.tally.counts["retries"] += attempt > 0
            reply = await self._post(messages, end)
            if reply.tokens is not None:
                self.limits.used(taken, reply.tokens)
            if not reply.again:
                return reply
            if attempt < self.config.retries and not await self._back_off(attempt, reply, end):
                return reply
        return reply

    async def _wait_for_turn(self, end: float) -> str | None:
        """Waits while the server asked for a pause or the breaker is open; why not, where that lasts too long."""
        while pause := self.limits.held():
            if time.monotonic() + pause > end:
                return "told to retry later"
            await asyncio.sleep(pause)
        while pause := self.breaker.claim():
            if time.monotonic() + pause > end or self.breaker.outage() > self.config.deadline:
                return "breaker open"
            await asyncio.sleep(pause)
        return None

    async def _back_off(self, attempt: int, reply: Reply, end: float) -> bool:
        """Waits before the next try: what the server asks of all, else doubling with jitter. False: there is no time."""
        if reply.retry_after is not None:
            self.limits.hold(min(reply.retry_after, LONGEST_HOLD))
        held = self.limits.held()  # not all at once when it ends
        wait = held + self.config.backoff * (1 if held else 2**attempt) * self._jitter.uniform(0.5, 1.5)
        if time.monotonic() + wait > end:
            return False
        await asyncio.sleep(wait)
        return True

    async def _post(self, messages: Chat, end: float) -> Reply:
        """One request, and what the breaker should know of it."""
        body = {
            "model": self.config.model, "messages": messages, "temperature": 0.0, "max_tokens": self.config.max_tokens,
        }  # fmt: skip
        try:
            async with asyncio.timeout(min(self.config.timeout, max(0.0, end - time.monotonic()))):
                reply = await self._exchange(body)
        except TimeoutError:
            reply = Reply(why="timeout", again=True)
        except httpx.RequestError:
            reply = Reply(why="connection", again=True)
        except BaseException:  # called off, or a refusal: nothing is known of the server's health
            self.breaker.abandoned()
            raise
        if reply.again and reply.why != "429":  # a server that asks for patience is well
            self.breaker.failed()
        else:
            self.breaker.succeeded()
        return reply

    async def _exchange(self, body: dict[str, Any]) -> Reply:
        async with self._client.stream("POST", self._url, json=body) as response:
            status = response.status_code
            if status in _REFUSED:
                raise JudgeFailing(
                    f"judge at {self.config.base_url} answered {status} for model {self.config.model!r}: "
                    "check base_url, model and api_key_env"
                )
            if status in _AGAIN or status >= 500:
                return Reply(
                    why=str(status), again=True, retry_after=retry_after(response.headers.get("retry-after", ""))
                )
            if status != 200:
                return Reply(why=f"redirect {status}" if 300 <= status < 400 else str(status))
            if response.headers.get("content-encoding", "identity") != "identity":
                return Reply(why="compressed reply")
            read = bytearray()
            async for chunk in response.aiter_raw():
                read += chunk
                if len(read) > MAX_REPLY:
                    return Reply(why="endless reply")
        return _content(bytes(read))


class OpenAIJudge(OpenAIClient[Case, float], Judge):
    """See `Judge`."""

    def __init__(self, config: JudgeConfig, cache: VerdictCache[float], api_key: str | None = None) -> None:
        super().__init__(config, cache, judge_prompt.VERDICT, api_key)

    async def verdicts(self, cases: Sequence[Case]) -> list[float | None]:
        return await self.answers(cases)


def _content(body: bytes) -> Reply:
    """The one choice's words. Reasoning in fields of its own is not read."""
    try:
        parsed = json.loads(body)
        [choice] = parsed["choices"]
        text, usage = choice["message"]["content"], parsed.get("usage")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not JSON, or not a chat completion
        return Reply(why="no chat completion")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    counted = float(tokens) if isinstance(tokens, int) and 0 <= tokens < 1 << 31 else None
    if not isinstance(text, str):
        return Reply(why="no words", tokens=counted)
    return Reply(text, tokens=counted)


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
