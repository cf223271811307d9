"""Every completion of an evaluation under several rules at once, so that results can be compared with published ones.

The rules cost microseconds, so all are applied to the same completions: what differs is the rule and nothing else. No
judge is asked. A question without gold answers has None under each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .rollouts import RolloutGroup
from .rules import score_example
from .statistics import Estimate, accuracy


def rule_scores(group: RolloutGroup, scorings: Sequence[str]) -> dict[str, list[float | None]]:
    """The scores of a question's completions under each scoring, in order."""
    example = group.prompt.example
    return {
        scoring: [
            score_example(example, r.completion, r.finish_reason, scoring).score if example.answers else None
            for r in group.rollouts
        ]
        for scoring in scorings
    }


def accuracy_by_rule(rows: Sequence[Mapping[str, Any]], scorings: Sequence[str]) -> dict[str, Estimate]:
    """`accuracy` under each scoring, of an evaluation's rows; rows written before a scoring was asked for are left out."""
    scores = {scoring: [row["rules"][scoring] for row in rows if scoring in row.get("rules", {})] for scoring in scorings}  # fmt: skip
    return {scoring: accuracy(made) for scoring, made in scores.items() if made}
