"""What a step reports beside its loss: rewards and lengths under TRL's names, cost under verl's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..kernels import Mean
from .advantages import reward_spread
from .agreement import agreement_metrics
from .rollouts import RolloutGroup
from .run import Stopwatch


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Over everything sampled, trained on or not; rewards after the length penalty."""
    rollouts = [r for group in groups for r in group.rollouts]
    rewards = [r.reward for r in rollouts if r.reward is not None]
    spreads = [reward_spread(group.rewards) for group in groups]
    lengths = [len(r.completion_ids) for r in rollouts]
    parts = sorted({name for r in rollouts for name in r.rewards})
    known = {name: [v for r in rollouts if (v := r.rewards.get(name)) is not None] for name in parts}
    return {
        "reward": mean_of(rewards), "reward_std": mean_of(spreads), "frac_reward_zero_std": mean_of([s == 0 for s in spreads]),
        "completions/mean_length": mean_of(lengths), "completions/min_length": min(lengths), "completions/max_length": max(lengths),
        "completions/clipped_ratio": mean_of([r.finish_reason == "length" for r in rollouts]),
        "prompt_length/mean": mean_of([len(group.prompt.ids) for group in groups]),
        "sampling/groups": len(groups), "sampling/no_verdict": len(rollouts) - len(rewards),
        **{f"rewards/{name}/mean": mean_of(values) for name, values in known.items()},
        **agreement_metrics((r.benchmark, r.rewards) for r in rollouts),
    }  # fmt: skip


def staleness(groups: Sequence[RolloutGroup], step: int) -> dict[str, float]:
    """How many steps the policy had made since it sampled the tokens that this step trains on; where that is known (replays may not say)."""
    each = [pair for group in groups for r in group.rollouts for pair in r.versions]
    if not each:
        return {}
    tokens = sum(count for _, count in each)
    mean = sum((step - 1 - version) * count for version, count in each) / tokens
    return {"sampling/staleness/mean": mean, "sampling/staleness/max": max(step - 1 - v for v, _ in each)}


def mask_metrics(
    masked: Sequence[tuple[torch.Tensor, float]], entropy: float | None, negatives: bool
) -> dict[str, float]:
    """What the entropy rules took away: (tokens kept [R], advantage) per completion; `entropy` of AEPO's batch or None.

    `entropy_mask/share` is of the tokens that had an advantage.
    """
    had = [kept for kept, advantage in masked if advantage]
    lost = float(sum((~kept).sum() for kept in had)) / max(1, sum(len(kept) for kept in had))
    return {"entropy_mask/share": lost} | (
        {} if entropy is None else {"aepo/entropy": entropy, "aepo/masking": float(negatives)}
    )


def mismatch_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The loss's metrics with the effective share of samples in the place of the two moments that it is made of.

    (mean rho)^2 / mean rho^2: 1 where generator and trainer agree, 1/N where one token of N has all the weight.
    """
    moments = ("sampling/ratio/mean", "sampling/ratio/mean_square")
    rest = {name: value for name, value in metrics.items() if name not in moments}
    if moments[0] not in metrics:
        return rest
    mean, square = (metrics[name] for name in moments)
    return {**rest, "sampling/effective_sample_size": mean**2 / square}


def cost(groups: Sequence[RolloutGroup], watch: Stopwatch, device: torch.device) -> dict[str, float]:
    """Throughput counts each prompt once and every completion token."""
    tokens = sum(len(g.prompt.ids) + sum(len(r.completion_ids) for r in g.rollouts) for g in groups)
    memory = {}
    if device.type == "cuda":
        memory["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
    throughput = tokens / watch.seconds["timing_s/step"]
    return {"num_tokens": tokens, "perf/throughput": throughput, **memory, **watch.seconds}


def add_means(totals: dict[str, Mean], more: Mapping[str, Mean]) -> None:
    """Adds the means of a micro-batch, or of a rank."""
    for name, mean in more.items():
        totals[name] = totals[name] + mean if name in totals else mean


def mean_of(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")
