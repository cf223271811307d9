"""Groups on their way through the servers: sent, checked, sent again, given up.

All of it runs in one event loop in a thread of its own; the main thread takes what comes out of a queue, so that rules and judge
see a group while others are still generated. A group whose reply is late, cut short or nonsense is queued again, at another server
first; a server that is gone is waited for, or started again, while others go on.
"""

from __future__ import annotations

import asyncio
import queue
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...engine import Completion, Sampling
from . import replies
from .config import ServingConfig
from .http import ServerError, get, post
from .pool import Host, Pool

HANGS_S = 60.0
"""A server of our own that runs and isn't healthy for so long is started again."""

_LOOK_S, _ASK_S = 0.5, 10.0
_WORTH_ANOTHER_TRY = (408, 425, 429)


@dataclass(frozen=True)
class Job:
    """One group to be made; `place` is its prompt's in the list."""

    place: int
    name: str
    ids: Sequence[int]
    seed: int | None


@dataclass(frozen=True)
class Batch:
    """What all groups of a call share."""

    group_size: int
    sampling: Sampling
    stop_ids: Collection[int]
    vocabulary: int


@dataclass(frozen=True)
class Made:
    """A finished group of a batch."""

    batch: Batch
    place: int
    completions: list[Completion]


Event = Made | Host | ServerError
"""What has happened; a `Host` needs the policy's weights before it is asked, and an error is the end of it all."""


class Asking:
    """`counts` are metrics since they were last taken."""

    def __init__(self, pool: Pool, config: ServingConfig) -> None:
        self.pool, self.config = pool, config
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.counts: Counter[str] = Counter()
        self.model: str | None = None
        """An adapter that requests name; None for the model itself."""
        self._reviving: dict[str, asyncio.Task[None]] = {}

    async def groups(self, jobs: Sequence[Job], batch: Batch) -> None:
        """Makes them all; each goes into `events`. What stops one for good stops all, and is the last event."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for job in jobs:
                    tasks.create_task(self._group(job, batch))
        except* ServerError as errors:
            self.events.put(_first(errors))

    async def _group(self, job: Job, batch: Batch) -> None:
        tokens = len(job.ids) + batch.group_size * batch.sampling.max_completion
        failed: list[ServerError] = []
        while len(failed) < self.config.tries:
            host = await self.pool.take(job.ids, tokens, {error.url for error in failed})
            try:
                self.events.put(Made(batch, job.place, await self._ask(host, job, batch)))
                return
            except ServerError as error:
                failed.append(error)
                self.counts["rollout/failed_requests"] += 1
                if not _passes(error):
                    break
                await self._look_at(host)
                self.counts["rollout/requeued"] += len(failed) < self.config.tries
            finally:
                await self.pool.give_back(host, tokens)
        raise _given_up(job, failed)

    async def _ask(self, host: Host, job: Job, batch: Batch) -> list[Completion]:
        size, sampling, stops = batch.group_size, batch.sampling, batch.stop_ids
        body = replies.order(job.ids, size, sampling, stops, job.seed, self.model)
        limit = replies.largest(size, sampling)
        reply = await post(host.url, replies.PATH, body, deadline=self.config.deadline_s, largest=limit)
        try:
            return replies.read(reply, size, sampling, stops, batch.vocabulary)
        except replies.BadReply as error:
            raise ServerError(host.url, f"bad reply: {error}") from None

    async def look_at_all(self) -> None:
        """Before a call: who went while nobody was asked. They are brought up while the others begin."""
        await asyncio.gather(*map(self._look_at, self.pool.hosts))

    async def _look_at(self, host: Host) -> None:
        """A server that isn't well is asked no more until it is. Others go on in the meantime."""
        if host.up and host.url not in self._reviving and not await well(host):
            await self.pool.now(host, up=False, version=host.version)
            if host.url not in self._reviving:  # it goes on when this call's groups are all there
                self._reviving[host.url] = asyncio.create_task(self._revive(host))

    async def _revive(self, host: Host) -> None:
        try:
            version = await self.bring_up(host)
            await self.pool.now(host, up=True, version=version)
            if version != self.pool.version:
                self.events.put(host)
        except ServerError as error:
            self.events.put(error)
        finally:
            del self._reviving[host.url]

    async def bring_up(self, host: Host) -> int | None:
        """Waits until it answers, and gives the version of its weights: one of our own that died or hangs is started again.

        Raises:
            ServerError: it stays away, or has died too often.
        """
        if host.server is None:
            await _wait_for(host, self.config.start_timeout_s)
            return 0  # it may have been started anew, with what it was started with
        if host.server.alive and await _comes_round(host):
            return host.version
        while host.restarts < self.config.restarts:
            host.restarts += 1
            self.counts["rollout/restarts"] += 1
            host.server.start()
            try:
                await host.server.ready(self.config.start_timeout_s)
                return 0
            except ServerError:
                if host.server.alive:  # slow, and not dead: another start would be no faster
                    raise
        raise ServerError(
            host.url,
            f"the server has died, and was started again {host.restarts} times (generator.restarts): {host.server.tail()}",
        )


async def well(host: Host) -> bool:
    """Whether it runs and says that it is healthy."""
    if host.server is not None and not host.server.alive:
        return False
    try:
        await get(host.url, "/health", deadline=_ASK_S)
    except ServerError:
        return False
    return True


async def _comes_round(host: Host) -> bool:
    """Whether a process that runs is healthy again soon."""
    try:
        await _wait_for(host, HANGS_S)
    except ServerError:
        return False
    return True


async def _wait_for(host: Host, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not await well(host):
                if host.server is not None and not host.server.alive:
                    raise ServerError(host.url, "the server has died")
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise ServerError(host.url, f"no healthy answer to GET /health for {timeout_s:g} s") from None


def _passes(error: ServerError) -> bool:
    """Whether another try may do better: a request that a server refuses as wrong is refused by all."""
    return error.status is None or error.status in _WORTH_ANOTHER_TRY or not 400 <= error.status < 500


def _given_up(job: Job, failed: Sequence[ServerError]) -> ServerError:
    """The last failure, with the prompt's name and what went before."""
    last, tries = failed[-1], "one try" if len(failed) == 1 else f"{len(failed)} tries"
    before = f" (before that: {'; '.join(map(str, failed[:-1]))})" if failed[:-1] else ""
    told = f"no completions of prompt {job.name!r} ({len(job.ids)} tokens) after {tries}: {last.reason}{before}"
    return ServerError(last.url, told, last.status)


def _first(errors: BaseExceptionGroup[ServerError]) -> ServerError:
    [error, *_] = errors.exceptions
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
