"""Groups that a call doesn't wait for: their requests are stopped, what they have so far comes back, and another call goes on from it.

vLLM answers a request that is aborted (POST /inference/v1/abort_requests with the id we gave it) as any other, with the tokens and
log-probs sampled so far and "abort" as the finish reason of what hadn't ended. To go on, each unfinished completion is a request
of its own: the prompt and its tokens go in, and what is left of its limit may come out; prompt and siblings are in the prefix
cache. Every part's log-probs are those that it was sampled with. What a server had sampled and not yet reported is lost.

An abort is posted until the reply is there: it may come before the request does, or to another of the server's front-ends.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ...engine import Completion
from ..generator import UNFINISHED
from .http import ServerError, post
from .replies import PATH

ABORT = "/inference/v1/abort_requests"
STOP_S = 60.0
"""A stopped request that isn't answered within so many seconds has failed."""

_AGAIN_S, _ASK_S = 0.5, 10.0
_ID = "generate-tokens-{}"
"""What vLLM makes of our request's id."""


@dataclass(frozen=True)
class Part:
    """One request of a group: for its completions at `places`, which have the tokens of `begun` already. `seed` is added to the group's."""

    places: tuple[int, ...]
    begun: tuple[int, ...] = ()
    seed: int = 0


def nothing(size: int) -> list[Completion]:
    """A group of which no token was sampled."""
    return [Completion((), (), (), UNFINISHED)] * size


def parts(begun: Sequence[Completion], size: int) -> list[Part]:
    """What is to be asked for: the completions without a token in one request, and each of the others in its own.

    Seeds differ, and aren't those that the tokens so far were drawn with: `begun` is of another call, with seeds of its own.
    """
    empty = tuple(i for i in range(size) if not begun or (begun[i].finish_reason == UNFINISHED and not begun[i].ids))
    rest = [Part((i,), one.ids, size + i) for i, one in enumerate(begun) if one.finish_reason == UNFINISHED and one.ids]
    return [*([Part(empty)] if empty else []), *rest]


def joined(begun: Completion, more: Completion) -> Completion:
    """A completion and what followed."""
    kept = begun.kept_logmass + more.kept_logmass
    ids = begun.ids + more.ids
    known = len(kept) == len(ids)
    return Completion(ids, begun.logprobs + more.logprobs, kept if known else (), more.finish_reason)


async def stoppable(url: str, body: dict[str, Any], stop: asyncio.Event, *, deadline: float, largest: int) -> Any:
    """The reply to an order, which is stopped when `stop` is set.

    Raises:
        ServerError: as `post`; or it was to stop and didn't.
    """
    key = uuid.uuid4().hex
    asked = asyncio.create_task(post(url, PATH, {**body, "request_id": key}, deadline=deadline, largest=largest))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([asked, stopped], return_when=asyncio.FIRST_COMPLETED)
        until = time.monotonic() + STOP_S
        while not asked.done():
            if time.monotonic() > until:
                raise ServerError(url, f"a request that was to stop isn't answered after {STOP_S:g} s")
            with suppress(ServerError):  # it is posted again, and what counts is whether the order is answered
                await post(url, ABORT, {"request_ids": [_ID.format(key)]}, deadline=_ASK_S)
            await asyncio.wait([asked], timeout=_AGAIN_S)
        return asked.result()
    finally:
        asked.cancel()
        stopped.cancel()
        await asyncio.gather(asked, stopped, return_exceptions=True)
