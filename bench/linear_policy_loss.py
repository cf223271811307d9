"""`kernels.linear_policy_loss`: hidden rows straight to a GRPO-family loss and its gradients, beside the peers that can.

Kind `dapo` (token mean), SEQUENCES of equal length, ratios near 1 with some clipped. Work is counted as in
linear_logprob: 6NDV operations for `both`. `in two calls` is policy_loss(linear_logprob(...)), what a loss that reduces
over a sequence first has to do. Liger wants rows as padded [batch, length] and one advantage a sequence, which equal
lengths give without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longreach.kernels import linear_logprob, linear_policy_loss, policy_loss

from . import exact
from . import linear_logprob as rows_op
from .case import Case, Contender, Gap, Problem, gather
from .linear_logprob import DTYPES as DTYPES
from .peers import need

PASSES = ("both",)
SEQUENCES = 8
SIZES = rows_op.SIZES


class Batch(NamedTuple):
    """Inputs of one call: leaves, targets, old log-probs, one advantage a token, sequence ids."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old: Tensor
    advantages: Tensor
    ids: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight


def inputs(case: Case) -> Batch:
    hidden, weight, targets = rows_op.inputs(case)
    n = len(targets)
    with torch.no_grad():
        logp = linear_logprob(hidden, weight, targets, backend="chunked").logp
        old = logp + 0.1 * torch.randn(n, device=case.device)
    ids = torch.arange(SEQUENCES, device=case.device).repeat_interleave(n // SEQUENCES)
    return Batch(hidden, weight, targets, old, torch.randn(SEQUENCES, device=case.device)[ids], ids)


def formula(logp: Tensor, batch: Batch) -> Tensor:
    """-mean of min(r A, clip(r, 0.8, 1.2) A) over tokens (arXiv 2503.14476 eq. 8), in logp's dtype."""
    advantages = batch.advantages.to(logp.dtype)
    ratio = (logp - batch.old.to(logp.dtype)).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def problem(case: Case) -> Problem:
    batch = inputs(case)
    contenders: list[Contender | Gap] = []
    for backend in rows_op.OURS:
        one, two = f"longreach, {backend}", f"longreach, {backend}, in two calls"
        contenders.append(gather(one, lambda name=one, backend=backend: fused(name, backend, batch), ours=True))
        contenders.append(gather(two, lambda name=two, backend=backend: two_calls(name, backend, batch), ours=True))
    contenders.append(contender("torch, full logits", lambda: formula(naive(batch), batch), batch))
    compiled = rows_op.compile_fresh(whole)
    contenders.append(contender("torch.compile, full logits", lambda: compiled(*batch), batch))
    contenders.append(gather("Liger, fused linear GRPO", lambda: liger(case, batch)))
    contenders.append(gather("TRL, chunked, our loss", lambda: trl(batch)))
    flops, traffic = rows_op.work(case)

    def truth() -> Any:
        return exact.linear(batch.hidden.detach(), batch.weight.detach(), batch.targets, lambda p: formula(p, batch))

    return Problem(contenders, flops, traffic, truth, ("dhidden", "dweight"))


def naive(batch: Batch) -> Tensor:
    return rows_op.naive(batch.hidden, batch.weight, batch.targets)[0]


def whole(*tensors: Tensor) -> Tensor:
    """The naive way in one function, for torch.compile."""
    batch = Batch(*tensors)
    return formula(naive(batch), batch)


def contender(
    name: str, loss: Callable[[], Tensor], batch: Batch, package: str | None = None, ours: bool = False
) -> Contender:
    def backward(value: Tensor) -> Sequence[Tensor]:
        return rows_op.grads(value, batch.leaves)

    return Contender(name, "loss", loss, loss, backward, package, ours)


def fused(name: str, backend: str, batch: Batch) -> Contender:
    rows_op.probe(backend, *batch.leaves)

    def loss() -> Tensor:
        return linear_policy_loss(*batch, kind="dapo", normalizer=len(batch.targets), backend=backend).loss

    return contender(name, loss, batch, ours=True)


def two_calls(name: str, backend: str, batch: Batch) -> Contender:
    rows_op.probe(backend, *batch.leaves)

    def loss() -> Tensor:
        logp = linear_logprob(*batch[:3], backend=backend).logp
        return policy_loss(logp, *batch[3:], kind="dapo", normalizer=len(logp)).loss

    return contender(name, loss, batch, ours=True)


def liger(case: Case, batch: Batch) -> Contender:
    module = need("liger_kernel.chunked_loss")
    function = module.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo")
    n, per = len(batch.targets), len(batch.targets) // SEQUENCES
    targets, old = batch.targets.view(SEQUENCES, per), batch.old.view(SEQUENCES, per)
    advantages, mask = batch.advantages[::per], torch.ones(SEQUENCES, per, device=case.device)

    def loss() -> Tensor:
        hidden = batch.hidden.view(SEQUENCES, per, -1)
        return function(
            hidden, batch.weight, targets, mask, advantages, old_per_token_logps=old, num_items_in_batch=n
        )[0]  # fmt: skip

    return contender("Liger, fused linear GRPO", loss, batch, "liger-kernel")


def trl(batch: Batch) -> Contender:
    package = rows_op.trl_package()

    def loss() -> Tensor:
        return formula(rows_op.trl_rows(*batch[:3])[0], batch)

    return contender("TRL, chunked, our loss", loss, batch, package)
