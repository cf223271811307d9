"""Curriculum-guided phased RL: each phase trains on prompts of one range of lengths, and inputs grow from phase to phase.

QwenLong-L1 (arXiv 2505.17667, eq. 9): phase k takes exactly the prompts with L_{k-1} < length <= L_k, L_0 = 0. Lengths are
measured in the policy's own tokens on the rendered prompt. What is longer than the last bound belongs to no phase and is
reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine import Sampling
from ..engine.optimizer import Schedule
from .prompts import Prompt


@dataclass(frozen=True)
class Phase:
    """One curriculum step: prompts with lower < tokens <= `upper`, where lower is the bound of the phase before.

    `max_completion` bounds the completions in tokens; `steps` counts RL steps.
    """

    upper: int
    max_completion: int
    steps: int
    learning_rate: float
    warmup_steps: int = 0
    schedule: str = "constant"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature == 0:
            raise ValueError("temperature = 0: greedy completions are all alike, a phase needs more than 0")
        if self.steps < 1 or self.upper < 1:
            raise ValueError(f"steps and upper must be at least 1, not {self.steps} and {self.upper}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps must lie in 0..steps = {self.steps}, not {self.warmup_steps}")
        self.sampling()  # both refuse what they can't do, here and not after hours of the phases before
        self.rates()

    def sampling(self) -> Sampling:
        return Sampling(self.max_completion, self.temperature, self.top_p, self.top_k)

    def rates(self) -> Schedule:
        return Schedule(self.learning_rate, self.warmup_steps, self.schedule)


def phase_name(index: int) -> str:
    """Phases are called phase1, phase2, ... in files, metrics and the report."""
    return f"phase{index + 1}"


def assign(lengths: Sequence[int], phases: Sequence[Phase]) -> tuple[list[list[int]], list[int]]:
    """Indices of the prompts of each phase, and of those above the last bound."""
    bounds = [0, *(phase.upper for phase in phases)]
    members = [[i for i, n in enumerate(lengths) if low < n <= high] for low, high in itertools.pairwise(bounds)]
    return members, [i for i, n in enumerate(lengths) if n > bounds[-1]]


def check_bounds(phases: Sequence[Phase]) -> None:
    """Raises ValueError unless the bounds grow."""
    for index, (before, after) in enumerate(itertools.pairwise(phases)):
        if after.upper <= before.upper:
            raise ValueError(
                f"phases.{index + 1}.upper = {after.upper} does not lie above phases.{index}.upper = {before.upper}: "
                "phases take growing ranges of lengths"
            )


def describe(prompts: Sequence[Prompt]) -> dict[str, float]:
    """Counts and lengths for the dry run: n, min, median, max in tokens, and how many were truncated."""
    lengths = sorted(len(p.ids) for p in prompts)
    if not lengths:
        return {"prompts": 0}
    return {
        "prompts": len(lengths),
        "min": lengths[0],
        "median": lengths[len(lengths) // 2],
        "max": lengths[-1],
        "truncated": sum(p.truncated_from is not None for p in prompts),
    }
