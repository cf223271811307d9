"""Needle tests by task and by depth, with RULER's own score beside ours (`needles.py`: the share of the values named)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..seeds import derive
from .bootstrap import intervals
from .scores import Scored
from .settings import EvaluationConfig

QUARTERS = (0.25, 0.5, 0.75, 1.0)


def summarize_needles(scored: Sequence[Scored], config: EvaluationConfig) -> list[dict[str, Any]]:
    """A row a benchmark and task or quarter of depth; nothing where no needle test was asked.

    Tasks without a depth (their words are everywhere) are in no quarter.
    """
    parts: dict[tuple[str, str, str], list[Scored]] = {}
    for one in scored:
        columns = one.question.example.columns
        if not one.question.is_needle:
            continue
        parts.setdefault((one.question.benchmark, "task", str(columns["task"])), []).append(one)
        depth = columns.get("depth")
        if depth is not None:
            upper = next(quarter for quarter in QUARTERS if depth <= quarter)
            parts.setdefault(
                (one.question.benchmark, "depth", f"{100 * (upper - 0.25):.0f}–{100 * upper:.0f} %"), []
            ).append(one)
    made = []
    for key in sorted(parts, key=lambda key: (key[0], key[1] == "depth", key[2].zfill(9))):
        mine = parts[key]
        columns = {
            name: [sum(getattr(s, name) for s in one.scores) / len(one.scores) for one in mine]
            for name in ("score", "named")
        }
        found = intervals(columns, resamples=config.resamples, seed=derive(config.seed, "bootstrap", *key))
        benchmark, kind, value = key
        made.append(
            {"benchmark": benchmark, "by": kind, "value": value, **{name: found[name].dump() for name in columns}}
        )
    return made
