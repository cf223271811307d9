"""Start-up and end of a run on many ranks: torchrun starts the processes, torch's process groups carry the data.

    torchrun --nproc-per-node 8 -m longreach.rl.cli train RECIPE

A process that torchrun didn't start is alone, and everything here does nothing. The collectives of tensors on a GPU go
through NCCL, everything else (objects, flags, tests) through gloo. Whatever ends one rank ends all of them with one message
(`watchdog`): a rank's own error is what the user sees, and a rank that is gone or stuck is named with what it did last.
Give torchrun `--shutdown-timeout` seconds to finish a step and save it when it is interrupted; its own patience is 30.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store, get_node_local_rank
from torch.distributed.rendezvous import rendezvous

from .mesh import Mesh, ParallelConfig, make_mesh
from .watchdog import BEAT_S, Watchdog, lost

_STORE_TIMEOUT_S = 300.0
MARGIN_S = 10.0
"""Collectives wait so much longer than `parallel.timeout_s`, so that the watchdog names the rank before they give up."""


class Job:
    """This process among the ranks of one run: `with join() as job`. Alone it has rank 0 of 1."""

    def __init__(self, store: Store | None = None, rank: int = 0, size: int = 1) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.watchdog: Watchdog | None = None
        if store is not None:
            # a connection of its own: who waits for something on the other one keeps it busy
            self.watchdog = Watchdog(PrefixStore("longreach", store.clone()), rank, size, _STORE_TIMEOUT_S)  # pyright: ignore[reportAttributeAccessIssue]  (a stub lacks it)

    def __enter__(self) -> Job:
        if self.watchdog is not None:
            self.watchdog.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """An error that nobody caught may be the end of another rank's: that one is named then, else this one."""
        if self.watchdog is None:
            return
        if error is not None:
            self._lost_or_own(self.watchdog, error)
        self.watchdog.stop()
        if dist.is_initialized() and error is None:  # with an error, some may never come to agree
            dist.destroy_process_group()

    def connect(self, config: ParallelConfig, device: torch.device) -> Mesh | None:
        """Process groups and the mesh over all ranks, once all are there; None for a process that is alone.

        Raises:
            ValueError: the ranks can't be shared out as `config` says.
            OSError: not all ranks arrive within `config.timeout_s`.
        """
        if self.watchdog is None or self.store is None:
            if config.sp > 1:
                raise ValueError(
                    f"parallel.ring x parallel.ulysses = {config.ring} x {config.ulysses}, but this process is alone: start "
                    f"{config.sp} or a multiple of it with torchrun"
                )
            return None
        self.watchdog.timeout_s = config.timeout_s
        if not dist.is_initialized():
            self._await_all(self.watchdog, config.timeout_s)
            if device.type == "cuda":
                torch.cuda.set_device(get_node_local_rank(self.rank))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("collectives", self.store), rank=self.rank, world_size=self.size,
                timeout=timedelta(seconds=config.timeout_s + MARGIN_S),
            )  # fmt: skip
        mesh = make_mesh(config, device.type)
        world = dist.group.WORLD
        assert world is not None
        self.watchdog.groups = [world, mesh.data_group, mesh.sequence_group, mesh.all.get_group()]
        return mesh

    def note(self, operation: str, step: int | None = None) -> None:
        """Says what this rank does from now on, for the message that names it if it dies."""
        if self.watchdog is not None:
            self.watchdog.note(operation, step)

    def fail(self, text: str, status: int) -> bool:
        """Ends the other ranks; whether this one was the first to fail, so that it is the one to say why."""
        return self.watchdog is None or self.watchdog.fail(text, status)

    def _await_all(self, watchdog: Watchdog, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while missing := watchdog.missing():
            if time.monotonic() > until:
                raise OSError(
                    f"{self.size - len(missing)} of {self.size} ranks have started; not within parallel.timeout_s = {timeout_s:g} s: "
                    f"{', '.join(map(str, missing))}"
                )
            time.sleep(BEAT_S / 5)

    def _lost_or_own(self, watchdog: Watchdog, error: BaseException) -> None:
        try:
            found = watchdog.look_around() if isinstance(error, RuntimeError) else None
            if found is not None:
                watchdog.end(found)
            watchdog.fail(f"rank {self.rank} failed in {watchdog.doing}: {type(error).__name__}: {error}", 1)
        except RuntimeError as gone:  # of the store
            print(f"longreach: {lost(self.rank, gone)}", file=sys.stderr, flush=True)


def join() -> Job:
    """The run that torchrun started this process for, or a job of one.

    Raises:
        OSError: there is no one to meet, or some never come.
    """
    if not dist.is_torchelastic_launched():
        return Job()
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=_STORE_TIMEOUT_S))))
        return Job(store, rank, size)
    except DistError as error:
        raise OSError(f"not all ranks have started: {str(error).splitlines()[0]}") from error
