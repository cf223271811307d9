"""Where a step's seconds go, for the page: parts of evenly spaced steps, sums by stage, and some steps' whole time line."""

from __future__ import annotations

import math
from pathlib import Path

from .report_data import Notes, Row, evenly, read_lines
from .timeline import LANES, OTHER, TRAIN_PARTS, Line, hidden, intervals, is_line, read_timeline, seconds

MAX_BARS, MAX_LINES, MAX_SPANS = 120, 24, 400


def read_time(run_dir: Path, notes: Notes) -> Row | None:
    """{"parts", "bars": [..], "lines": [..], "stages": [..], "passes": {kind: seconds}}; None without a time line.

    A bar is one step; a line one that can be looked at whole, span by span.
    """
    path = run_dir / "timeline.jsonl"
    if not path.is_file():
        return None
    unknown = sum(not is_line(line) for line in read_lines(path, notes))
    if unknown:
        notes.append(f"timeline.jsonl: {unknown} line(s) that are no time line left out.")
    lines = list(read_timeline(path))
    steps = [line for line in lines if line["kind"] == "step"]
    passes: dict[str, float] = {}
    for line in lines:
        if line["kind"] != "step":
            passes[line["kind"]] = passes.get(line["kind"], 0.0) + seconds(line).get(line["kind"], 0.0)
    if not steps:
        return None
    return {
        "parts": [*TRAIN_PARTS, OTHER],
        "bars": [_bar(line) for line in evenly(steps, MAX_BARS)],
        "lines": [_line(line) for line in evenly(steps, MAX_LINES)],
        "stages": [
            _stage(name, [s for s in steps if s["stage"] == name]) for name in dict.fromkeys(s["stage"] for s in steps)
        ],
        "passes": passes,
    }


def _bar(line: Line) -> Row:
    sums = seconds(line)
    return {
        "stage": line["stage"],
        "step": line["step"],
        "seconds": [sums.get(part, 0.0) for part in (*TRAIN_PARTS, OTHER)],
    }


def _line(line: Line) -> Row:
    """The longest spans, in lanes."""
    longest = sorted(intervals(line), key=lambda span: span.start - span.end)[:MAX_SPANS]
    shown = [
        [LANES.get(s.name, OTHER), s.name, s.start, s.end]
        for s in sorted(longest, key=lambda span: span.start)
        if s.name != "step"
    ]
    return {"stage": line["stage"], "step": line["step"], "spans": shown}


def _stage(name: str, lines: list[Line]) -> Row:
    """Mean seconds a step, and how much of the judge's work generation hid."""
    sums = [seconds(line) for line in lines]
    means = {
        part: math.fsum(one.get(part, 0.0) for one in sums) / len(sums)
        for part in ("step", "judge", "rules", *TRAIN_PARTS, OTHER)
    }
    return {"stage": name, "steps": len(lines), **means, "hidden": math.fsum(map(hidden, lines)) / len(lines)}
