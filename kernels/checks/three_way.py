"""The three-way rule: per element, our error against fp64 may not exceed plain torch's own in the same dtype.

    |ours - exact| <= |plain - exact| + ULPS eps max(max |exact|, terms)        eps: that of plain's dtype

It tells a wrong kernel from rounding without a tolerance chosen by hand (after cut-cross-entropy's tests).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ULPS = 8
"""Two right evaluations of one sum, in different orders, differ by a few roundings of its largest terms; those are of
the size of the tensor's largest entries. A result that is zeroed, sign-flipped, doubled or short of a term is off by
the entries themselves: 1/ULPS of an epsilon's inverse away."""

ULPS_FP64 = 64
"""In fp64 plain torch is the exact side itself and lends no error of its own: room for sums of some hundred terms."""


class Verdict(NamedTuple):
    """share: the largest part of its allowed error that an element uses, 1 being all of it."""

    ok: bool
    share: float
    message: str


def judge(ours: Tensor, plain: Tensor, exact: Tensor, *, terms: float = 0.0) -> Verdict:
    """Compares three tensors of one shape, `exact` in fp64. A value of ours that isn't finite fails.

    terms: the size of the summands, where they may cancel to less than themselves.
    """
    assert exact.dtype == torch.float64
    assert ours.shape == plain.shape == exact.shape
    if exact.numel() == 0:
        return Verdict(True, 0.0, "empty")
    ours, plain, exact = ours.detach().flatten(), plain.detach().flatten(), exact.detach().flatten()
    finite = torch.isfinite(ours)
    if not finite.all():
        lost = int((~finite).nonzero()[0])
        return Verdict(False, float("inf"), f"element {lost} is {ours[lost].item()}, fp64 {exact[lost].item():.8g}")
    ulps = ULPS_FP64 if plain.dtype == torch.float64 else ULPS
    room = ulps * torch.finfo(plain.dtype).eps * max(float(exact.abs().max()), terms)
    allowed = (plain.double() - exact).abs() + room
    error = (ours.double() - exact).abs()
    worst = int((error - allowed).argmax())
    share = torch.where(error == 0, 0.0, error / allowed).max().item()
    message = (
        f"element {worst}: ours {ours[worst].item():.8g}, plain torch {plain[worst].item():.8g}, "
        f"fp64 {exact[worst].item():.8g}, allowed error {allowed[worst].item():.3g}"
    )
    return Verdict(bool(error[worst] <= allowed[worst]), share, message)
