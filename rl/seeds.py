"""Random streams that depend on names and counters, not on history.

A resumed run draws the same numbers as an uninterrupted one because the seed of a step is a function of the step.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive(seed: int, *parts: str | int) -> int:
    """A seed of 63 bits from the run's seed and what it is for, for example `derive(seed, "rollout", "phase1", 12)`."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """The generators that belong to nobody: what adapters start from, and whatever a reward function of the user's draws."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
