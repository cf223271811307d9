"""Who is missing: each rank says what it does, and the run ends on all of them when one is dead or stuck.

Without it a dead rank shows as a collective that never ends on all others, and no message says whom they wait for. Every
rank writes a beat into the launcher's store, with its operation, its step and how many collectives it has begun:

    silent   the beat stopped: the process is dead (or its node is)
    stuck    others have begun a collective that this rank hasn't, and have waited for it for the whole timeout
    failed   the rank said so itself, and why

The first to notice writes a verdict; every rank's watchdog thread reads it and ends its process, whatever the main thread is
in. A launcher's SIGTERM (torchrun sends one as soon as a process of its node dies) is answered by the same look around, so
that the dead rank is named before all are gone. Rank 0 looks after all, the others after rank 0: 2 store calls a beat each.
It gives up on ranks that are all in the same collective: the process group's own timeout ends those.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any

from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Store

BEAT_S = 0.5
SILENT_BEATS = 6
"""Beats that a rank may miss while somebody looks around after a failure; a busy main thread delays its watchdog."""
_VERDICT = "verdict"


@dataclass(frozen=True)
class Beat:
    """What a rank is doing. `count` grows with each beat; `collectives` counts those it has begun."""

    count: int = 0
    operation: str = "starting"
    step: int | None = None
    collectives: int = 0
    gone: bool = False

    @property
    def progress(self) -> tuple[str, int | None, int]:
        return self.operation, self.step, self.collectives

    def __str__(self) -> str:
        return self.operation if self.step is None else f"{self.operation} of step {self.step}"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends, who found out, and the exit status."""

    text: str
    status: int
    by: int


@dataclass
class _Seen:
    """A rank's last beat, and since when (on this rank's clock) it beats and does the same."""

    beat: Beat
    beaten: float
    moved: float


