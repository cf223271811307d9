"""Behaviours over a run: the average count per response at each step, by words and by a judge, and how the two agree.

What is written, `behaviours.json`, holds averages with their standard errors, the score beside them and the length, since
a longer response has room for more of everything. Counting by words is quick and done anew; what the judge said is kept
response by response in `behaviours-judge.jsonl`, so that a killed count asks nothing twice.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.checkpoint import write_atomically
from ..answers import thinking
from ..console import Console
from ..judge import make_client
from ..judge_cache import VerdictCache
from ..judge_config import JudgeConfig
from ..statistics import Estimate
from . import judged
from .compare import clustered, spearman
from .judged import Judged, Reasoning
from .lexical import Lexical, count
from .lexicon import BEHAVIOURS
from .lexicon import VERSION as LEXICON
from .responses import TRAINING, Point, points, read_documents

Row = dict[str, Any]

FEWEST_POINTS = 3
"""Steps from which on two curves are correlated: two are always in order or against it."""


@dataclass(frozen=True)
class BehavioursConfig:
    """At most `samples` responses of a step and `steps` training steps, evenly spaced. Without a judge, words alone count.

    documents: quotations are looked up in the documents of the run's data.
    """

    samples: int = 32
    steps: int = 50
    documents: bool = True
    judge: JudgeConfig | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.steps < 1:
            raise ValueError(f"samples and steps must be at least 1, not {self.samples} and {self.steps}")


@dataclass(frozen=True)
class Counted:
    """A point, and both counts of each of its responses. `judged` is None without a judge, and for one that failed."""

    point: Point
    lexical: list[Lexical]
    judged: list[Judged | None] | None = None


def count_run(run_dir: Path, config: BehavioursConfig, environ: Mapping[str, str], console: Console) -> Path:
    """Counts, writes `behaviours.json` into the run folder and gives its path: first by words, then with the judge.

    Raises:
        ValueError: the run has no responses yet, or the judge fails too often (what it said is kept).
    """
    notes: list[str] = []
    chosen = list(points(run_dir, config.samples, config.steps, notes))
    for note in notes:
        console.warn(note)
    if not any(point.responses for point in chosen):
        raise ValueError(f"{run_dir} has no rollouts and no evaluation yet: there is nothing to count")
    questions = {response.question for point in chosen for response in point.responses}
    documents = read_documents(run_dir, questions, console.warn) if config.documents else {}
    counted: list[Counted] = []
    total = sum(len(point.responses) for point in chosen)
    with console.progress("counting by words", total) as advance:
        for point in chosen:
            counted.append(Counted(point, [count(r.text, documents.get(r.question)) for r in point.responses]))
            advance(len(point.responses))
    path = run_dir / "behaviours.json"
    _write(path, counted, config, len(documents), len(questions))
    if config.judge is not None:
        cache = VerdictCache[dict[str, Any]](_cache_path(run_dir, config.judge), console.warn, judged.is_count)
        counted = asyncio.run(_ask(counted, config.judge, cache, environ, console))
        _write(path, counted, config, len(documents), len(questions))
    return path


def _cache_path(run_dir: Path, judge: JudgeConfig) -> Path:
    return Path(judge.cache) if judge.cache else run_dir / "behaviours-judge.jsonl"


async def _ask(
    counted: Sequence[Counted], config: JudgeConfig, cache: VerdictCache[dict[str, Any]], environ: Mapping[str, str],
    console: Console,
) -> list[Counted]:  # fmt: skip
    """With the judge's counts. A response without reasoning has none of anything, and nobody is asked."""
    client = make_client(config, environ, judged.TASK, cache)
    done: list[Counted] = []
    with console.progress("counting by the judge", sum(len(one.lexical) for one in counted)) as advance:
        async with client:
            for one in counted:
                cases = [Reasoning(thinking(response.text).strip()) for response in one.point.responses]
                answers = iter(await client.answers([case for case in cases if case.text]))
                found = [
                    next(answers) if case.text else {name: [] for name in BEHAVIOURS} | {"invented": 0}
                    for case in cases
                ]
                done.append(Counted(one.point, one.lexical, [None if f is None else Judged.load(f) for f in found]))
                client.check()
                advance(len(cases))
    return done


def _write(path: Path, counted: Sequence[Counted], config: BehavioursConfig, documents: int, questions: int) -> None:
    judge = config.judge if any(one.judged is not None for one in counted) else None
    made: Row = {
        "behaviours": list(BEHAVIOURS),
        "samples": config.samples,
        "lexicon": LEXICON,
        "documents": {"found": documents, "of": questions},
        "judge": None if judge is None else {"name": judge.model or judge.model_dir, "prompt": judged.VERSION},
        "points": [row(one) for one in counted],
        "comparison": comparison(counted) if judge else None,
    }
    write_atomically(path, json.dumps(made, indent=1, ensure_ascii=False))


def row(one: Counted) -> Row:
    """A point's averages over responses, with standard errors clustered by question."""
    point = one.point
    asked = [response.question for response in point.responses]

    def mean(values: Sequence[float | None]) -> Row:
        return _estimate(clustered(values, asked))

    made: Row = {
        "kind": point.kind, "stage": point.stage, "step": point.step, "n": len(asked), "of": point.of,
        "score": mean([response.score for response in point.responses]),
        "characters": mean([len(thinking(response.text)) for response in point.responses]),
        "lexical": {name: mean([lexical.counts[name] for lexical in one.lexical]) for name in BEHAVIOURS},
        "verbatim": mean([lexical.verbatim for lexical in one.lexical]),
        "judge": None,
    }  # fmt: skip
    if one.judged is not None:
        known = [None if made_ is None else made_.counts for made_ in one.judged]
        made["judge"] = {
            **{name: mean([None if counts is None else counts[name] for counts in known]) for name in BEHAVIOURS},
            "failed": sum(counts is None for counts in known),
            "invented": sum(made_.invented for made_ in one.judged if made_ is not None),
            "listed": sum(made_.invented + sum(made_.counts.values()) for made_ in one.judged if made_ is not None),
        }
    return made


def _estimate(estimate: Estimate) -> Row:
    return {"mean": estimate.mean, "stderr": estimate.stderr, "n": estimate.n}


def comparison(counted: Sequence[Counted]) -> list[Row]:
    """Both counters, behaviour by behaviour: over responses that both counted, and over the training steps' averages."""
    pairs = [
        (lexical.counts, by_judge.counts)
        for one in counted
        for lexical, by_judge in zip(one.lexical, one.judged or [], strict=True)
        if by_judge is not None
    ]
    steps = [row(one) for one in counted if one.point.kind == TRAINING]
    rows: list[Row] = []
    for name in BEHAVIOURS:
        first, second = [a[name] for a, _ in pairs], [b[name] for _, b in pairs]
        course = [(s["lexical"][name]["mean"], s["judge"][name]["mean"]) for s in steps if s["judge"]]
        course = [(a, b) for a, b in course if a is not None and b is not None]
        rows.append({
            "behaviour": name,
            "n": len(pairs),
            "lexical": sum(first) / len(pairs) if pairs else None,
            "judge": sum(second) / len(pairs) if pairs else None,
            "spearman": spearman(first, second),
            "equal": sum(a == b for a, b in zip(first, second, strict=True)) / len(pairs) if pairs else None,
            "steps": len(course),
            "spearman_steps": spearman([a for a, _ in course], [b for _, b in course]) if len(course) >= FEWEST_POINTS else None,
        })  # fmt: skip
    return rows
