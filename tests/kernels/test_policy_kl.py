"""KL estimators against autograd of their formulas, with and without the ratio that makes them unbiased off-policy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longreach.kernels.policy_loss import policy_loss

GAPS = torch.tensor([0.0, 0.3, -0.4, 2.0, -3.0, 30.0, -30.0], dtype=torch.float64)
"""ref - logp, up to beyond the clamp."""
MOVES = torch.tensor([0.2, 0.0, -0.5, 1.0, -0.3, 0.1, -0.1], dtype=torch.float64)
"""logp - old."""

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: -d,
    "k2": lambda d: 0.5 * d**2,
    "k3": lambda d: d.exp() - 1 - d,
}


def ours(estimator: str, corrected: bool, on_policy: bool = False) -> tuple[Tensor, Tensor, float]:
    """Loss, gradient and the metric: no advantage, so the KL term alone, weighed 0.7."""
    logp = torch.full((7,), -2.0, dtype=torch.float64, requires_grad=True)
    ref = logp.detach() + GAPS
    old = None if on_policy else logp.detach() - MOVES
    got = policy_loss(
        logp, old, torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.long), kind="dapo", normalizer=2.0,
        ref_logp=ref, kl_weight=0.7, kl=estimator, kl_bias_correction=corrected,
    )  # fmt: skip
    return got.loss.detach(), torch.autograd.grad(got.loss, logp)[0], got.metrics["kl"].value


@pytest.mark.parametrize("estimator", FORMULAS)
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("on_policy", [False, True])
def test_value_and_gradient(estimator: str, corrected: bool, on_policy: bool) -> None:
    logp = torch.full((7,), -2.0, dtype=torch.float64, requires_grad=True)
    kl = FORMULAS[estimator]((logp.detach() + GAPS - logp).clamp(-20, 20))
    if corrected:
        old = logp.detach() if on_policy else logp.detach() - MOVES
        kl = kl * (logp - old).clamp(-20, 20).exp()
    want = 0.7 * kl.sum() / 2
    loss, gradient, metric = ours(estimator, corrected, on_policy)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(want, logp)[0])
    assert metric == pytest.approx(float(kl.detach().mean()))


@pytest.mark.parametrize("estimator", FORMULAS)
def test_the_correction_makes_a_difference(estimator: str) -> None:
    plain, corrected = ours(estimator, False), ours(estimator, True)
    assert plain[0] != corrected[0]
    assert not torch.allclose(plain[1], corrected[1])
    # on-policy the values are equal, the gradients are not: the tokens' own distribution moves too
    plain, corrected = ours(estimator, False, on_policy=True), ours(estimator, True, on_policy=True)
    assert plain[0] == corrected[0]
    assert not torch.allclose(plain[1], corrected[1])


def test_the_corrected_estimate_is_unbiased_off_policy() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new, ref = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(3))
    exact = (new.exp() * (new - ref)).sum()
    # the expectation over tokens drawn from old: `keep` weighs each token by its probability
    for estimator in ("k1", "k3"):
        got = policy_loss(
            new, old, torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.long), kind="dapo", normalizer=1.0,
            ref_logp=ref, keep=old.exp(), kl_weight=1.0, kl=estimator, kl_bias_correction=True,
        )  # fmt: skip
        torch.testing.assert_close(got.loss, exact)


def test_a_ratio_beyond_the_clamp_has_no_slope() -> None:
    logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    got = policy_loss(
        logp, logp.detach() - 30, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.long), kind="dapo",
        normalizer=1.0, ref_logp=logp.detach() + 0.5, kl_weight=1.0, kl="k1", kl_bias_correction=True,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(got.loss, logp)
    # of e^20 (logp - ref) only the second factor moves
    torch.testing.assert_close(gradient, torch.tensor([20.0], dtype=torch.float64).exp())
