"""Where rule and judge agree, by benchmark: it is how a user finds a gamed reward.

Four counts over the completions that both have scored: `both` and `neither` agree; `judge_only` is what a strict rule
misses (paraphrases, or a judge that is talked into it); `rule_only` is what the rule accepts and the judge doesn't, the
mark of a rule that is gamed. The judge sees only a share of what the rule accepts (`reward.judge.audit`): within a row of
the table shares may be compared, between the rows they may not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

PREFIX = "reward/agreement/"
CELLS = ("both", "rule_only", "judge_only", "neither")

Parts = Mapping[str, float | None]


def confusion(scored: Iterable[tuple[str, Parts]]) -> dict[str, dict[str, int]]:
    """Counts of each cell by benchmark, from (benchmark, rewards by part) of completions."""
    tables: dict[str, Counter[str]] = {}
    for benchmark, parts in scored:
        rule, judge = parts.get("rule"), parts.get("judge")
        if rule is not None and judge is not None:
            cell = CELLS[2 * (rule < 1) + (judge < 1)]
            tables.setdefault(benchmark, Counter())[cell] += 1
    return {name: {cell: tables[name][cell] for cell in CELLS} for name in sorted(tables)}


def agreement_metrics(scored: Iterable[tuple[str, Parts]]) -> dict[str, float]:
    """The counts under `reward/agreement/BENCHMARK/CELL`; nothing where no completion has both verdicts."""
    return {
        f"{PREFIX}{name}/{cell}": float(count)
        for name, cells in confusion(scored).items()
        for cell, count in cells.items()
    }
