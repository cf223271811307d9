"""Every kind against its formula in fp64, written sequence by sequence with autograd, in value and in gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.kernels.policy_kind import Term, Tokens
from longreach.kernels.policy_loss import KINDS, policy_loss
from longreach.kernels.policy_objective import Evaluation, prepare

NORMALIZER = 7.0
LENGTHS = [3, 1, 8, 2, 5, 1, 4]
"""One-token sequences among others; sequence 3 is absent from the ids, as an empty completion is."""


@dataclass
class One:
    """The kept tokens of one sequence, as a formula reads them: `w` is keep, `c` corrects for the generator."""

    l: Tensor  # noqa: E741  (the formulas' own letter)
    old: Tensor
    A: Tensor
    w: Tensor
    c: Tensor
    o: dict[str, Any] = field(default_factory=dict)

    @property
    def gap(self) -> Tensor:
        return (self.l - self.old).clamp(-20, 20)

    def mean(self, x: Tensor) -> Tensor:
        return (self.w * x).sum() / self.w.sum()

    def clip(self, low: float, high: float) -> tuple[float, float]:
        return 1 - self.o.get("clip_low", low), 1 + self.o.get("clip_high", high)


def sg(x: Tensor) -> Tensor:
    return x.detach()


def by_sign(positive: Tensor, yes: float, no: float) -> Tensor:
    return torch.tensor([yes if p else no for p in positive.tolist()], dtype=torch.float64)


def ppo(s: One) -> Tensor:
    r, A = s.gap.exp(), s.A
    free = r.clamp(max=s.o["delta"]) if "delta" in s.o else r
    objective = torch.minimum(free * A, r.clamp(*s.clip(0.2, 0.2)) * A)
    if "dual_clip" in s.o:
        objective = torch.where(A < 0, torch.maximum(objective, s.o["dual_clip"] * A), objective)
    return s.w * s.c * objective


def ce_gppo(s: One, beta_low: float, beta_high: float) -> Tensor:
    r, A = s.gap.exp(), s.A
    low, high = s.clip(0.2, 0.2)
    objective = r * A
    below, above = s.o.get("beta_low", beta_low) * low, s.o.get("beta_high", beta_high) * high
    objective = torch.where((r < low) & (A < 0), below / sg(r) * r * A, objective)
    objective = torch.where((r > high) & (A > 0), above / sg(r) * r * A, objective)
    if "dual_clip" in s.o:
        objective = torch.where(A < 0, torch.maximum(objective, s.o["dual_clip"] * A), objective)
    return s.w * s.c * objective


def sapo(s: One) -> Tensor:
    tau = by_sign(s.A > 0, s.o.get("temperature_pos", 1.0), s.o.get("temperature_neg", 1.05))
    return s.w * s.c * s.A * 4 / tau / (1 + torch.exp(-tau * (s.gap.exp() - 1)))


def cispo(s: One) -> Tensor:
    return s.w * s.c * sg(s.gap.exp().clamp(*s.clip(1.0, 4.0))) * s.A * s.l


def dppo(s: One, trusted: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    up, down = trusted(sg(s.l).clamp(max=0).exp(), s.old.clamp(max=0).exp())
    inside = torch.where(s.A > 0, up, down)
    return s.w * s.c * inside * sg(s.gap.exp().clamp(max=s.o.get("ratio_cap", 20.0))) * s.A * s.l


def dppo_tv(s: One) -> Tensor:
    def trusted(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return p - q <= s.o.get("divergence_high", 0.15), p - q >= -s.o.get("divergence_low", 0.15)

    return dppo(s, trusted)


def dppo_kl(s: One) -> Tensor:
    def trusted(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        kl = q * (s.old - sg(s.l)) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
        near_up, near_down = kl <= s.o.get("divergence_high", 0.05), kl <= s.o.get("divergence_low", 0.05)
        return near_up | (p <= q), near_down | (p >= q)

    return dppo(s, trusted)


def gspo(s: One) -> Tensor:
    ratio, A = s.mean(s.gap).exp(), s.mean(s.A)
    return s.w * s.c * torch.minimum(ratio * A, ratio.clamp(*s.clip(3e-4, 4e-4)) * A)


def gspo_token(s: One) -> Tensor:
    ratio = sg(s.mean(s.gap).exp()) * s.l.exp() / sg(s.l.exp())
    return s.w * s.c * torch.minimum(ratio * s.A, ratio.clamp(*s.clip(3e-4, 4e-4)) * s.A)


def luspo(s: One) -> Tensor:
    return gspo(replace(s, o={"clip_low": 2e-3, "clip_high": 2.5e-3, **s.o}))


def gmpo(s: One) -> Tensor:
    A = s.mean(s.A)
    sign = A.sign()
    bounded = s.gap.clamp(-s.o.get("clip_low", 0.4), s.o.get("clip_high", 0.4))
    return s.w * s.c * A * s.mean(sign * torch.minimum(sign * s.gap, sign * bounded)).exp()


def vespo(s: One) -> Tensor:
    log_w = sg((s.w * (s.gap + s.c.clamp(min=1e-8).log())).sum()).clamp(-18.420680743952367, 20)
    k = by_sign(s.A >= 0, s.o.get("k_pos", 2.0), s.o.get("k_neg", 3.0))
    lam = by_sign(s.A >= 0, s.o.get("lambda_pos", 3.0), s.o.get("lambda_neg", 2.0))
    return s.w * lam.exp() * log_w.exp() ** k * (-lam * log_w.exp()).exp() * s.A * s.l


def topr(s: One) -> Tensor:
    whole = sg((s.w * s.gap).sum().exp().clamp(0, 1))
    return s.w * s.c * torch.where(s.A < 0, whole, 1.0) * s.A * s.l


def kimi(s: One) -> Tensor:
    square = (s.w * s.gap).sum() ** 2
    # one number for the sequence, handed to its tokens in equal parts
    whole = s.mean(s.A) * (s.w * s.l).sum() - s.o.get("tau", 0.1) / 2 * square
    return s.mean(s.c) * whole * torch.ones_like(s.l) / len(s.l)


FORMULAS: dict[str, Callable[[One], Tensor]] = {
    "grpo": lambda s: ppo(s) / s.w.sum(),
    "dapo": ppo,
    "dr_grpo": ppo,
    "bnpo": ppo,
    "gppo": lambda s: ce_gppo(s, 1.0, 1.0),
    "ce_gppo": lambda s: ce_gppo(s, 0.75, 1.0),
    "sapo": lambda s: sapo(s) / s.w.sum(),
    "cispo": cispo,
    "topr_token": lambda s: s.w * s.c * torch.where(s.A < 0, sg(s.gap.exp().clamp(0, 1)), 1.0) * s.A * s.l,
    "reinforce": lambda s: s.w * s.c * s.A * s.l,
    "dro": lambda s: s.w * s.c * (s.A * s.l - s.o.get("beta", 0.1) / 2 * s.gap**2),
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "gspo": lambda s: gspo(s) / s.w.sum(),
    "gspo_token": lambda s: gspo_token(s) / s.w.sum(),
    "luspo": luspo,
    "gmpo": lambda s: gmpo(s) / s.w.sum(),
    "vespo": vespo,
    "topr": topr,
    "kimi": kimi,
}
"""Kind to the terms of one sequence, whose sum is its objective before the normalizer."""

NORMALIZERS = {
    "sequences": {"grpo", "sapo", "topr_token", "gspo", "gspo_token", "luspo", "gmpo", "topr", "kimi"},
    "tokens": {"dapo", "gppo", "ce_gppo", "cispo", "reinforce", "dro", "vespo"},
    "sequences_x_limit": {"dr_grpo", "dppo_tv", "dppo_kl"},
    "local_tokens": {"bnpo"},
}

CLIPS = {"clip_low": 0.1, "clip_high": 0.3}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    # two-sided where the bound of negative advantages lies inside the clip range, and outside of it
    "grpo": [CLIPS, {"dual_clip": 1.5}, {"delta": 1.1}, {"delta": 1.5}, {"delta": 3.0, "dual_clip": 1.3}],
    "dapo": [CLIPS],
    "ce_gppo": [{**CLIPS, "beta_low": 0.5, "beta_high": 0.3}, {"dual_clip": 1.5}],
    "sapo": [{"temperature_pos": 2.0, "temperature_neg": 0.5}],
    "cispo": [{"clip_low": 0.2, "clip_high": 0.3}],
    "dro": [{"beta": 2.0}],
    "dppo_tv": [{"divergence_low": 0.01, "divergence_high": 0.02, "ratio_cap": 1.1}],
    "dppo_kl": [{"divergence_low": 0.001, "divergence_high": 0.002, "ratio_cap": 1.1}],
    "gspo": [{"clip_low": 0.05, "clip_high": 0.2}],
    "gspo_token": [{"clip_low": 0.05, "clip_high": 0.2}],
    "luspo": [{"clip_low": 0.05, "clip_high": 0.2}],
    "gmpo": [{"clip_low": 0.2, "clip_high": 0.1}, {"clip_low": 2.0}],
    "vespo": [{"k_pos": 1.1, "lambda_pos": 2.1, "k_neg": 0.3, "lambda_neg": 0.7}],
    "kimi": [{"tau": 2.0}],
}

SPREADS = {"gspo": 1e-3, "gspo_token": 1e-3, "luspo": 5e-3, "cispo": 1.5}
"""Log-ratios that leave some inside the bounds and some outside, on both sides; 0.3 for the others."""


@dataclass
class Batch:
    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    sequence_ids: Tensor
    rollout_logp: Tensor
    keep: Tensor | None


def batch(regime: str, kind: str, keep: str = "all") -> Batch:
    generator = torch.Generator().manual_seed(3)
    n = sum(LENGTHS)
    lengths = torch.tensor(LENGTHS)
    ids = torch.repeat_interleave(torch.tensor([0, 1, 2, 4, 5, 6, 7]), lengths)

    def draw() -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    old = -draw().abs()
    advantages = torch.repeat_interleave(torch.tensor([1.2, -0.7, 0.0, -1.5, 0.4, 2.0, -0.3]), lengths).double()
    noise, rollout = draw(), old + 0.2 * draw()
    logp = {
        "near": old + SPREADS.get(kind, 0.3) * noise,
        "far": old + 4 * noise,
        "peaked": old + torch.where(noise > 0, 30.0, -30.0),
        # in the advantage's direction, past every bound
        "clipped": old + torch.where(advantages < 0, -1.0, 1.0),
        "on-policy": old.clone(),
        # advantages of their own for each token, as turns and process rewards have
        "per token": old + SPREADS.get(kind, 0.3) * noise,
    }[regime]
    if regime == "per token":
        advantages = draw()
    weights = None
    if keep != "all":
        weights = torch.rand(n, generator=generator, dtype=torch.float64) * 2
        weights[torch.rand(n, generator=generator) < 0.3] = 0
        weights[:3] = 0  # a sequence of which nothing is kept
        weights = weights if keep == "weights" else weights != 0
    return Batch(logp, old, advantages, ids, rollout, weights)


def by_formula(b: Batch, kind: str, correction: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient, sequence by sequence."""
    logp = b.logp.clone().requires_grad_()
    weights = torch.ones_like(logp) if b.keep is None else b.keep.double()
    total = torch.zeros((), dtype=torch.float64)
    for i in b.sequence_ids.unique():
        rows = ((b.sequence_ids == i) & (weights > 0)).nonzero().squeeze(1)
        if len(rows):
            c = torch.ones(len(rows), dtype=torch.float64) if correction is None else correction[rows]
            one = One(logp[rows], b.old_logp[rows], b.advantages[rows], weights[rows], c, options)
            total = total - FORMULAS[kind](one).sum() / NORMALIZER
    (gradient,) = torch.autograd.grad(total, logp)
    return total.detach(), gradient


