"""A phase's sampling while it trains, on all ranks: rank 0 has the thread that asks the servers (`ahead.py`), and all take.

What the thread uses is beside what trains: the same servers and judge, but its own place among the ranks (alone, so that it
waits for none of them) and a policy whose version stands still until weights are handed over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .ahead import Ahead, Sampled
from .console import Console
from .ranks import Ranks
from .rollouts import RolloutGroup
from .run import Span, Stopwatch

if TYPE_CHECKING:
    from .grpo import GrpoTrainer

_BEAT_S = 10.0
"""Ranks that wait hear from rank 0 at least so often: no collective lasts as long as a generation."""


@dataclass(frozen=True)
class Collected:
    """A step's rollouts, when what was done for them, where the prompt sampler stood after them, and what was late."""

    groups: list[RolloutGroup]
    seconds: dict[str, float]
    spans: list[Span]
    sampler: dict[str, Any]
    counts: dict[str, float]


class Overlap:
    """Of one phase; a block, whose end calls off what is still being sampled. All ranks make the same calls."""

    def __init__(
        self, trainer: GrpoTrainer, *, staleness: int, first: int, last: int, saved: Callable[[int], list[RolloutGroup]]
    ) -> None:
        self._trainer, self._ranks = trainer, trainer.policy.ranks
        self._ahead: Ahead[Collected] | None = None
        if not self._ranks.main:
            return
        self._beside = beside(trainer)
        self._saved = saved
        served = self._beside.policy.served
        assert served is not None, "the local generator is the policy that trains"
        self._ahead = Ahead(self._collect, staleness=staleness, first=first, last=last, cancel=served.call_off)

    def __enter__(self) -> Self:
        if self._ahead is not None:
            self._ahead.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ahead is not None:
            self._ahead.__exit__(kind, error, trace)

    def take(self, step: int) -> Sampled[Collected]:
        """The rollouts of `step`, which begins now. Raises what sampling them raised, on all ranks."""
        while not self._ranks.first(lambda: self._ahead is None or self._ahead.ready(step, _BEAT_S)):
            pass
        found, problem = self._ranks.first(lambda: self._taken(step))
        if problem is not None:
            raise problem
        assert found is not None
        return found

    def hand_over(self, version: int) -> None:
        """Between two steps' rollouts: the servers get the policy's weights, which are `version`."""
        with self.alone(version):
            served = self._trainer.policy.served
            assert served is not None
            served.refresh()
            if self._ahead is not None:
                self._beside.policy.version = self._trainer.policy.version

    @contextmanager
    def alone(self, version: int) -> Iterator[None]:
        """A block in which the thread samples nothing: hand-overs, and evaluations of weights that were handed over."""
        while not self._ranks.first(lambda: self._ahead is None or self._ahead.still(_BEAT_S)):
            pass
        with nullcontext() if self._ahead is None else self._ahead.boundary(version):
            yield

    def _taken(self, step: int) -> tuple[Sampled[Collected] | None, Exception | None]:
        assert self._ahead is not None
        try:
            return self._ahead.take(step), None
        except (
            ValueError,
            OSError,
        ) as error:  # a mistake of the user's, or servers that are gone: all ranks end with it
            return None, error

    def _collect(self, step: int, version: int) -> Collected:
        watch = Stopwatch()
        groups = self._beside.collect(step, watch, self._saved(step), version=version)
        beside = self._beside
        return Collected(groups, watch.seconds, watch.spans, beside.sampler.state(), beside.stragglers.counts)


def beside(trainer: GrpoTrainer) -> GrpoTrainer:
    """What collects for the trainer in a thread of rank 0; its prompt sampler goes ahead of the trainer's."""
    made, policy = copy.copy(trainer), copy.copy(trainer.policy)
    policy.ranks = Ranks()
    if policy.served is not None:
        policy.served = policy.served.beside(policy)
    made.policy, made.reward = policy, trainer.reward.alone()
    made.sampler, made.console = copy.deepcopy(trainer.sampler), Console(quiet=True)
    made.stragglers = copy.copy(trainer.stragglers)
    return made
