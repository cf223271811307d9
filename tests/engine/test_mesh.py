"""What a layout refuses before any process group is there; the meshes of running ones are tested with what runs on them."""

from __future__ import annotations

from typing import Any

import pytest

from longreach.engine import ParallelConfig


@pytest.mark.parametrize(
    "options, said",
    [
        ({"ring": 0}, "parallel.ring must be at least 1, not 0"),
        ({"ulysses": -1}, "parallel.ulysses must be at least 1"),
        ({"schedule": "zigzag"}, "'zigzag': it must be one of auto, ring, all-gather, ring-flash-attn"),
        ({"timeout_s": 0.0}, "parallel.timeout_s must be a positive number of seconds"),
    ],
)
def test_what_makes_no_layout_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ParallelConfig(**options)


def test_the_degree_of_sequence_parallelism() -> None:
    assert ParallelConfig(ring=4, ulysses=2).sp == 8
