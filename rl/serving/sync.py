"""The policy's weights on the servers that sample from it, after every update; or the run stops and says why.

One push, whatever the way: see whose weights each server has; carry what can be carried while it still generates; stop it;
mark it "loading"; hand over; drop its prefix cache (vLLM keeps it, and would go on with old keys and values); mark it with the
new version; let it go on; compare a probe's log-probs with the trainer's; see that the mark is still ours. A server that
restarted has no mark and one that another run pushes to has that run's, so neither is ever sampled from unnoticed. Where the
new weights can only be probed by a server that generates, what other requests sample in that moment is thrown away with the run.

The subclasses carry: `sync_files` through a folder, `sync_lora` adapters, `sync_transfer` from GPU to GPU. On many ranks all of
them push; rank 0 talks to the servers, and what it fails with fails everywhere.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ..policy import Policy
from ..ranks import Ranks
from .checksums import Checksums, noted
from .control import FRESH, Control, Facts, Mark, StaleServer, SyncError
from .gate import Gate
from .probe import Difference, Gauge, Probe
from .sync_config import SyncConfig

T = TypeVar("T")


@dataclass(frozen=True)
class SyncReport:
    """What a push did. `differences`: of the probe, one for each server (none without a probe)."""

    version: int
    seconds: float
    bytes: int
    how: str
    differences: tuple[Difference, ...] = ()
    resolution: str = ""

    def metrics(self) -> dict[str, float]:
        made = {
            "sync/seconds": self.seconds,
            "sync/bytes": float(self.bytes),
            "sync/version": float(self.version),
        }
        if self.differences:
            made["sync/probe_max_diff"] = max(max(one.largest.values()) for one in self.differences)
            made["sync/probe_mean_diff"] = max(max(one.mean.values()) for one in self.differences)
        return made


class WeightSync(ABC):
    """Pushes one policy to all of `urls`, which serve it under the name `model`. `owner` names this run, to itself and to others."""

    how = ""

    def __init__(
        self, urls: Sequence[str], model: str, owner: str, config: SyncConfig, probe_ids: Sequence[int] = ()
    ) -> None:
        self.config, self.base_model, self.owner = config, model, owner
        self.urls = tuple(urls)
        self.control = Control(urls, config.deadline)
        self.gate = Gate(self.control, config)
        self.gauge = Gauge(config.probe_multiple, config.probe_limit)
        self.sums = Checksums(self.control)
        self.version: int | None = None
        self._probe_ids = tuple(probe_ids)
        self._probe: Probe | None = None
        self._known: dict[str, Facts] = {}
        self._summed = False
        self._handed: dict[str, str] = {}
        self._under_way: int | None = None

    @property
    def served_model(self) -> str:
        """What requests must name as their model, for the version pushed last."""
        return self.base_model

    def facts(self) -> list[Facts]:
        """Of each server that is asked at present, as they were when it was first asked, or had started again."""
        if not all(url in self._known for url in self.control.urls):
            self._known |= dict(zip(self.control.urls, self.control.facts(), strict=True))
        return [self._known[url] for url in self.control.urls]

    def push(self, policy: Policy, version: int, urls: Sequence[str] | None = None) -> SyncReport:
        """Brings the policy's weights to the servers as `version`; all ranks call it.

        Args:
            urls: those that lack it (None: all), such as one that started again. New ones belong to them from then on.

        Raises:
            SyncError, ServerError: the push did not take, or can't be shown to have; what the servers have is in the message.
            ValueError: server and settings don't fit.
        """
        assert version >= 0
        started, ranks = time.perf_counter(), policy.ranks
        self.urls = tuple(dict.fromkeys([*self.urls, *(urls or ())]))
        self.control.urls = self.urls if urls is None or self.config.sleep else tuple(urls)
        self._lead(ranks, lambda: self._begin(policy))
        size = self._prepare(policy, version)
        self._under_way = version
        self._lead(ranks, lambda: self._stop(version))
        try:
            size += self._transfer(policy, version)
            self._lead(ranks, lambda: self._go_on(version))
        except OSError as error:
            raise SyncError(
                f"version {version} did not arrive by {self.how}: {error}. {self._left_behind()}"
            ) from error
        differences = self._compare(policy, version)
        self.version, self._under_way = version, None
        self._lead(ranks, self.check)
        return SyncReport(version, time.perf_counter() - started, size, self.how, differences, self.gauge.resolution())

    def check(self) -> None:
        """Whether every server has the weights pushed last; cheap, for before and after a batch of completions. Rank 0 alone.

        Raises:
            StaleServer: one started again. SyncError: it has another run's, or none that arrived.
        """
        if self._under_way is not None:
            raise SyncError(
                f"version {self._under_way} was pushed and did not take: nothing can be sampled before one does"
            )
        if self.version is None:
            raise SyncError(
                "nothing was pushed yet: a server that starts from a file may not have the policy's weights"
            )
        self.gate.check()
        self.control.urls = self.urls
        due = Mark(self.owner, self.version)
        for url, text in zip(self.control.urls, self.control.marks(), strict=True):
            if text == FRESH:
                raise StaleServer(
                    f"{url} was started again and has the weights it starts with, not version {self.version}: push once more"
                )
            if text != str(due):
                raise SyncError(f"{url} was to have '{due}' and has '{text}': {_whose(text, self.owner)}")

    def sleep(self) -> None:
        """Gives the GPU that a server shares to the trainer, until the next push. Rank 0 alone."""
        self.check()
        self.gate.sleep()

    def close(self) -> None:
        """Lets another run have the servers. Rank 0 alone."""
        if self.version is not None:
            self.check()
            self.control.set_mark(Mark(self.owner, self.version, "left"))
            self.version = None

    @abstractmethod
    def _transfer(self, policy: Policy, version: int) -> int:
        """Hands over, while the servers stand still; all ranks call it. Bytes handed over."""

    def _prepare(self, policy: Policy, version: int) -> int:
        """What can be done while they generate; all ranks call it. Bytes."""
        return 0

    def _fit(self, policy: Policy, facts: Sequence[Facts]) -> None:
        """ValueError where servers weren't started for this way."""
        if self.config.sleep and not all(fact.can_sleep for fact in facts):
            raise ValueError("generator.sync.sleep needs servers that can: start them with --enable-sleep-mode")

    def _noted(self, pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What is handed over, on its way; summed up where the servers are to sum up too (rank 0 alone)."""
        self._handed = {}
        return noted(pairs, self._handed) if self._summed else pairs

    def _left_behind(self) -> str:
        return "The servers are left paused, and what weights they have now is not known."

    def _begin(self, policy: Policy) -> None:
        if not self.control.urls:
            raise ValueError("no server to push weights to: name one in generator.urls, or let one be started")
        for url, text in zip(self.control.urls, self.control.marks(), strict=True):
            mark = Mark.read(text)
            free = text == FRESH or (mark is not None and (mark.owner == self.owner or mark.word == "left"))
            if not free and not self.config.take_over:
                raise SyncError(
                    f"{url} has '{text}', and this is {self.owner}: {_whose(text, self.owner)}. If that run is over, restart "
                    "the server or set generator.sync.take_over = true"
                )
            if mark is None or mark.owner != self.owner:
                self._forget(url)
        self._fit(policy, self.facts())
        size = sum(p.numel() for p in policy.model.parameters()) * self.facts()[0].dtype.itemsize
        self._summed = size <= self.config.checksum_gb * 1e9
        if self.config.probe and self._probe is None:
            self._probe = Probe.build(policy, self.facts(), self._probe_ids)

    def _forget(self, url: str) -> None:
        """Nothing that was known of a server holds: it started again, or was another run's."""
        self._known.pop(url, None)
        self.sums.forget(url)

    def _stop(self, version: int) -> None:
        if self._probe is not None and self.gate.awake and self.version is not None:
            self._probe.touch(self.control, self.served_model)
        self.gate.close()
        if self.config.sleep == 2:  # their weights are gone by now
            for url in self.control.urls:
                self.sums.forget(url)
        if self._summed:
            self.sums.before()
        self.control.set_mark(Mark(self.owner, version, "loading"))

    def _go_on(self, version: int) -> None:
        if self._summed:
            self.sums.after(version, self._handed)
        self.control.set_mark(Mark(self.owner, version))
        self.gate.open()

    def _compare(self, policy: Policy, version: int) -> tuple[Difference, ...]:
        if not self.config.probe:
            return ()
        probe = policy.ranks.first(lambda: self._probe)
        assert probe is not None
        answers = self._lead(policy.ranks, lambda: probe.ask(self.control, self.served_model))
        differences = probe.compare(policy, answers)
        self._lead(policy.ranks, lambda: self.gauge.judge(self.control.urls, differences, version))
        return tuple(differences)

    def _lead(self, ranks: Ranks, work: Callable[[], T]) -> T:
        """Rank 0's work, whose result and whose OSError all ranks get."""
        return ranks.together(work, lambda: None)


def _whose(text: str, owner: str) -> str:
    """What a mark that is not the expected one means."""
    mark = Mark.read(text)
    if mark is None:
        return "someone else set that"
    if mark.owner != owner:
        return f"two runs push to one server, {owner} and {mark.owner}"
    return (
        "a push was cut off" if mark.word == "loading" else "this run was started twice, or is pushed from two places"
    )
