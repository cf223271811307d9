"""Evaluation: avg@k and unbiased pass@k with standard errors, by length bucket and by benchmark.

k completions of every question with the training generator and reward. The same random numbers are used at every stage of
a run, so stages differ by the weights alone. Questions without a verdict are left out and counted, never scored 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine import Sampling
from .agreement import confusion
from .policy import Policy
from .prompts import Prompt, question_of
from .rewards import Reward
from .rollouts import roll_out
from .rules import check_scoring
from .run import BatchLog
from .seeds import derive
from .side_by_side import accuracy_by_rule, rule_scores
from .statistics import Estimate, accuracy, accuracy_by_bucket, bucket_of, pass_at

Row = dict[str, Any]


@dataclass(frozen=True)
class EvalConfig:
    """`every` RL steps evaluates within a phase too (0: after each stage); `base` evaluates the untrained model first.

    `rules` are scorings that every completion gets besides its reward, to be set side by side (`rl/side_by_side.py`; empty: none).
    `headline` names the benchmarks of the headline table (empty: all); `buckets` are upper bounds of the length
    buckets in tokens (empty: those of the phases, or of the SFT where there are none). `batch` questions are generated at a time.
    """

    k: int = 1
    max_completion: int = 1024
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    every: int = 0
    base: bool = True
    headline: tuple[str, ...] = ()
    buckets: tuple[int, ...] = ()
    batch: int = 64
    rules: tuple[str, ...] = ("strict", "qwenlong-l1", "qwenlong-l1-eval", "longbench", "longbench-em")

    def __post_init__(self) -> None:
        for scoring in self.rules:
            check_scoring(scoring)
        if self.k < 1 or self.batch < 1:
            raise ValueError(f"eval.k and eval.batch must be at least 1, not {self.k} and {self.batch}")
        if self.temperature == 0.0 and self.k > 1:
            raise ValueError(
                f"eval.k = {self.k} greedy completions are all alike: set eval.temperature above 0, or eval.k = 1"
            )
        if self.every < 0:
            raise ValueError(f"eval.every must be 0 (off) or a number of steps, not {self.every}")
        if self.buckets:
            bucket_of(1, self.buckets)  # refuses bounds that don't rise
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(self.max_completion, self.temperature, self.top_p, self.top_k)


def evaluate(
    policy: Policy, reward: Reward, prompts: Sequence[Prompt], config: EvalConfig, *, bounds: Sequence[int], seed: int,
    name: str, step: int = 0, log: BatchLog | None = None, on_batch: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, Any], list[Row]]:  # fmt: skip
    """Scores of the policy on `prompts`.

    Args:
        bounds: upper bounds of the length buckets, in tokens of the prompt.
        log: finished batches are kept there, so that a killed evaluation goes on where it was.

    Returns:
        the summary (the run folder's `evals/<stage>.json`) and one row a question with its completions and scores.
    """
    rows: list[Row] = []
    for batch, start in enumerate(range(0, len(prompts), config.batch)):
        part = prompts[start : start + config.batch]
        made = policy.ranks.first(lambda batch=batch: log.get(batch) if log else None)
        if made is None:
            made = _evaluate_batch(policy, reward, part, config, seed=derive(seed, "eval", batch), name=name, step=step)
            if log:
                log.add(batch, made)
        rows += made
        on_batch(len(part))
    return summarize(rows, config, bounds=bounds, name=name, step=step), rows


def _evaluate_batch(
    policy: Policy, reward: Reward, prompts: Sequence[Prompt], config: EvalConfig, *, seed: int, name: str, step: int
) -> list[Row]:
    groups = roll_out(policy, reward, prompts, config.k, config.sampling(), seed=seed, stage=name, step=step)
    return [
        {
            "prompt_id": g.prompt.example.id,
            "benchmark": g.prompt.example.benchmark,
            "prompt_length": len(g.prompt.ids),
            "truncated_from": g.prompt.truncated_from,
            "chance": g.prompt.example.columns.get("chance"),
            "question": question_of(g.prompt.example),
            "answers": list(g.prompt.example.answers),
            "completions": [r.completion for r in g.rollouts],
            "finish_reasons": [r.finish_reason for r in g.rollouts],
            "scores": [r.reward for r in g.rollouts],
            "reasons": [r.reason for r in g.rollouts],
            "rewards": [dict(r.rewards) for r in g.rollouts],
            "rules": rule_scores(g, config.rules),
        }
        for g in groups
    ]


def summarize(
    rows: Sequence[Row], config: EvalConfig, *, bounds: Sequence[int], name: str, step: int
) -> dict[str, Any]:
    """The tables, from one row a question."""
    names = sorted({row["benchmark"] for row in rows})
    headline = set(config.headline or names)
    counted = [row for row in rows if row["benchmark"] in headline]
    chances = [row["chance"] for row in counted if row["chance"] is not None]
    benchmarks = []
    for benchmark in names:
        mine = [row for row in rows if row["benchmark"] == benchmark]
        scores = [row["scores"] for row in mine]
        ks = sorted({1, *(2**i for i in range(10) if 2**i <= config.k), config.k})
        benchmarks.append(
            {
                "name": benchmark,
                "headline": benchmark in headline,
                **_estimate(accuracy(scores)),
                "pass_at": {str(k): pass_at(scores, k).mean for k in ks},
                "pass_at_stderr": {str(k): pass_at(scores, k).stderr for k in ks},
                "buckets": _buckets(mine, bounds),
                "rules": {rule: _estimate(made) for rule, made in accuracy_by_rule(mine, config.rules).items()},
            }
        )
    return {
        "stage": name,
        "step": step,
        "k": config.k,
        "chance": sum(chances) / len(chances) if chances else None,
        "buckets": _buckets(counted, bounds),
        "benchmarks": benchmarks,
        "agreement": confusion((row["benchmark"], parts) for row in rows for parts in row.get("rewards", ())),
    }


def _buckets(rows: Sequence[Row], bounds: Sequence[int]) -> list[dict[str, Any]]:
    estimates = accuracy_by_bucket([row["prompt_length"] for row in rows], [row["scores"] for row in rows], bounds)
    return [{"upper": upper, **_estimate(estimate)} for upper, estimate in estimates]


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"accuracy": estimate.mean, "stderr": estimate.stderr, "n": estimate.n, "left_out": estimate.left_out}