class Watchdog:
    """This rank's beat, and its eye on the others. `groups` are the process groups whose collectives are counted."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self.store, self.rank, self.size, self.timeout_s = store, rank, size, timeout_s
        self.groups: list[ProcessGroup] = []
        self._beat = Beat()
        self._seen: dict[int, _Seen] = {}
        self._heard: set[int] = set()
        self._lock, self._ending = threading.Lock(), threading.Lock()
        self._ear, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        self._stopping = self._failing = self._terminated = False
        self._before: tuple[Any, int] | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._say()

    def start(self) -> None:
        """Begins to watch; from here on SIGTERM is the watchdog's, even while the main thread waits in a collective."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, _nothing), signal.set_wakeup_fd(self._bell)
        self._thread.start()

    def stop(self) -> None:
        """Leaves the others: from here on this rank's silence means nothing."""
        self._stopping = True
        os.write(self._bell, b"\0")
        self._thread.join()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before[0])
            signal.set_wakeup_fd(self._before[1])
        self._say(gone=True)

    def note(self, operation: str, step: int | None = None) -> None:
        """What this rank does from now on."""
        self._say(operation=operation, step=step)

    @property
    def doing(self) -> str:
        return str(self._beat)

    def missing(self) -> list[int]:
        """Ranks that have never been heard of."""
        self._heard |= {r for r in range(self.size) if r not in self._heard and self.store.check([f"beat/{r}"])}
        return [rank for rank in range(self.size) if rank not in self._heard]

    def fail(self, text: str, status: int) -> bool:
        """Ends the other ranks, not this one; whether this rank was the first to fail and is to say why."""
        self._failing = True
        first = self._judge(text, status).by == self.rank
        if first:
            self._linger()
        return first

    def look_around(self) -> Verdict | None:
        """What became of the others, after a failure that may be theirs: their own words, or who is silent."""
        first, until = self._read(range(self.size)), time.monotonic() + SILENT_BEATS * BEAT_S
        while time.monotonic() < until:
            if (found := self._verdict()) is not None:
                return found
            time.sleep(BEAT_S / 5)
        last = self._read(range(self.size))
        silent = [r for r in last if r != self.rank and not last[r].gone and last[r].count == first[r].count]
        return self._judge(self._dead(silent, last), 1) if silent else None

    def end(self, verdict: Verdict) -> None:
        """Ends this process, whatever its main thread is in; the rank that found out says why."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread is at it
        if verdict.by == self.rank:
            print(f"longreach: {verdict.text}", file=sys.stderr, flush=True)
        try:
            self.store.add("ended", 1)
            self._linger()
        finally:
            sys.stdout.flush()
            os._exit(verdict.status)

    def _linger(self) -> None:
        """Until the others have read the verdict: the store may live in this process. The dead among them never do."""
        until = time.monotonic() + SILENT_BEATS * BEAT_S
        while self.rank == 0 and time.monotonic() < until and self.store.add("ended", 0) < self.size:
            time.sleep(BEAT_S / 5)

    def _judge(self, text: str, status: int) -> Verdict:
        """The verdict that counts: the first one."""
        mine = json.dumps(asdict(Verdict(text, status, self.rank)))
        return Verdict(**json.loads(self.store.compare_set(_VERDICT, "", mine)))

    def _verdict(self) -> Verdict | None:
        return Verdict(**json.loads(self.store.get(_VERDICT))) if self.store.check([_VERDICT]) else None

    def _say(self, **changes: Any) -> None:
        with self._lock:
            begun = sum(map(_begun, self.groups))
            self._beat = replace(self._beat, count=self._beat.count + 1, collectives=begun, **changes)
            self.store.set(f"beat/{self.rank}", json.dumps(asdict(self._beat)))

    def _watch(self) -> None:
        try:
            while not self._stopping:
                if select.select([self._ear], [], [], BEAT_S)[0]:
                    self._terminated |= signal.SIGTERM in os.read(self._ear, 64)
                if not (self._stopping or self._failing):
                    self._round()
        except RuntimeError as error:  # of the store: torch's errors are RuntimeErrors
            if not (self._stopping or self._failing):
                self.end(Verdict(lost(self.rank, error), 1, self.rank))

    def _round(self) -> None:
        self._say()
        found = self._verdict()
        if found is None and self._terminated:
            told = f"rank {self.rank} was told to end (SIGTERM) in {self._beat}"
            found = self.look_around() or self._judge(told, 128 + signal.SIGTERM)
        found = found or self._late()
        if found is not None and not self._failing:
            self.end(found)

    def _late(self) -> Verdict | None:
        """Who is silent or stuck for longer than the timeout, as this rank sees it."""
        now = time.monotonic()
        for rank, beat in self._read(range(self.size) if self.rank == 0 else [0]).items():
            seen = self._seen.setdefault(rank, _Seen(beat, now, now))
            if beat.count != seen.beat.count:
                moved = now if beat.progress != seen.beat.progress else seen.moved
                self._seen[rank] = _Seen(beat, now, moved)
        here = {rank: seen for rank, seen in self._seen.items() if not seen.beat.gone and rank != self.rank}
        beats = {rank: seen.beat for rank, seen in self._seen.items()}
        silent = [rank for rank, seen in here.items() if now - seen.beaten > self.timeout_s]
        if silent:
            return self._judge(self._dead(silent, beats), 1)
        stuck = self._stuck(now)
        return self._judge(self._late_text(stuck, beats, now), 1) if stuck else None

    def _stuck(self, now: float) -> list[int]:
        """Ranks behind, while one that is ahead has waited for the whole timeout."""
        here = {rank: seen for rank, seen in self._seen.items() if not seen.beat.gone}
        least = min((seen.beat.collectives for seen in here.values()), default=0)
        behind = [rank for rank, seen in here.items() if seen.beat.collectives == least]
        waiting = [seen for seen in here.values() if seen.beat.collectives > least]
        long = [seen for seen in waiting if now - seen.moved > self.timeout_s]
        return behind if long and all(now - here[rank].moved > self.timeout_s for rank in behind) else []

    def _dead(self, silent: list[int], beats: dict[int, Beat]) -> str:
        last = "; ".join(f"rank {rank} in {beats[rank]}" for rank in silent)
        return (
            f"{_ranks(silent)} of {self.size} no longer {'answers' if len(silent) == 1 else 'answer'}: last seen {last}"
        )

    def _late_text(self, stuck: list[int], beats: dict[int, Beat], now: float) -> str:
        what = "; ".join(f"rank {r} in {beats[r]} for {now - self._seen[r].moved:.0f} s" for r in stuck)
        others = sorted({str(beat) for rank, beat in beats.items() if rank not in stuck})
        return (
            f"{_ranks(stuck)} of {self.size} kept the others waiting for more than parallel.timeout_s = {self.timeout_s:g} s: "
            f"{what} (the others in {', '.join(others)}); raise it if that is no hang"
        )

    def _read(self, ranks: Iterable[int]) -> dict[int, Beat]:
        ranks = [rank for rank in ranks if rank not in self.missing()]  # a read would wait for those
        raw = self.store.multi_get([f"beat/{rank}" for rank in ranks])
        return {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, raw, strict=True)}


def _begun(group: ProcessGroup) -> int:
    """Collectives that this process has begun in a group, on whatever devices it has."""
    raw: Any = group  # the stub lacks these
    return sum(raw._get_backend(device)._get_sequence_number_for_group() for device in raw._device_types)


def _nothing(_signal: int, _frame: FrameType | None) -> None:
    """The watchdog is woken by the signal itself; the main thread has nothing to do."""


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def lost(rank: int, error: Exception) -> str:
    """What a rank says when it can't reach the others any more."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"rank {rank} lost the launcher's store, so rank 0 or its node is gone ({first})"
