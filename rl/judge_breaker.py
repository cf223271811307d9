"""A circuit breaker: after failures in a row nobody asks for a while, then one request tries for all.

closed -> (failures in a row) -> open -> (pause) -> half-open: one probe -> closed, or open again. It holds no lock and no
event loop: one thread at a time uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

CLOSED, HALF_OPEN, OPEN = 0.0, 0.5, 1.0
_WHILE_PROBED = 0.05
"""Seconds between looks at a probe that is under way."""


class Breaker:
    """Of one server. `clock` gives seconds."""

    def __init__(self, failures: int, pause: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = CLOSED
        self.opened = 0
        self._failures, self._pause, self._clock = failures, pause, clock
        self._in_a_row = 0
        self._since = self._until = 0.0

    def claim(self) -> float:
        """0: ask now, and report how it went. Else: seconds after which to claim again."""
        if self.state == OPEN and self._clock() >= self._until:
            self.state = HALF_OPEN
            return 0.0
        if self.state == CLOSED:
            return 0.0
        return max(_WHILE_PROBED, self._until - self._clock()) if self.state == OPEN else _WHILE_PROBED

    def outage(self) -> float:
        """Seconds since the breaker first opened without a success after it; 0 while it is closed."""
        return 0.0 if self.state == CLOSED else self._clock() - self._since

    def succeeded(self) -> None:
        self.state, self._in_a_row = CLOSED, 0

    def failed(self) -> None:
        """What fails while the breaker is open was under way before, and is no news."""
        self._in_a_row += 1
        if self.state == HALF_OPEN or (self.state == CLOSED and self._in_a_row >= self._failures):
            self._since = self._clock() if self.state == CLOSED else self._since
            self.state, self._until = OPEN, self._clock() + self._pause
            self.opened += 1

    def abandoned(self) -> None:
        """A claimed request was called off: if it was the probe, another one may try at once."""
        if self.state == HALF_OPEN:
            self.state, self._until = OPEN, self._clock()
