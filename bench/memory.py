"""Peak memory of a region, beyond what was alive before it.

CUDA: `max_memory_allocated` of torch's allocator. CPU: every allocation and release that torch's CPU allocator reports
to the profiler, summed in the order of time; exact and repeatable, but blind to scratch that a library takes for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

COUNTED = {"cpu": "torch CPU allocations", "cuda": "torch.cuda.max_memory_allocated"}


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most that was allocated at once during `run()`, results included, inputs not."""
    return _cuda_peak(run) if device == "cuda" else _cpu_peak(run)


def _cuda_peak(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def _cpu_peak(run: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    recorded: list[Any] = profiler.profiler.kineto_results.events()  # torch's stubs lack `nbytes`
    events = [event for event in recorded if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def tensor_bytes(found: Any) -> int:
    """Bytes of all tensors in a nest of tuples and lists; each storage counts once."""
    sizes: dict[int, int] = {}
    pending = [found]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, tuple | list):
            pending.extend(item)
    return sum(sizes.values())
