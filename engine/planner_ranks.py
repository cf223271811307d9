"""One rank of many, alone: torch's fake process group, in which every collective returns at once and moves nothing.

What a rank computes then depends on shapes alone, and a trace (`planner_tracer`) looks at nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def one_of(ranks: int, rank: int) -> Iterator[None]:
    """Within it this process is `rank` of so many; nothing changes where there is one.

    Raises:
        ValueError: it is a rank of a real group already.
    """
    assert 0 <= rank < ranks
    if ranks == 1:
        yield
        return
    if dist.is_initialized():
        raise ValueError("this process is one of several ranks: trace a step of others in a process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