def same(got: Tensor, want: Tensor) -> None:
    """Equal but for a few roundings of the largest entries."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13 * max(1.0, float(want.abs().max())))


def arguments(b: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return b.old_logp, b.advantages, b.sequence_ids


REGIMES = ("near", "far", "peaked", "clipped", "on-policy", "per token")


def test_every_kind_has_its_formula_and_its_normalizer() -> None:
    assert FORMULAS.keys() == KINDS.keys()
    assert {kind: spec.normalizer for kind, spec in KINDS.items()} == {
        kind: normalizer for normalizer, kinds in NORMALIZERS.items() for kind in kinds
    }


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("keep", ["all", "some", "weights"])
def test_value_and_gradient(kind: str, regime: str, keep: str) -> None:
    b = batch(regime, kind, keep)
    logp = b.logp.clone().requires_grad_()
    got = policy_loss(logp, *arguments(b), kind=kind, normalizer=NORMALIZER, keep=b.keep)
    want, gradient = by_formula(b, kind)
    same(got.loss.detach(), want)
    got.loss.backward()
    assert logp.grad is not None
    same(logp.grad, gradient)


@pytest.mark.parametrize(("kind", "options"), [(kind, o) for kind, many in VARIANTS.items() for o in many])
@pytest.mark.parametrize("regime", ["near", "far", "per token"])
def test_options(kind: str, options: dict[str, Any], regime: str) -> None:
    b = batch(regime, "", "some")  # the wide spread: these bounds are wide
    logp = b.logp.clone().requires_grad_()
    got = policy_loss(logp, *arguments(b), kind=kind, normalizer=NORMALIZER, keep=b.keep, **options)
    want, gradient = by_formula(b, kind, **options)
    same(got.loss.detach(), want)
    same(torch.autograd.grad(got.loss, logp)[0], gradient)


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("regime", ["near", "far", "per token"])
@pytest.mark.parametrize("keep", ["all", "weights"])
def test_with_a_generator_to_correct_for(kind: str, regime: str, keep: str) -> None:
    b = batch(regime, kind, keep)
    rho = (b.old_logp - b.rollout_logp).exp()
    correction = torch.where((rho < 0.8) | (rho > 1.3), 0.0, rho.clamp(max=1.1))
    assert 0 < int((correction == 0).sum()) < len(rho)
    logp = b.logp.clone().requires_grad_()
    got = policy_loss(
        logp, *arguments(b), kind=kind, normalizer=NORMALIZER, keep=b.keep, rollout_logp=b.rollout_logp,
        importance_range=(0.8, 1.3), importance_cap=1.1,
    )  # fmt: skip
    want, gradient = by_formula(b, kind, correction)
    same(got.loss.detach(), want)
    same(torch.autograd.grad(got.loss, logp)[0], gradient)


@pytest.mark.parametrize("kind", FORMULAS)
def test_the_near_regime_meets_both_sides_of_each_bound(kind: str) -> None:
    b = batch("near", kind)
    got = policy_loss(b.logp, *arguments(b), kind=kind, normalizer=NORMALIZER)
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        if name in got.metrics and kind not in ("cispo", "dppo_tv", "dppo_kl"):
            assert 0 < got.metrics[name].value < 1, name


Mutant = Callable[[Tokens, Term], Term]


def of_slope(change: Callable[[Tokens, Tensor], Tensor]) -> Mutant:
    return lambda tokens, term: term._replace(slope=change(tokens, term.slope))


def of_value(change: Callable[[Tokens, Tensor], Tensor]) -> Mutant:
    return lambda tokens, term: term._replace(value=change(tokens, term.value))


CHANGES: dict[str, Callable[[Tokens, Tensor], Tensor]] = {
    "sign flipped": lambda _, x: -x,
    "sign flipped where A < 0": lambda t, x: torch.where(t.advantages < 0, -x, x),
    "dropped where A > 0": lambda t, x: torch.where(t.advantages > 0, 0.0, x),
    "dropped where A < 0": lambda t, x: torch.where(t.advantages < 0, 0.0, x),
    "doubled": lambda _, x: 2 * x,
    "doubled where logp rose": lambda t, x: torch.where(t.log_ratio > 0, 2 * x, x),
}
SLOPES: dict[str, tuple[Callable[[Tokens, Tensor], Tensor], set[str]]] = {
    "bounds ignored": (lambda t, _: t.ratio * t.advantages, FORMULAS.keys() - {"sapo"}),
    "ratio dropped": (lambda t, _: t.advantages, FORMULAS.keys() - {"reinforce"}),
    "only the ratio kept": (lambda t, x: torch.where(x == 0, 0.0, t.ratio), set(FORMULAS)),
}


def evaluation(b: Batch, kind: str, mutant: Mutant | None = None) -> Evaluation:
    objective = prepare(*arguments(b), kind=kind, normalizer=NORMALIZER, with_entropy=False, dtype=torch.float64)
    if mutant is not None:
        right, change = objective.kind.objective, mutant
        changed = replace(objective.kind, objective=lambda tokens, options: change(tokens, right(tokens, options)))
        objective = replace(objective, kind=changed)
    return objective.evaluate(b.logp)


def agree(b: Batch, kind: str, got: Evaluation) -> None:
    want, gradient = by_formula(b, kind)
    same(got.loss, want)
    same(got.g, gradient)


MUTANTS: dict[str, Mutant] = {
    **{f"slope {name}": of_slope(change) for name, change in CHANGES.items()},
    **{f"value {name}": of_value(change) for name, change in CHANGES.items()},
    **{f"slope: {name}": of_slope(change) for name, (change, _) in SLOPES.items()},
}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_term_is_caught(kind: str, name: str) -> None:
    if name.startswith("slope: ") and kind not in SLOPES[name.removeprefix("slope: ")][1]:
        return
    b = batch("near", kind)
    agree(b, kind, evaluation(b, kind))
    with pytest.raises(AssertionError):
        agree(b, kind, evaluation(b, kind, MUTANTS[name]))
