"""Gluon kernels on a CPU: their own source, run by a machine of threads, barriers, copies and products in flight.

Triton's interpreter knows no Gluon. What a kernel of ours uses of it is little, and is done here on torch tensors: the
functions of `gluon.jit` are taken as the Python that they are, with other modules behind the names gl, tma, mbarrier and
so on. Each partition of `gl.warp_specialize` is a thread, and one runs at a time: a `Schedule` says which, when a copy
arrives, and whether a product reads its operands when it is issued or when it is waited for. So are found, beside wrong
numbers: a deadlock, a barrier that is passed a phase too early, a slot that is filled while it is read, a result that is
used before it is there, a store that a product could miss for want of a fence, copies or products that nobody waits for.

It shows neither layouts nor what a compiler makes of the source (see `compilation`), nor speed. Memory is consistent
here; on a GPU the barriers make it so. Integers are 32-bit where a GPU's are, but for loop counters.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .gluon_language import Broken, InFlight, Pointer, Shared, language


@dataclass(frozen=True)
class Schedule:
    """order: partitions, first choice first, each until it has to wait; none: at random, switching anywhere.
    copies: "early" arrives at once, "late" when nothing else can go on, "last" so too, the last issued first. products:
    "early" reads at issue, "late" at the wait, when all others have gone on. Either may be "random"."""

    order: tuple[int, ...] = ()
    copies: str = "random"
    products: str = "random"
    seed: int = 0


SCHEDULES = (
    Schedule((2, 0, 1), "early", "late"),
    Schedule((0, 1, 2), "late", "early"),
    Schedule((1, 2, 0), "last", "late"),
    Schedule(seed=1),
    Schedule(seed=2),
)


class _Stopped(BaseException):
    """Ends the threads of a program that is broken."""


@dataclass
class Barrier:
    """An mbarrier: a phase is over when as many have arrived as it counts and all announced bytes have."""

    count: int = 0
    waited: int = 0
    bytes: int = 0
    phase: int = 0

    def arrive(self, count: int = 1, announced: int = 0) -> None:
        self.waited -= count
        self.bytes += announced
        if self.waited < 0:
            raise Broken("more arrivals at a barrier than its phase counts")
        self._turn()

    def receive(self, size: int) -> None:
        self.bytes -= size
        self._turn()

    def passed(self, parity: int) -> bool:
        return self.phase & 1 != parity

    def _turn(self) -> None:
        if self.waited == 0 and self.bytes == 0:
            self.phase += 1
            self.waited = self.count


@dataclass
class Partition:
    """One thread, stopped unless it is its turn."""

    number: int
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ready: Callable[[], bool] = lambda: True
    slow: bool = False
    done: bool = False
    error: BaseException | None = None
    products: list[InFlight] = field(default_factory=list)
    unfenced: list[Tensor] = field(default_factory=list)


class Machine:
    """One program at a time."""

    def __init__(self, schedule: Schedule, program: int) -> None:
        self.schedule, self.program = schedule, program
        self.random = random.Random(schedule.seed * 7919 + program)
        self.copies: list[Callable[[], None]] = []
        self.back = threading.Semaphore(0)
        self.stopping = False
        self.alone = Partition(-1)
        self.current = self.alone
        self.bound: dict[int, Any] = {}
        self.names = language(self)

    def bind(self, kernel: Any) -> Any:
        """A function of gluon.jit as one of Python, its Gluon replaced by this machine."""
        if id(kernel) not in self.bound:
            function, scope = kernel.fn, {}
            self.bound[id(kernel)] = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
            scope.update({name: self._translate(value) for name, value in function.__globals__.items()})
        return self.bound[id(kernel)]

    def _translate(self, value: Any) -> Any:
        if id(value) in self.names:
            return self.names[id(value)]
        if hasattr(value, "is_gluon"):
            return self.bind(value)
        return value.value if type(value).__name__ == "constexpr" else value

    def specialize(self, parts: list[tuple[Any, tuple[Any, ...]]]) -> None:
        """gl.warp_specialize"""
        partitions = [Partition(i) for i in range(len(parts))]
        threads = [
            threading.Thread(target=self._live, args=(p, *part), daemon=True)
            for p, part in zip(partitions, parts, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            while not all(p.done for p in partitions):
                self._step(partitions)
        finally:
            self.stopping = True
            for p in partitions:
                p.go.release()
            for thread in threads:
                thread.join()
            self.current = self.alone
        if self.copies or any(p.products for p in partitions):
            raise Broken("copies or products are in flight when the program ends")

    def _step(self, partitions: list[Partition]) -> None:
        able = [p for p in partitions if not p.done and p.ready()]
        how = self.schedule.copies
        if self.copies and (not able or how == "early" or (how == "random" and self.random.random() < 0.3)):
            # a later copy may overtake an earlier one
            which = self.random.randrange(len(self.copies)) if how == "random" else -1 if how == "last" else 0
            self.copies.pop(which)()
            return
        if not able:
            raise Broken(f"deadlock of partitions {', '.join(str(p.number) for p in partitions if not p.done)}")
        able = [p for p in able if not p.slow] or able
        order = self.schedule.order
        self.current = min(able, key=lambda p: order.index(p.number)) if order else self.random.choice(able)
        self.current.go.release()
        self.back.acquire()
        if self.current.error is not None:
            raise self.current.error

    def _live(self, partition: Partition, kernel: Any, args: tuple[Any, ...]) -> None:
        partition.go.acquire()
        try:
            if not self.stopping:
                kernel(*args)
        except _Stopped:
            pass
        except Exception as error:  # raised again in the scheduler's thread
            partition.error = error
        partition.done = True
        self.back.release()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Goes on when it is this partition's turn and `ready`."""
        if self.current is self.alone:
            raise Broken("a wait outside of gl.warp_specialize")
        mine = self.current
        mine.ready = ready
        self.back.release()
        mine.go.acquire()
        if self.stopping:
            raise _Stopped

    def pause(self) -> None:
        """Another partition may be faster here."""
        if not self.schedule.order and self.current is not self.alone and self.random.random() < 0.5:
            self.wait(lambda: True)

    def multiply(self, a: Any, b: Shared, acc: Tensor, use_acc: bool) -> InFlight:
        mine = self.current
        for x in (a, b):
            if isinstance(x, Shared) and any(x.overlaps(y) for y in mine.unfenced):
                raise Broken("a product reads what was stored without a fence_async_shared in between")
        if isinstance(acc, InFlight) or isinstance(a, InFlight):
            raise Broken("a product takes a result that is in flight")
        made = InFlight(a, b, acc if use_acc else torch.zeros_like(acc))
        mine.products.append(made)
        how = self.schedule.products
        if how == "early" or (how == "random" and self.random.random() < 0.5):
            made.finish()
        self.pause()
        return made

    def finish(self, outstanding: int, deps: list[Any]) -> Any:
        """warpgroup_mma_wait"""
        mine, how = self.current, self.schedule.products
        if how == "late" or (how == "random" and self.random.random() < 0.5):
            # all others go on as far as they can while the products read
            mine.slow = True
            self.wait(lambda: True)
            mine.slow = False
        while len(mine.products) > outstanding:
            mine.products.pop(0).finish()
        if any(dep in mine.products for dep in deps if isinstance(dep, InFlight)):
            raise Broken("a result is taken while its product is in flight")
        found = tuple(dep.value if isinstance(dep, InFlight) else dep for dep in deps)
        self.pause()
        return found[0] if len(found) == 1 else found


def simulate(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *, schedule: Schedule = SCHEDULES[3], **arguments: Any
) -> None:
    """Runs every program of a launch, one after the other; takes what `gpu.launch` takes."""
    assert device.type == "cpu", device
    values = {name: _argument(x) for name, x in arguments.items() if name != "num_warps"}
    for program in range(grid[0]):
        Machine(schedule, program).bind(kernel)(**values)


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return Pointer(value.view(-1), torch.zeros((), dtype=torch.int64))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _descriptor(value) if hasattr(value, "block_shape") else value
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int32)


def _descriptor(described: Any) -> SimpleNamespace:
    base = described.base
    size = described.block_shape[0] * described.block_shape[1] * base.element_size()
    return SimpleNamespace(
        base=base, block_shape=described.block_shape, dtype=base.dtype, layout=None,
        block_type=SimpleNamespace(nbytes=size),
    )  # fmt: skip
