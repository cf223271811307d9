"""Difficulty-aware retrospective sampling: hard prompts of a phase are carried into the next one.

QwenLong-L1 (arXiv 2505.17667, eq. 10): difficulty = 1 / mean reward of a prompt's G completions. The paper's equation draws
prompts in proportion to it; the paper's experiment keeps those with mean reward 0, for which the equation is infinite. Both
are here: `threshold` keeps every prompt with mean reward <= `threshold`; `weighted` draws `size` prompts without
replacement, with a mean of 0 counted as half of one success in the samples taken, so difficulty is at most 2 G.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .rollouts import RolloutGroup
from .seeds import derive

SOURCES = ("fresh", "records")
SELECTIONS = ("threshold", "weighted")


@dataclass(frozen=True)
class RetrospectiveConfig:
    """`source` "fresh" samples `samples` completions of each prompt with the next phase's limits; "records" takes the rewards that the phase itself saw."""

    source: str = "fresh"
    selection: str = "threshold"
    threshold: float = 0.0
    size: int = 0
    samples: int = 8

    def __post_init__(self) -> None:
        if self.source not in SOURCES or self.selection not in SELECTIONS:
            raise ValueError(
                f"retrospective.source must be one of {', '.join(SOURCES)} and retrospective.selection one of "
                f"{', '.join(SELECTIONS)}, not {self.source!r} and {self.selection!r}"
            )
        if (self.selection == "weighted") != (self.size > 0):
            raise ValueError(
                f"retrospective.size = {self.size} with selection = {self.selection!r}: `weighted` draws a given number of prompts "
                "(size > 0), `threshold` takes all that are hard (size = 0)"
            )
        if self.samples < 1:
            raise ValueError(f"retrospective.samples must be at least 1, not {self.samples}")


@dataclass(frozen=True)
class PoolEntry:
    """A prompt's difficulty and whether it is carried on. `mean_reward` None: no verdict on any of its completions."""

    prompt_id: str
    benchmark: str
    prompt_length: int
    mean_reward: float | None
    difficulty: float | None
    samples: int
    selected: bool = False
    why: str = ""

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def difficulty(mean_reward: float, samples: int) -> float:
    """1 / mean reward, with a mean below half a success in `samples` counted as that half."""
    return 1.0 / max(mean_reward, 0.5 / samples)


def score(groups: Sequence[RolloutGroup]) -> list[PoolEntry]:
    """One entry for each prompt, in order of first appearance; a prompt met several times is judged on all its completions."""
    known: dict[str, list[float]] = {}
    first: dict[str, RolloutGroup] = {}
    for group in groups:
        name = group.prompt.example.id
        first.setdefault(name, group)
        known.setdefault(name, []).extend(r for r in group.rewards if r is not None)
    entries = []
    for name, rewards in known.items():
        prompt = first[name].prompt
        mean = math.fsum(rewards) / len(rewards) if rewards else None
        hard = None if mean is None else difficulty(mean, len(rewards))
        entries.append(PoolEntry(name, prompt.example.benchmark, len(prompt.ids), mean, hard, len(rewards)))
    return entries


def select(entries: Sequence[PoolEntry], config: RetrospectiveConfig, seed: int) -> list[PoolEntry]:
    """The entries with `selected` and `why` filled in."""
    if config.selection == "threshold":
        return [_by_threshold(entry, config.threshold) for entry in entries]
    draw = random.Random(derive(seed, "retrospective"))
    keys = {e.prompt_id: draw.random() ** (1.0 / e.difficulty) for e in entries if e.difficulty is not None}
    chosen = set(heapq.nlargest(config.size, keys, key=lambda name: keys[name]))  # Efraimidis and Spirakis 2006
    return [_by_draw(entry, entry.prompt_id in chosen) for entry in entries]


def _by_threshold(entry: PoolEntry, threshold: float) -> PoolEntry:
    if entry.mean_reward is None:
        return replace(entry, why="no verdict on any completion")
    hard = entry.mean_reward <= threshold
    return replace(
        entry, selected=hard, why=f"mean reward {entry.mean_reward:.3f} {'<=' if hard else '>'} {threshold:g}"
    )


def _by_draw(entry: PoolEntry, chosen: bool) -> PoolEntry:
    if entry.difficulty is None:
        return replace(entry, why="no verdict on any completion")
    return replace(
        entry, selected=chosen, why=f"{'drawn' if chosen else 'not drawn'} with weight {entry.difficulty:.2f}"
    )
