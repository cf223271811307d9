"""The three-way rule as a fixture: per element, our error against fp64 may not exceed plain torch's in the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from longreach.kernels.checks.three_way import judge

ThreeWay = Callable[..., None]


def check(ours: Tensor, plain: Tensor, exact: Tensor, *, terms: float = 0.0) -> None:
    """Fail where the rule of `longreach.kernels.checks.three_way` does."""
    verdict = judge(ours, plain, exact, terms=terms)
    assert verdict.ok, verdict.message


@pytest.fixture
def three_way() -> ThreeWay:
    return check
