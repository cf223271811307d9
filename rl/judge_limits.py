"""Rate limits: no minute sees more than so many requests, or so many tokens.

Exact, whatever 60 seconds are looked at: a window slides over what was taken. It gives up spreading: a minute's share may
go at once. It holds no lock and no event loop: one thread at a time uses it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MINUTE = 60.0


@dataclass
class Taken:
    """A share of the limit, and when it counts from."""

    at: float
    amount: float


class Limit:
    """At most `most` in any minute; 0 is no limit."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._window: deque[Taken] = deque()
        self._total = 0.0

    def take(self, amount: float, now: float) -> Taken:
        """Takes `amount` at the earliest moment from `now` on that has room, after all that was taken before.

        More than a whole minute's share is taken as a whole minute's.
        """
        if not self._most:
            return Taken(now, amount)
        amount, window = min(amount, self._most), self._window
        at = max(now, window[-1].at if window else now)
        while window and self._total + amount > self._most:  # what is older than a minute goes at no cost
            first = window.popleft()
            self._total -= first.amount
            at = max(at, first.at + MINUTE)
        window.append(Taken(at, amount))
        self._total += amount
        return window[-1]

    def correct(self, taken: Taken, amount: float) -> None:
        """What was taken turned out to be `amount`."""
        if self._most and self._window and taken.at >= self._window[0].at:  # else it has left the window
            self._total += amount - taken.amount
            taken.amount = amount


class Limits:
    """Both limits of a server, and the pause that it asked for. `clock` gives seconds."""

    def __init__(self, requests: int, tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests, self._tokens, self._clock = Limit(requests), Limit(tokens), clock
        self._held_until = 0.0
        self.waited = 0.0

    def take(self, tokens: float) -> tuple[float, Taken]:
        """(seconds to wait before the request may go, its tokens: for `used`)."""
        now = self._clock()
        request = self._requests.take(1, now)
        taken = self._tokens.take(tokens, request.at)
        request.at = max(request.at, taken.at)
        self.waited += request.at - now
        return request.at - now, taken

    def used(self, taken: Taken, tokens: float) -> None:
        """How many tokens a request has cost, as its reply told."""
        self._tokens.correct(taken, tokens)

    def hold(self, seconds: float) -> None:
        """Nobody asks for so long: the server said so."""
        self._held_until = max(self._held_until, self._clock() + seconds)

    def held(self) -> float:
        """Seconds that are left of it."""
        return max(0.0, self._held_until - self._clock())
