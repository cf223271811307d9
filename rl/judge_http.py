"""The judge behind an OpenAI-compatible server: POST {base_url}/chat/completions.

`OpenAIClient` carries any task, `OpenAIJudge` gives verdicts on answers. Bounds, retries, deadlines and the breaker are the
client's (`http_client.py`); a cache stands before it. A reply is read as JSON of one shape, and what is not a verdict is
None, never 0. It gives up on voting: one deterministic sample per case.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from types import TracebackType
from typing import Generic, Self

from . import judge_prompt
from .http_client import LONGEST_HOLD, Client, Reply, retry_after
from .judge_base import Judge, JudgeFailing, Tally
from .judge_cache import VerdictCache, cache_key
from .judge_config import JudgeConfig
from .judge_prompt import Case
from .judge_task import C, Chat, Task, V

__all__ = ["LONGEST_HOLD", "MAX_REPLY", "OpenAIJudge", "retry_after"]

MAX_REPLY = 1 << 20
"""Bytes of a reply that are read: what is longer is no chat completion."""


class OpenAIClient(Generic[C, V]):
    """Asks one task of one server. Counters, breaker and limits outlive the block; connections and open requests don't."""

    def __init__(
        self, config: JudgeConfig, cache: VerdictCache[V], task: Task[C, V], api_key: str | None = None
    ) -> None:
        self.config, self.cache, self.task = config, cache, task
        self.tally = Tally(config.max_failure_share, task.stakes)
        self.client = Client(
            config, read=_content, refused=self._refusal, api_key=api_key, max_reply=MAX_REPLY, outage=config.deadline,
            counts=self.tally.counts,
        )  # fmt: skip
        self.breaker, self.limits = self.client.breaker, self.client.limits
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._asked: dict[str, asyncio.Task[V | None]] = {}

    async def __aenter__(self) -> Self:
        if self.client.idle:
            self.cache.refresh()
        await self.client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.client.last:
            asked, self._asked = list(self._asked.values()), {}
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        await self.client.__aexit__(kind, error, trace)

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
        size = sum(len(message["content"].encode()) for message in messages)
        body = {
            "model": self.config.model, "messages": messages, "temperature": 0.0, "max_tokens": self.config.max_tokens,
        }  # fmt: skip
        try:
            reply = await self.client.post(self._url, body, size=size, most=self.config.max_tokens)
        finally:
            self._asked.pop(key, None)
        verdict = None if reply.value is None else self.task.parse(case, reply.value)
        if verdict is None:
            self.tally.failure(reply.why or "no clear verdict")
            return None
        self.tally.verdict()
        self.cache.put(key, verdict)
        return verdict

    def _refusal(self, status: int) -> JudgeFailing:
        return JudgeFailing(
            f"judge at {self.config.base_url} answered {status} for model {self.config.model!r}: "
            "check base_url, model and api_key_env"
        )


class OpenAIJudge(OpenAIClient[Case, float], Judge):
    """See `Judge`."""

    def __init__(self, config: JudgeConfig, cache: VerdictCache[float], api_key: str | None = None) -> None:
        super().__init__(config, cache, judge_prompt.VERDICT, api_key)

    async def verdicts(self, cases: Sequence[Case]) -> list[float | None]:
        return await self.answers(cases)


def _content(body: bytes) -> Reply[str]:
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
