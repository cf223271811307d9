"""Operations that a trace would not see: an operator that does nothing, but that a counting mode is told of."""

from __future__ import annotations

import torch

torch.library.define("longreach::spend", "(int flops) -> ()")


@torch.library.impl("longreach::spend", "CompositeExplicitAutograd")
def _spend(flops: int) -> None:
    del flops


def spend(flops: int) -> None:
    """Says that so many operations happen here, whose result never reaches memory."""
    torch.ops.longreach.spend(flops)
