"""Rollouts of coming steps, sampled in a thread while this step trains: bounded, and exact about how old they are.

Version v of the policy is the one after v steps. Step n trains on rollouts that were sampled, whole, by one version, which
is at least n - 1 - staleness: sampling for step n begins no earlier, and weights are handed over between two steps'
rollouts, never within. So nothing has to be guessed per token, and nothing older than the bound exists that would have to
be thrown away (groups that a step left unfinished are another matter: `stragglers.py`). Waiting for that boundary costs
nothing in the long run: the slower of the two, sampling or training, sets the pace, and the other waits for it at the bound
anyhow.

Steps are sampled in order, by one thread: a step's prompts depend on what the step before gave back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar

T = TypeVar("T")


class Sampled(NamedTuple, Generic[T]):
    """What a step's sampling gave, and by which version of the policy."""

    made: T
    version: int


class Ahead(Generic[T]):
    """`collect(step, version)` is called in the thread, for `first` to `last`; the main thread takes what it gives in that order.

    As a block: leaving it calls `cancel`, which must make a `collect` under way end soon, and waits for the thread.
    """

    def __init__(
        self, collect: Callable[[int, int], T], *, staleness: int, first: int, last: int,
        cancel: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        assert staleness >= 1, "sampling ahead by nothing is sampling in the step itself"
        self._collect, self._cancel = collect, cancel
        self._staleness, self._last = staleness, last
        self._next = first
        self._version = first - 1
        self._under_way: dict[int, Future[Sampled[T]]] = {}
        self._free = threading.Condition()
        self._sampling = False
        self._wanted = self._closed = False

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._free:
            self._closed = True
            self._free.notify_all()
        self._cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def ready(self, step: int, seconds: float) -> bool:
        """Begins `step` and the steps that may follow it; whether its rollouts are there, after `seconds` at the latest."""
        while self._next <= min(step + self._staleness, self._last):
            self._under_way[self._next] = self._thread.submit(self._one, self._next)
            self._next += 1
        return bool(wait([self._under_way[step]], seconds).done)

    def take(self, step: int) -> Sampled[T]:
        """The rollouts of `step`, which begins now. Raises what `collect` raised."""
        self.ready(step, 0.0)
        found = self._under_way.pop(step).result()
        assert 0 <= step - 1 - found.version <= self._staleness, (step, found.version)
        return found

    def still(self, seconds: float) -> bool:
        """Lets no further step begin until a `boundary` has been; whether nothing is sampled, after `seconds` at the latest."""
        with self._free:
            self._wanted = True
            return self._free.wait_for(lambda: not self._sampling, seconds)

    @contextmanager
    def boundary(self, version: int) -> Iterator[None]:
        """A block in which nothing is being sampled; what is sampled after it is sampled by `version`.

        Weights are handed over in it, and evaluations run in it.
        """
        while not self.still(60.0):
            pass
        try:
            yield
            self._version = version
        finally:
            with self._free:
                self._wanted = False
                self._free.notify_all()

    def _one(self, step: int) -> Sampled[T]:
        with self._free:
            self._free.wait_for(lambda: not self._wanted or self._closed)
            if self._closed:
                raise RuntimeError(f"sampling for step {step} was called off")
            self._sampling = True
            version = self._version
        try:
            return Sampled(self._collect(step, version), version)
        finally:
            with self._free:
                self._sampling = False
                self._free.notify_all()
