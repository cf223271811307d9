"""The autocast that a forward ran under, for a backward that computes parts of it again.

A backward runs outside its caller's `torch.autocast`, so whoever recomputes must bring it along.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """A caller's autocast.

    Without its cache of rounded weights: in older PyTorch, what a pass without gradients leaves there cuts the gradient
    of later ones off.
    """

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device: str) -> Precision:
        """Of the caller, on a type of device ("cpu", "cuda", or "meta", which has none)."""
        if not torch.amp.is_autocast_available(device):
            return cls(device, False, torch.float32)
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def __call__(self) -> AbstractContextManager[object]:
        if not torch.amp.is_autocast_available(self.device):
            return nullcontext()
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)
