"""The retrospective pool as the report shows it: how hard each prompt was found to be, which were kept, and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from .report_data import Notes, Row, number, read_lines, stage_rank

MAX_ROWS = 400
MAX_REASONS = 12
BINS = 10
NUMBERS = ("prompt_length", "mean_reward", "difficulty", "samples")


def read_pools(run_dir: Path, notes: Notes) -> list[Row]:
    """One entry per difficulty pass: counts, a histogram of mean rewards, the reasons, and the rows, selected first."""
    paths = sorted((run_dir / "pool").glob("*.jsonl"), key=lambda path: stage_rank(path.stem))
    return [_pool(path.stem, [_row(raw) for raw in read_lines(path, notes)]) for path in paths]


def _row(raw: Row) -> Row:
    texts = {key: str(raw.get(key)) for key in ("prompt_id", "benchmark", "why")}
    return texts | {key: number(raw.get(key)) for key in NUMBERS} | {"selected": bool(raw.get("selected"))}


def _pool(stage: str, rows: list[Row]) -> Row:
    rows.sort(key=lambda row: (not row["selected"], row["mean_reward"] is None, row["mean_reward"] or 0.0))
    reasons = Counter((row["why"], row["selected"]) for row in rows).most_common(MAX_REASONS)
    return {
        "stage": stage,
        "total": len(rows),
        "scored": sum(row["mean_reward"] is not None for row in rows),
        "selected": sum(row["selected"] for row in rows),
        "reasons": [{"why": why, "selected": selected, "n": n} for (why, selected), n in reasons],
        "histogram": histogram(rows),
        "rows": rows[:MAX_ROWS],
    }


def histogram(rows: list[Row]) -> dict[str, list[Any]]:
    """Counts of mean rewards in ten equal bins, selected and left apart: low <= reward < high, the last bin closed.

    The range is 0..1, wider where a reward (an overlong penalty, say) lies outside it.
    """
    known = [(row["mean_reward"], row["selected"]) for row in rows if row["mean_reward"] is not None]
    low = min([0.0, *(reward for reward, _ in known)])
    high = max([1.0, *(reward for reward, _ in known)])
    counts: dict[bool, list[int]] = {True: [0] * BINS, False: [0] * BINS}
    for reward, selected in known:
        counts[selected][min(int((reward - low) / (high - low) * BINS), BINS - 1)] += 1
    edges = [low + (high - low) * index / BINS for index in range(BINS + 1)]
    return {"edges": edges, "selected": counts[True], "left": counts[False]}
