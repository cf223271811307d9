"""What the report shows, read from a run folder that may be finished, still growing, or cut off within a line.

Each `read_*` returns plain JSON-able data and appends to `notes` whatever a reader must know to trust the page: a torn
line, a missing part, a sample in place of the whole. Nothing is repaired and nothing is invented: what cannot be read
is left out and said. NaN and infinities become None, since JSON has no word for them.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .statistics import bucket_of, paired_difference

# A curve is drawn some 400 pixels wide: more points than this only make the page heavier.
MAX_METRIC_ROWS = 2000
STAGE_ORDER = ("base", "sft")

Row = dict[str, Any]
Notes = list[str]


def number(value: Any) -> float | int | None:
    """`value` if it is a finite number, else None (null, NaN, a string, a bool)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def stage_rank(name: str) -> tuple[int, int, str, bool, str]:
    """Sort key: base, sft, then phases as they are numbered, each after the evaluations within it."""
    stage, _, step = name.partition("-")
    rank = STAGE_ORDER.index(stage) if stage in STAGE_ORDER else len(STAGE_ORDER)
    return (rank, len(stage), stage, not step, step)


def is_within_stage(name: str) -> bool:
    """Whether an evaluation called `name` was made within a stage (`phase1-000020`), not at its end."""
    return name.rpartition("-")[2].isdigit() and "-" in name


def embed(data: Any) -> str:
    """JSON that may stand inside a script element: without <, > and &, so that no tag or comment can begin in it.

    Half a surrogate pair, which a tokenizer can cut a character into, becomes U+FFFD: it has no UTF-8 form.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def read_json(path: Path, notes: Notes) -> Row | None:
    """One JSON object; None when the file is missing or cannot be read as one."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{_short(path)} cannot be read as JSON (half written?) and is left out.")
        return None
    return value


def read_lines(path: Path, notes: Notes) -> Iterator[Row]:
    """The JSON objects of a JSONL file, one at a time. Unreadable lines are skipped; the last one counts as torn."""
    unreadable, last_is_bad = 0, False
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            last_is_bad = not isinstance(value, dict)
            if isinstance(value, dict):
                yield value
            else:
                unreadable += 1
    if last_is_bad:
        unreadable -= 1
        notes.append(f"{_short(path)}: the last line is torn (the run was stopped while writing it) and is left out.")
    if unreadable:
        notes.append(f"{_short(path)}: {unreadable} unreadable line(s) left out.")


def read_recipe(run_dir: Path, notes: Notes) -> Row:
    """{"name", "text", "phases": how many the recipe plans, or None}."""
    path = run_dir / "recipe.toml"
    if not path.is_file():
        notes.append("recipe.toml is missing.")
        return {"name": run_dir.name, "text": None, "phases": None}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        notes.append("recipe.toml is not valid TOML; it is shown as it is.")
        recipe = {}
    phases = recipe.get("phases")
    return {
        "name": str(recipe.get("name") or run_dir.name),
        "text": text,
        "phases": len(phases) if isinstance(phases, list) else None,
    }


