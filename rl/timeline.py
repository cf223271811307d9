"""When a run did what: the lines of `timeline.jsonl`, in lanes, and as a trace that Perfetto and chrome://tracing open.

A line is one training step, evaluation, difficulty pass or checkpoint: `spans` [name, begin, end] in seconds after `at`
(seconds since 1970). Names are those of `timing_s/*`, where they have one, and a name's spans add up to it. Lanes run side
by side: what the judge does while other completions are still being generated stands above or below them. It gives up on
ranks: rank 0 alone writes, and what the others wait for shows as its own time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .run import read_lines

LANES = {
    "step": "steps",
    "evaluation": "steps",
    "difficulty": "steps",
    "checkpoint": "steps",
    "wait_for_rollouts": "waiting for rollouts",
    "gen": "generation",
    "rules": "rules",
    "judge": "judge",
    "reward": "waiting for rewards",
    "old_log_prob": "training",
    "ref": "training",
    "update_actor": "training",
    "update_weights": "weights to the server",
}
OTHER = "other"
TRAIN_PARTS = ("update_weights", "wait_for_rollouts", "gen", "reward", "old_log_prob", "ref", "update_actor")
"""What a step is made of, one after the other; what is left of it is `OTHER`."""

Line = Mapping[str, Any]


class Interval(NamedTuple):
    """Seconds after the line's `at`."""

    name: str
    start: float
    end: float


def read_timeline(path: Path) -> Iterator[Line]:
    """Lines that are whole; of a step that stands twice (a resumed run), the later one."""
    found: dict[tuple[Any, ...], Line] = {}
    for number, line in enumerate(read_lines(path)):
        if is_line(line):
            key = (line["kind"], line["stage"], line["step"]) if line["kind"] == "step" else (number,)
            found.pop(key, None)
            found[key] = line
    yield from found.values()


def is_line(line: Any) -> bool:
    """Whether it is a line of the time line, whoever wrote it."""
    if not isinstance(line, dict) or not isinstance(line.get("spans"), list) or not isinstance(line.get("step"), int):
        return False
    known = isinstance(line.get("kind"), str) and isinstance(line.get("stage"), str) and _is_number(line.get("at"))
    return known and all(
        isinstance(s, list) and len(s) == 3 and isinstance(s[0], str) and _is_number(s[1]) and _is_number(s[2])
        for s in line["spans"]
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def intervals(line: Line) -> list[Interval]:
    return [Interval(name, float(start), float(end)) for name, start, end in line["spans"]]


def seconds(line: Line) -> dict[str, float]:
    """By name; of a step also `OTHER`, which no part accounts for.

    A part counts within its step alone: rollouts that were sampled while the step before trained cost this one nothing but
    what it waited for them.
    """
    spans = intervals(line)
    ahead = any(s.name == "wait_for_rollouts" for s in spans)
    first, last = next(((s.start, s.end) for s in spans if s.name == "step"), (-math.inf, math.inf))
    sums: dict[str, float] = {}
    for name, start, end in spans:
        if name in TRAIN_PARTS:
            start, end = max(start, first), first if ahead and name in ("gen", "reward") else min(end, last)
        sums[name] = sums.get(name, 0.0) + max(0.0, end - start)
    if "step" in sums:
        sums[OTHER] = max(0.0, sums["step"] - sum(sums.get(part, 0.0) for part in TRAIN_PARTS))
    return sums


def hidden(line: Line, name: str = "judge", behind: str = "gen") -> float:
    """Seconds of `name` that passed while `behind` was under way. Neither may overlap itself."""
    spans = intervals(line)
    return sum(
        max(0.0, min(a.end, b.end) - max(a.start, b.start))
        for a in spans if a.name == name
        for b in spans if b.name == behind
    )  # fmt: skip


def trace(lines: Sequence[Line], name: str) -> dict[str, Any]:
    """Chrome's trace-event JSON: complete events (ph X) in microseconds since the first line, a thread for each lane."""
    start = min((line["at"] for line in lines), default=0.0)
    lanes = list(dict.fromkeys((*LANES.values(), OTHER)))
    events: list[dict[str, Any]] = [_meta("process_name", 0, {"name": name})]
    for number, lane in enumerate(lanes, 1):
        events += [
            _meta("thread_name", number, {"name": lane}),
            _meta("thread_sort_index", number, {"sort_index": number}),
        ]
    for line in lines:
        for span in intervals(line):
            events.append({
                "name": _title(line, span.name), "cat": line["kind"], "ph": "X", "pid": 1,
                "tid": lanes.index(LANES.get(span.name, OTHER)) + 1,
                "ts": round((line["at"] - start + span.start) * 1e6, 3), "dur": round(max(0.0, span.end - span.start) * 1e6, 3),
                "args": {"stage": line["stage"], "step": line["step"]},
            })  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"run": name, "begun": start}}


def _meta(name: str, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": 1, "tid": thread, "ts": 0, "args": args}


def _title(line: Line, name: str) -> str:
    return f"{line['stage']} step {line['step']}" if name == "step" else name


def within(lines: Iterable[Line], first: int, last: int | None) -> list[Line]:
    """Those of steps first..last."""
    return [line for line in lines if first <= line["step"] <= (line["step"] if last is None else last)]
