"""The three-way rule: per element, our error against fp64 may not exceed plain torch's own in the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

ULPS = 8
"""Two right evaluations of one sum, in different orders, differ by a few roundings of its largest terms; those are of
the size of the tensor's largest entries. A result that is zeroed, sign-flipped, doubled or short of a term is off by
the entries themselves: 1/ULPS of an epsilon's inverse away (the mutants in test_three_way.py)."""

ULPS_FP64 = 64
"""In fp64 plain torch is the exact side itself and lends no error of its own: room for sums of some hundred terms."""

ThreeWay = Callable[..., None]


def check(ours: Tensor, plain: Tensor, exact: Tensor, *, terms: float = 0.0) -> None:
    """Fail where |ours - exact| > |plain - exact| + ULPS eps max(max |exact|, terms), eps that of plain's dtype.

    `terms` is the size of the summands where they may cancel to less than themselves.
    """
    assert exact.dtype == torch.float64
    assert ours.shape == plain.shape == exact.shape
    assert torch.isfinite(ours).all()
    if exact.numel() == 0:
        return
    ours, plain, exact, eps = ours.detach(), plain.detach(), exact.detach(), torch.finfo(plain.dtype).eps
    ulps = ULPS_FP64 if plain.dtype == torch.float64 else ULPS
    allowed = (plain.double() - exact).abs() + ulps * eps * max(float(exact.abs().max()), terms)
    excess = (ours.double() - exact).abs() - allowed
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"element {worst}: ours {ours.flatten()[worst]:.8g}, plain torch {plain.flatten()[worst]:.8g}, "
        f"fp64 {exact.flatten()[worst]:.8g}, allowed error {allowed.flatten()[worst]:.3g}"
    )


@pytest.fixture
def three_way() -> ThreeWay:
    return check
