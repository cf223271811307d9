"""Operations that a trace would not see: an operator that does nothing, but that a counting mode is told of."""

from __future__ import annotations

import torch

torch.library.define("longreach::spend", "(int flops, str kind) -> ()")


@torch.library.impl("longreach::spend", "CompositeExplicitAutograd")
def _spend(flops: int, kind: str) -> None:
    del flops, kind


def spend(flops: int, kind: str = "products") -> None:
    """Says that so many operations happen here, whose result never reaches memory; `kind`: of what."""
    torch.ops.longreach.spend(flops, kind)