def read_metrics(run_dir: Path, notes: Notes) -> Row:
    """metrics.jsonl as columns: {"stage": [..], "step": [..], "series": {metric: [number | None, ..]}, "total": rows,
    "seconds": sum of timing_s/step}.

    A step written twice (a run that was resumed) counts once, with the later line.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        notes.append("metrics.jsonl is missing: no step has been logged yet.")
        return {"stage": [], "step": [], "series": {}, "total": 0, "seconds": 0.0}
    lines = [row for row in read_lines(path, notes) if number(row.get("step")) is not None]
    by_step = {(str(row.get("stage")), row["step"]): row for row in lines}
    if len(by_step) < len(lines):
        notes.append(f"{len(lines) - len(by_step)} step(s) were logged twice (resumed run); the later line is shown.")
    rows = sorted(by_step.values(), key=lambda row: row["step"])
    shown = evenly(rows, MAX_METRIC_ROWS)
    if len(shown) < len(rows):
        notes.append(f"The curves show {len(shown):,} evenly spaced steps of {len(rows):,}.")
    names = sorted({key for row in shown for key in row} - {"stage", "step", "stage_step"})
    series = {name: [number(row.get(name)) for row in shown] for name in names}
    return {
        "stage": [str(row.get("stage")) for row in shown],
        "step": [row["step"] for row in shown],
        "series": {name: values for name, values in series.items() if any(value is not None for value in values)},
        "total": len(rows),
        "seconds": math.fsum(number(row.get("timing_s/step")) or 0.0 for row in rows),
    }


def evenly(items: list[Any], limit: int) -> list[Any]:
    """At most `limit` items, evenly spaced, the last one always among them."""
    if len(items) <= limit:
        return items
    return [items[(index + 1) * len(items) // limit - 1] for index in range(limit)]


def read_accuracy(run_dir: Path, notes: Notes) -> Row:
    """{"chance", "stages": [{"name", "step", "k", "buckets", "benchmarks"}], "within": [same], "differences": [..]}.

    Stages come from evals/*.json, which exist while the run goes on; summary.json fills what they lack. `within`:
    evaluations made in the middle of a stage.
    """
    summary = read_json(run_dir / "summary.json", notes) or {}
    evals = [read_json(path, notes) for path in sorted((run_dir / "evals").glob("*.json"))]
    stages: dict[str, Row] = {str(row.get("name")): dict(row) for row in _objects(summary.get("stages"))}
    chance = number(summary.get("chance"))
    for row in evals:
        if row is not None:
            name = str(row.get("stage"))
            stages[name] = {**row, **stages.get(name, {}), "name": name}
            chance = number(row.get("chance")) if chance is None else chance
    everything = [_stage(stages[name]) for name in sorted(stages, key=stage_rank)]
    ordered = [stage for stage in everything if not is_within_stage(stage["name"])]
    within = [stage for stage in everything if is_within_stage(stage["name"])]
    if not everything:
        notes.append("No evaluation has been written yet.")
    differences = _differences(run_dir, ordered)
    return {"chance": chance, "stages": ordered, "within": within, "differences": differences}


def _stage(row: Row) -> Row:
    benchmarks = [
        {
            "name": str(benchmark.get("name")),
            "headline": bool(benchmark.get("headline")),
            **{key: number(benchmark.get(key)) for key in ("accuracy", "stderr", "n")},
            "pass_at": {str(k): number(value) for k, value in _object(benchmark.get("pass_at")).items()},
            "buckets": _buckets(benchmark.get("buckets")),
            "rules": _rules(benchmark.get("rules")),
        }
        for benchmark in _objects(row.get("benchmarks"))
    ]
    numbers = {key: number(row.get(key)) for key in ("step", "k")}
    return {"name": row["name"], **numbers, "buckets": _buckets(row.get("buckets")), "benchmarks": benchmarks}


def _rules(value: Any) -> Row:
    keys = ("accuracy", "stderr", "n")
    return {str(rule): {key: number(_object(made).get(key)) for key in keys} for rule, made in _object(value).items()}


def _buckets(value: Any) -> list[Row]:
    keys = ("upper", "accuracy", "stderr", "n")
    return [{key: number(bucket.get(key)) for key in keys} for bucket in _objects(value)]


def _object(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[Row]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _differences(run_dir: Path, stages: list[Row]) -> list[Row]:
    """Per bucket of the headline: the last stage minus SFT (minus base where there is no SFT), paired by question."""
    names = [stage["name"] for stage in stages]
    if len(names) < 2:
        return []
    before = "sft" if "sft" in names[:-1] else names[0]
    last = stages[-1]
    bounds = [bucket["upper"] for bucket in last["buckets"] if bucket["upper"] is not None]
    headline = {benchmark["name"] for benchmark in last["benchmarks"] if benchmark["headline"]}
    if not bounds or not headline:
        return []
    scores = [_scores(run_dir, name, bounds, headline) for name in (before, last["name"])]
    found: list[Row] = []
    for bucket in last["buckets"]:
        estimate = paired_difference(*(side.get(bucket["upper"], {}) for side in scores))
        row = {"upper": bucket["upper"], "mean": estimate.mean, "stderr": estimate.stderr, "n": estimate.n}
        found.append({"before": before, "after": last["name"], **row})
    return found if any(row["mean"] is not None for row in found) else []


def _scores(run_dir: Path, stage: str, bounds: list[int], headline: set[str]) -> dict[int | None, dict[str, list[Any]]]:
    path = run_dir / "evals" / f"{stage}.completions.jsonl"
    by_bucket: dict[int | None, dict[str, list[Any]]] = {}
    # Torn lines of this file are already told of where its completions are sampled.
    for row in read_lines(path, []) if path.is_file() else ():
        length = number(row.get("prompt_length"))
        if length is not None and length > 0 and str(row.get("benchmark")) in headline:
            scores = [number(score) for score in row.get("scores") or []]
            # An id is unique in its source only, and a run may evaluate several.
            question = f"{row.get('benchmark')} {row.get('prompt_id')}"
            by_bucket.setdefault(bucket_of(int(length), bounds), {})[question] = scores
    return by_bucket


def _short(path: Path) -> str:
    """The path as the reader knows it: from the run folder on."""
    parts = path.parts
    for folder in ("rollouts", "evals", "pool"):
        if folder in parts[-3:]:
            return "/".join(parts[-3:][parts[-3:].index(folder) :])
    return path.name
