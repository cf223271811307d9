"""Warm-up SFT: the loss is over response tokens only, and every example weighs the same however long its response is.

QwenLong-L1 (arXiv 2505.17667, eq. 11): L = mean over examples of (1 / |y|) * sum_t -log p(y_t | x, y_<t). Examples are packed
by token budget through the same `completion_hidden` as everything else: an example is a group of one completion.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..engine import Group, pack_groups
from ..engine.optimizer import Schedule
from ..kernels import Mean
from .policy import Policy
from .prompts import Prompt
from .run import Stopwatch
from .seeds import derive
from .step_metrics import add_means


@dataclass(frozen=True)
class SftConfig:
    """`upper` bounds the prompt with its response, in tokens; longer rows are left out and reported."""

    data: str
    upper: int
    learning_rate: float
    epochs: int = 1
    batch_size: int = 128
    warmup_steps: int = 0
    schedule: str = "constant"
    micro_batch_tokens: int = 65536

    def __post_init__(self) -> None:
        if self.micro_batch_tokens < self.upper:
            raise ValueError(
                f"sft.micro_batch_tokens = {self.micro_batch_tokens} can't hold an example of sft.upper = {self.upper} tokens: raise it"
            )
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"sft.epochs and sft.batch_size must be at least 1, not {self.epochs} and {self.batch_size}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"sft.warmup_steps must be 0 or more, not {self.warmup_steps}")
        self.rates()  # refuses an unknown schedule

    def rates(self) -> Schedule:
        return Schedule(self.learning_rate, self.warmup_steps, self.schedule)


def sft_examples(policy: Policy, prompts: Sequence[Prompt], upper: int) -> tuple[list[Group], int]:
    """Rows that fit as groups of one completion, and how many did not fit."""
    groups = []
    for prompt in prompts:
        assert prompt.example.response is not None, "the reader was asked for responses"
        groups.append(Group(torch.tensor(prompt.ids), [policy.response_ids(prompt.example.response)]))
    fitting = [group for group in groups if group.tokens <= upper]
    return fitting, len(groups) - len(fitting)


def sft_steps(count: int, config: SftConfig) -> int:
    """Updates of the whole stage: every epoch ends with a batch that may be smaller."""
    return config.epochs * -(-count // config.batch_size)


def sft_batch(groups: Sequence[Group], config: SftConfig, seed: int, step: int) -> list[Group]:
    """Examples of update `step` (from 0): a function of the seed and the step, so that resuming needs no state."""
    epoch, batch = divmod(step, -(-len(groups) // config.batch_size))
    order = list(range(len(groups)))
    random.Random(derive(seed, "sft", epoch)).shuffle(order)
    return [groups[i] for i in order[batch * config.batch_size : (batch + 1) * config.batch_size]]


def sft_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Group],
    config: SftConfig,
    *,
    learning_rate: float,
    grad_clip: float,
    watch: Stopwatch | None = None,
) -> dict[str, float]:
    """One update. The loss is divided by the examples of the whole batch, so micro-batches don't change it."""
    watch = watch or Stopwatch()
    sums: dict[str, Mean] = {}
    tokens = sum(len(g.completions[0]) for g in batch)
    with watch("step"), watch("update_actor"):
        rows = pack_groups(batch, config.micro_batch_tokens)
        for turn in policy.ranks.rows([row.tokens for row in rows]):
            if turn is None:
                policy.idle()
                continue
            row = rows[turn]
            lengths = torch.tensor(row.completion_lengths, device=policy.model.device)
            # the policy gradient of examples whose advantage is 1 / |y| on each token
            made = policy.loss(
                row.groups, 1.0, old_logp=None, advantages=(1.0 / lengths).repeat_interleave(lengths),
                kind="reinforce", normalizer=len(batch),
            )  # fmt: skip
            made.loss.backward()
            loss = made.loss.detach().double()
            add_means(sums, {"loss": Mean(loss, torch.ones_like(loss)), "entropy": made.metrics["entropy"]})
        sums = policy.ranks.total(sums)
        norm = policy.update(optimizer, learning_rate, grad_clip)
    processed = sum(group.tokens for group in batch)
    return {
        "loss": float(sums["loss"].total), "entropy": float(sums["entropy"].total) / tokens, "grad_norm": norm, "learning_rate": learning_rate,
        "num_tokens": processed, "perf/throughput": processed / watch.seconds["timing_s/step"], **watch.seconds,
    }  # fmt: skip
