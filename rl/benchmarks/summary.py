"""The tables of an evaluation, from its scored questions: avg@k, pass@k, intervals, buckets, and what went wrong.

Intervals are those of `bootstrap.py`. The average is the unweighted mean of the seven published benchmarks, and there is
none where one of them is missing. Buckets are by tokens of the prompt before any cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..agreement import confusion
from ..seeds import derive
from ..statistics import bucket_of, pass_at_k
from .bootstrap import Values, average_interval, intervals
from .needle_summary import summarize_needles
from .registry import SEVEN
from .scores import Score, Scored
from .settings import EvaluationConfig

MEASURES: dict[str, Callable[[Score], float | None]] = {
    "score": lambda score: score.score,
    "rule": lambda score: score.rule,
    "judge": lambda score: score.judge,
    "published": lambda score: score.published,
}
"""`score` is max(rule, judge), `published` the same with the published table's rule."""


def summarize(scored: Sequence[Scored], config: EvaluationConfig) -> dict[str, Any]:
    """Benchmarks, average, buckets, agreement, failures and counts: all of results.json but where it came from."""
    by_name: dict[str, list[Scored]] = {}
    for one in scored:
        by_name.setdefault(one.question.benchmark, []).append(one)
    samples = [(one, score) for one in scored for score in one.scores]
    return {
        "benchmarks": [_benchmark(name, mine, config) for name, mine in by_name.items()],
        "average": _average(by_name, config),
        "buckets": _buckets(scored, config, "all"),
        "needles": summarize_needles(scored, config),
        "agreement": confusion(
            (one.question.benchmark, {"rule": s.rule, "judge": s.judge}) for one, s in samples if s.asked
        ),
        "counts": _counts(scored),
        "failures": [_place(one, s) | {"why": s.failed} for one, s in samples if s.failed is not None],
        "judge_failures": [_place(one, s) | {"answer": s.answer} for one, s in samples if s.unjudged],
    }


def ks_of(samples: int) -> list[int]:
    return sorted({*(2**i for i in range(20) if 2**i <= samples), samples})


def means(scored: Sequence[Scored], measure: str) -> list[float | None]:
    """One value a question: the mean over its samples that have one."""
    made: list[float | None] = []
    for one in scored:
        known = [value for value in map(MEASURES[measure], one.scores) if value is not None]
        made.append(sum(known) / len(known) if known else None)
    return made


def passes(scored: Sequence[Scored], k: int) -> list[float]:
    """Unbiased pass@k of each question; a sample is correct where rule or judge say so in full."""
    return [pass_at_k(len(one.scores), sum(score.score >= 1.0 for score in one.scores), k) for one in scored]


def _columns(scored: Sequence[Scored], config: EvaluationConfig) -> dict[str, Values]:
    columns: dict[str, Values] = {name: means(scored, name) for name in MEASURES}
    for k in ks_of(config.samples):
        columns[f"pass@{k}"] = passes(scored, k)
    for rule in config.rules:
        columns[f"rule:{rule}"] = [sum(s.rules[rule] for s in one.scores) / len(one.scores) for one in scored]
    return columns


def _benchmark(name: str, scored: Sequence[Scored], config: EvaluationConfig) -> dict[str, Any]:
    seed = derive(config.seed, "bootstrap", name)
    made = intervals(_columns(scored, config), resamples=config.resamples, seed=seed)
    return {
        "name": name,
        "judged": scored[0].question.judged,
        **{measure: made[measure].dump() for measure in MEASURES},
        "pass_at": {str(k): made[f"pass@{k}"].dump() for k in ks_of(config.samples)},
        "rules": {rule: made[f"rule:{rule}"].dump() for rule in config.rules},
        "buckets": _buckets(scored, config, name),
        "counts": _counts(scored),
    }


def _average(by_name: dict[str, list[Scored]], config: EvaluationConfig) -> dict[str, Any] | None:
    if not set(SEVEN) <= set(by_name):
        return None
    parts = [by_name[name] for name in SEVEN]
    seed = derive(config.seed, "bootstrap", "average")

    def over(values: Callable[[Sequence[Scored]], Values]) -> dict[str, Any]:
        return average_interval([values(part) for part in parts], resamples=config.resamples, seed=seed).dump()

    return {
        "of": list(SEVEN),
        **{measure: over(lambda part, measure=measure: means(part, measure)) for measure in MEASURES},
        "pass_at": {str(k): over(lambda part, k=k: passes(part, k)) for k in ks_of(config.samples)},
    }


def _buckets(scored: Sequence[Scored], config: EvaluationConfig, name: str) -> list[dict[str, Any]]:
    members: dict[int | None, list[Scored]] = {upper: [] for upper in config.buckets}
    for one in scored:
        members.setdefault(bucket_of(one.question.length, config.buckets), []).append(one)
    made = []
    for upper, mine in members.items():
        seed = derive(config.seed, "bootstrap", name, str(upper))
        made.append(
            {
                "upper": upper,
                **intervals({"score": means(mine, "score")}, resamples=config.resamples, seed=seed)["score"].dump(),
            }
        )
    return made


def _counts(scored: Sequence[Scored]) -> dict[str, int]:
    scores = [score for one in scored for score in one.scores]
    return {
        "questions": len(scored),
        "responses": len(scores),
        "prompts_cut": sum(one.question.is_cut for one in scored),
        "answers_cut": sum(score.finish_reason == "length" for score in scores),
        "failed_requests": sum(score.failed is not None for score in scores),
        "judge_failures": sum(score.unjudged for score in scores),
        "tokens": sum(score.tokens or 0 for score in scores),
    }


def _place(one: Scored, score: Score) -> dict[str, Any]:
    return {"benchmark": one.question.benchmark, "id": one.question.example.id, "sample": score.sample}
