"""The clipped losses against their formula token by token in Python floats; what every loss promises, through autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.kernels import Mean, PolicyLoss, policy_loss
from longreach.kernels.policy_loss import KINDS

CLIPPED = ("grpo", "dapo", "dr_grpo", "bnpo")

LENGTHS = [3, 1, 8, 2, 5, 1]
"""One-token sequences among others; sequence 3 is absent from the ids, as an empty completion is."""


@dataclass
class Batch:
    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    sequence_ids: Tensor
    entropy: Tensor
    rollout_logp: Tensor
    ref_logp: Tensor
    keep: Tensor

    def arguments(self, *names: str) -> dict[str, Any]:
        always = ("logp", "old_logp", "advantages", "sequence_ids")
        return {name: getattr(self, name) for name in (*always, *names)}

    def part(self, rows: Tensor) -> Batch:
        return Batch(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def batch(spread: float = 0.3, dtype: torch.dtype = torch.float64) -> Batch:
    """Log-ratios of the given spread: 0.3 puts some outside the clip range on both sides, 4 nearly all."""
    generator = torch.Generator().manual_seed(7)
    n = sum(LENGTHS)
    ids = torch.repeat_interleave(torch.tensor([0, 1, 2, 4, 5, 6]), torch.tensor(LENGTHS))

    def draw() -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    old = -draw().abs()
    logp, rollout, ref = old + spread * draw(), old + 0.2 * draw(), old + 0.2 * draw()
    advantages = torch.repeat_interleave(torch.tensor([1.2, -0.7, 0.0, -1.5, 0.4, 2.0]), torch.tensor(LENGTHS))
    keep = torch.rand(n, generator=generator) > 0.3
    keep[:3] = False  # a sequence of which nothing is kept
    entropy, advantages = draw().abs(), advantages.double()
    logp, old, advantages, entropy, rollout, ref = (x.to(dtype) for x in (logp, old, advantages, entropy, rollout, ref))
    return Batch(logp, old, advantages, ids, entropy, rollout, ref, keep)


def by_hand(b: Batch, kind: str, normalizer: float, keep: list[bool], **o: float) -> tuple[Tensor, Tensor]:
    """The formula, token by token, in Python floats; gradients of logp by hand (d ratio / d logp = ratio)."""
    low, high, cap = o.get("clip_low", 0.2), o.get("clip_high", 0.2), o.get("importance_cap", 0.0)
    loss, grads = 0.0, []
    rows = zip(*(getattr(b, f.name).tolist() for f in fields(b)), strict=True)
    for (logp, old, adv, seq, entropy, rollout, ref, _), kept in zip(rows, keep, strict=True):
        count = sum(k for k, s in zip(keep, b.sequence_ids.tolist(), strict=True) if s == seq) if kind == "grpo" else 1
        ratio = math.exp(logp - old)
        bounded = min(max(ratio, 1 - low), 1 + high)
        weight = min(math.exp(old - rollout), cap) if cap else 1.0
        d = ref - logp
        token = -weight * min(ratio * adv, bounded * adv) + o.get("kl_weight", 0.0) * (math.exp(d) - d - 1)
        token -= o.get("entropy_weight", 0.0) * entropy
        slope = -weight * ratio * adv if ratio * adv <= bounded * adv else 0.0
        slope += o.get("kl_weight", 0.0) * (1 - math.exp(d))
        loss += token / count / normalizer if kept else 0.0
        grads.append(slope / count / normalizer if kept else 0.0)
    return torch.tensor(loss, dtype=torch.float64), torch.tensor(grads, dtype=torch.float64)


OPTIONS = {
    "plain": ({}, ()),
    "clip higher": ({"clip_low": 0.1, "clip_high": 0.28}, ()),
    "everything": (
        {"kl_weight": 0.3, "entropy_weight": 0.05, "importance_cap": 1.1},
        ("ref_logp", "entropy", "rollout_logp"),
    ),
}


@pytest.mark.parametrize("kind", CLIPPED)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient(kind: str, options: str, spread: float, masked: bool) -> None:
    b, (numbers, names) = batch(spread), OPTIONS[options]
    b.logp.requires_grad_()
    b.entropy.requires_grad_()
    keep = b.keep if masked else torch.ones_like(b.keep)
    got = policy_loss(**b.arguments(*names), kind=kind, normalizer=7.0, keep=b.keep if masked else None, **numbers)
    want, slopes = by_hand(b, kind, 7.0, keep.tolist(), **numbers)
    torch.testing.assert_close(got.loss.detach(), want, rtol=1e-12, atol=1e-12)
    got.loss.backward()
    torch.testing.assert_close(b.logp.grad, slopes, rtol=1e-12, atol=1e-12)
    if "entropy" in names:
        assert b.entropy.grad is not None
        counts = torch.tensor([max(1, int(keep[b.sequence_ids == s].sum())) for s in b.sequence_ids])
        per_token = -0.05 / 7.0 * keep / (counts if kind == "grpo" else 1)
        torch.testing.assert_close(b.entropy.grad, per_token.double())


# the other kinds hold weights without gradient, which finite differences can't know
@pytest.mark.parametrize("kind", [*CLIPPED, "sapo", "dro", "gspo", "luspo", "gmpo", "kimi"])
def test_gradcheck(kind: str) -> None:
    b = batch()

    def run(logp: Tensor, entropy: Tensor) -> Tensor:
        b.logp, b.entropy = logp, entropy
        arguments = b.arguments("entropy", "rollout_logp", "ref_logp", "keep")
        options: dict[str, Any] = {"kl_weight": 0.3, "kl": "k3", "entropy_weight": 0.1, "importance_cap": 1.1}
        return policy_loss(**arguments, kind=kind, normalizer=3.0, **options).loss

    assert torch.autograd.gradcheck(run, (b.logp.clone().requires_grad_(), b.entropy.clone().requires_grad_()))


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_estimators(name: str) -> None:
    b = batch()
    b.logp.requires_grad_()
    b.advantages.zero_()
    got = policy_loss(**b.arguments("ref_logp"), kind="dapo", normalizer=1.0, kl_weight=1.0, kl=name)
    x = (b.logp - b.ref_logp).detach()
    value = {"k1": x, "k2": x**2 / 2, "k3": torch.exp(-x) + x - 1}[name]
    slope = {"k1": torch.ones_like(x), "k2": x, "k3": 1 - torch.exp(-x)}[name]
    torch.testing.assert_close(got.loss.detach(), value.sum())
    assert got.metrics["kl"].value == pytest.approx(float(value.mean()))
    torch.testing.assert_close(torch.autograd.grad(got.loss, b.logp)[0], slope)


def test_all_clipped_tokens_have_exactly_no_gradient() -> None:
    b = batch()
    b.advantages = torch.ones_like(b.logp)
    b.logp = (b.old_logp + 1.0).requires_grad_()
    got = policy_loss(**b.arguments(), kind="grpo", normalizer=6.0)
    got.loss.backward()
    assert b.logp.grad is not None
    assert not b.logp.grad.any()
    assert got.loss.item() == pytest.approx(-1.2)
    assert got.metrics["clip_ratio/high_mean"].value == 1.0
    assert got.metrics["clip_ratio/low_mean"].value == 0.0


def split(b: Batch, parts: list[list[int]], **how: Any) -> tuple[Tensor, Tensor, dict[str, Mean]]:
    """Summed losses, gradients in row order and added metrics over micro-batches of whole sequences."""
    loss, grads, metrics = torch.zeros((), dtype=b.logp.dtype), torch.zeros_like(b.logp), {}
    for part in parts:
        rows = torch.isin(b.sequence_ids, torch.tensor(part)).nonzero().squeeze(1)
        piece = b.part(rows)
        piece.logp.requires_grad_()
        got: PolicyLoss = policy_loss(**piece.arguments("entropy", "rollout_logp", "ref_logp", "keep"), **how)
        got.loss.backward()
        assert piece.logp.grad is not None
        loss, grads[rows] = loss + got.loss.detach(), piece.logp.grad
        metrics = {name: metrics[name] + mean if metrics else mean for name, mean in got.metrics.items()}
    return loss, grads, metrics


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_micro_batches_add_up(kind: str, dtype: torch.dtype) -> None:
    how = {"kind": kind, "normalizer": 6.0, "kl_weight": 0.1, "entropy_weight": 0.1, "importance_cap": 1.2}
    b, tolerance = batch(dtype=dtype), 20 * torch.finfo(dtype).eps
    whole = split(b, [[0, 1, 2, 4, 5, 6]], **how)
    # four parts; one of them, sequence 3, is empty
    parts = split(b, [[0, 1], [2, 4], [3], [5, 6]], **how)
    torch.testing.assert_close(parts[0], whole[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(parts[1], whole[1])
    assert parts[2].keys() == whole[2].keys()
    for name, mean in parts[2].items():
        assert mean.value == pytest.approx(whole[2][name].value, rel=tolerance), name


def test_metrics_are_means_over_kept_tokens() -> None:
    b = batch()
    got = policy_loss(**b.arguments("entropy", "rollout_logp", "ref_logp", "keep"), kind="grpo", normalizer=1.0)
    keep, ratio = b.keep, torch.exp(b.logp - b.old_logp)
    low = (ratio < 0.8) & (b.advantages < 0)
    high = (ratio > 1.2) & (b.advantages > 0)
    assert low[keep].any()
    assert high[keep].any()
    want = {
        "ratio/mean": ratio,
        "clip_ratio/low_mean": low.double(),
        "clip_ratio/high_mean": high.double(),
        "clip_ratio/region_mean": (low | high).double(),
        "entropy": b.entropy,
        "kl": torch.exp(b.ref_logp - b.logp) - (b.ref_logp - b.logp) - 1,
        "sampling/importance_sampling_ratio/mean": torch.exp(b.old_logp - b.rollout_logp),
    }
    apart = {name for name in got.metrics if name.startswith("sampling/") and name not in want}
    assert got.metrics.keys() - apart == want.keys()
    for name, values in want.items():
        assert got.metrics[name].value == pytest.approx(float(values[keep].mean())), name
    bare = policy_loss(**b.arguments(), kind="grpo", normalizer=1.0)
    assert not {"entropy", "kl", "sampling/importance_sampling_ratio/mean"} & bare.metrics.keys()


def test_importance_is_capped_and_carries_no_gradient() -> None:
    one = torch.zeros(1, dtype=torch.float64)
    rollout = (one - 3.0).requires_grad_()
    logp = one.clone().requires_grad_()
    how = {"kind": "dapo", "normalizer": 1.0, "rollout_logp": rollout, "importance_cap": 2.0}
    got = policy_loss(logp, one, one + 1, one.long(), **how)
    assert got.loss.item() == -2.0
    assert got.metrics["sampling/importance_sampling_ratio/mean"].value == 2.0
    got.loss.backward()
    assert rollout.grad is None
    assert logp.grad is not None
    assert logp.grad.item() == -2.0


def test_float_keep_weighs_tokens() -> None:
    b = batch()
    weights = torch.linspace(0, 2, len(b.logp), dtype=torch.float64)
    got = policy_loss(**b.arguments(), keep=weights, kind="dapo", normalizer=1.0).loss
    ratio = torch.exp(b.logp - b.old_logp)
    tokens = torch.minimum(ratio * b.advantages, ratio.clamp(0.8, 1.2) * b.advantages)
    torch.testing.assert_close(got, -(weights * tokens).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [100.0, 1e30, -100.0, -1e30])
def test_huge_log_ratios_give_neither_inf_nor_nan(kind: str, size: float) -> None:
    logp = torch.full((3,), size, requires_grad=True)
    entropy = torch.ones(3, requires_grad=True)
    zeros = torch.zeros(3)
    options: dict[str, Any] = {"kl_weight": 1.0, "entropy_weight": 0.1, "importance_cap": 2.0}
    extras = {"entropy": entropy, "ref_logp": zeros, "rollout_logp": torch.full((3,), -size)}
    advantages = torch.tensor([1.0, -1.0, 0.0])
    got = policy_loss(logp, zeros, advantages, torch.arange(3), kind=kind, normalizer=1.0, **extras, **options)
    got.loss.backward()
    assert logp.grad is not None
    assert torch.isfinite(got.loss)
    assert torch.isfinite(logp.grad).all()
    assert all(math.isfinite(mean.value) for mean in got.metrics.values())


def test_masked_tokens_may_hold_anything() -> None:
    b = batch()
    clean = policy_loss(**b.arguments("keep"), kind="grpo", normalizer=1.0).loss
    b.logp[~b.keep] = math.nan
    b.old_logp[~b.keep] = -math.inf
    b.logp.requires_grad_()
    got = policy_loss(**b.arguments("keep"), kind="grpo", normalizer=1.0).loss
    assert torch.equal(got, clean)
    got.backward()
    assert b.logp.grad is not None
    assert torch.isfinite(b.logp.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_a_differentiable_zero(kind: str) -> None:
    empty = torch.zeros(0, requires_grad=True)
    got = policy_loss(empty, empty, empty, torch.zeros(0, dtype=torch.long), kind=kind, normalizer=4.0)
    got.loss.backward()
    assert got.loss.item() == 0.0
    assert empty.grad is not None
    assert math.isnan(got.metrics["ratio/mean"].value)


def test_what_cannot_be_is_refused_with_a_way_out() -> None:
    b = batch()
    good = {**b.arguments(), "kind": "grpo", "normalizer": 1.0}
    bad = [
        ({"kind": "drgrpo"}, "did you mean 'dr_grpo'"),
        ({"clip_hgih": 0.3}, "unknown option 'clip_hgih'.*did you mean 'clip_high'"),
        ({"normalizer": 0.0}, "normalizer must be positive"),
        ({"old_logp": b.logp[:3]}, "old_logp must have logp's shape"),
        ({"keep": b.keep[:3]}, "keep must have logp's shape"),
        ({"sequence_ids": b.sequence_ids.flip(0)}, "must never fall"),
        ({"kl_weight": 0.1}, "needs ref_logp"),
        ({"entropy_weight": 0.1}, "needs entropy"),
        ({"importance_cap": 2.0}, "needs rollout_logp"),
        ({"importance_cap": -2.0, "rollout_logp": b.rollout_logp}, "importance_cap must be positive"),
        ({"kl": "k4"}, "did you mean"),
        ({"clip_low": -0.1}, "clip_low must not be negative"),
        ({"clip_low": 1.5}, "clip_low must be at most 1"),
        ({"logp": b.logp[None]}, r"logp must be \[N\]"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            policy_loss(**{**good, **change})
