"""The published table (QwenLong-L1, arXiv 2505.17667, table 4), and in what an evaluation of ours differs from its conditions.

Scores are percentages as printed. The average is the unweighted mean of the seven, which is checked on loading: a cell
copied wrongly would show there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .registry import SEVEN

PATH = Path(__file__).parents[1] / "assets" / "published_table.json"
ROUNDING = 0.05 + 1e-9
"""A printed average is the mean of the printed cells, rounded to one digit."""


@dataclass(frozen=True)
class PublishedRow:
    """One model's scores by benchmark, in percent."""

    model: str
    scores: Mapping[str, float]
    average: float
    note: str = ""


@dataclass(frozen=True)
class PublishedTable:
    """`conditions` are those of the evaluation, under the names that ours has; `questions` how many each benchmark has."""

    source: str
    conditions: Mapping[str, Any]
    questions: Mapping[str, int]
    rows: tuple[PublishedRow, ...]


def published_table(path: Path = PATH) -> PublishedTable:
    """Raises ValueError for a row whose cells and average don't agree, or that lacks a benchmark."""
    data = json.loads(path.read_text(encoding="utf-8"))
    names = data["benchmarks"]
    if sorted(names) != sorted(SEVEN):
        raise ValueError(f"{path}: the columns are {names}, not the seven benchmarks {list(SEVEN)}")
    rows = []
    for row in data["rows"]:
        if len(row["scores"]) != len(names):
            raise ValueError(f"{path}: {row['model']} has {len(row['scores'])} scores for {len(names)} benchmarks")
        mean = sum(row["scores"]) / len(names)
        if abs(mean - row["average"]) > ROUNDING:
            raise ValueError(f"{path}: the scores of {row['model']} average {mean:.3f}, not {row['average']}")
        scores = dict(zip(names, row["scores"], strict=True))
        rows.append(PublishedRow(row["model"], scores, row["average"], row.get("note", "")))
    return PublishedTable(data["source"], data["conditions"], data["questions"], tuple(rows))


def unlike_published(results: Mapping[str, Any], table: PublishedTable) -> list[str]:
    """What keeps our numbers from being compared with the table as they stand, a sentence each."""
    asked, scored, theirs = results["conditions"]["asked"], results["conditions"]["scored"], table.conditions
    told = [
        f"{name}: {asked[name]} here, {theirs[name]} there"
        for name in ("samples", "max_input", "max_output", "temperature", "top_p")
        if asked[name] != theirs[name]
    ]
    if asked["top_k"]:
        told.append(f"top_k: {asked['top_k']} here, none there")
    for name, count in table.questions.items():
        here = asked["benchmarks"].get(name)
        if here is None:
            told.append(f"{name}: not asked here")
        elif here["questions"] != count:
            told.append(f"{name}: {here['questions']} questions here, {count} there")
    judge = scored["judge"]
    told.append(f"judge: {judge['model'] if judge else 'none'} here, {theirs['judge']} there")
    if scored["rule"] != theirs["rule"]:
        told.append(f"rule: {scored['rule']} here, {theirs['rule']} there (its column is in the table of rules)")
    told += [
        f"gold answers: any of them counts here (under the rule {theirs['rule']} the first alone), {theirs['gold']} there",
        f"truncation: {asked['truncation']} here, {theirs['truncation']} there",
        f"failed requests: wrong here, {theirs['failed']} there",
    ]
    return told
