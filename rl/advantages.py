"""Group-relative advantages: A = (r - mean of the group) / (std + 1e-4).

The mean is always the group's; `scale` says over what the standard deviation is taken: "group" (GRPO, arXiv 2402.03300),
"task" (all completions of the same task in the batch: QwenLong-L1.5, arXiv 2512.12967), "batch", or "none" (Dr. GRPO,
arXiv 2503.20783). A completion without a verdict (None) enters no mean and no deviation and has no advantage.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Rewards = Sequence[float | None]
SCALES = ("group", "task", "batch", "none")
_EPSILON = 1e-4  # TRL's


def group_advantages(
    rewards: Sequence[Rewards], tasks: Sequence[str], scale: str = "group"
) -> list[list[float | None]]:
    """Advantages in the shape of `rewards` (groups x completions); `tasks` names the task of each group."""
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    keys: list[object] = [{"group": index, "task": task}.get(scale, 0) for index, task in enumerate(tasks)]
    spread = {
        key: _deviation([r for k, group in zip(keys, rewards, strict=True) if k == key for r in group])
        for key in set(keys)
    }
    result: list[list[float | None]] = []
    for key, group in zip(keys, rewards, strict=True):
        known = [r for r in group if r is not None]
        mean = statistics.mean(known) if known else 0.0  # exact: equal rewards give advantages of exactly 0
        divisor = 1.0 if scale == "none" else spread[key] + _EPSILON
        result.append([None if r is None else (r - mean) / divisor for r in group])
    return result


def reward_spread(rewards: Rewards) -> float:
    """Unbiased standard deviation of the known rewards, 0 for fewer than two."""
    return _deviation(rewards)


def _deviation(rewards: Rewards) -> float:
    known = [r for r in rewards if r is not None]
    return statistics.stdev(known) if len(known) > 1 else 0.0


def overlong_penalty(length: int, *, limit: int, buffer: int) -> float:
    """DAPO's soft length penalty (arXiv 2503.14476, eq. 13): 0 up to limit - buffer, then linear down to -1 at the limit."""
    if not buffer or length <= limit - buffer:
        return 0.0
    return max(-1.0, (limit - buffer - length) / buffer)
