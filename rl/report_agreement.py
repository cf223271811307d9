"""Rule and judge side by side on the page: counts of their agreement by stage and benchmark.

Training counts are summed over all steps of a stage from metrics.jsonl, evaluation counts stand in evals/*.json. An older
run, or one without a judge, has none, and the page then has no such section.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .agreement import CELLS, PREFIX
from .report_data import Notes, Row, number, read_json, read_lines, stage_rank


def read_agreement(run_dir: Path, notes: Notes) -> list[Row]:
    """[{"stage", "kind": training | evaluation, "benchmark", both, rule_only, judge_only, neither}], in the run's order."""
    tables: dict[tuple[str, str, str], Counter[str]] = {}
    for line in _steps(run_dir):
        for name, value in line.items():
            benchmark, _, cell = name.removeprefix(PREFIX).rpartition("/")
            if name.startswith(PREFIX) and cell in CELLS:
                key = (str(line.get("stage")), "training", benchmark)
                tables.setdefault(key, Counter())[cell] += int(number(value) or 0)
    for path in sorted((run_dir / "evals").glob("*.json")):
        found = (read_json(path, []) or {}).get("agreement")  # what is wrong with the file is told where it is shown
        for benchmark, cells in found.items() if isinstance(found, dict) else ():
            counts = {cell: int(number(cells.get(cell)) or 0) for cell in CELLS} if isinstance(cells, dict) else {}
            tables[(path.stem, "evaluation", str(benchmark))] = Counter(counts)
    rows = [
        {"stage": stage, "kind": kind, "benchmark": benchmark, **{cell: counts[cell] for cell in CELLS}}
        for (stage, kind, benchmark), counts in tables.items()
        if counts.total()
    ]
    if any(row["rule_only"] for row in rows):
        notes.append(
            "The judge denied answers that the rule accepted: see Agreement, and search the completions for “disputed”."
        )
    return sorted(rows, key=lambda row: (stage_rank(row["stage"]), row["kind"] == "evaluation", row["benchmark"]))


def _steps(run_dir: Path) -> list[Row]:
    """One line a step: of a step logged twice (a resumed run) the later one."""
    path = run_dir / "metrics.jsonl"
    lines = read_lines(path, []) if path.is_file() else ()
    return list({(str(line.get("stage")), number(line.get("step"))): line for line in lines}.values())
