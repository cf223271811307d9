"""Every option of every kind changes something; every bad one is refused with the limit and the way out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.kernels.policy_loss import KINDS, policy_loss
from longreach.kernels.policy_objective import COMMON_OPTIONS

# values other than the defaults, which the inputs below are made to feel
OWN: dict[str, Any] = {
    "clip_low": 0.05, "clip_high": 0.05, "dual_clip": 1.5, "delta": 1.3, "beta_low": 0.5, "beta_high": 0.5,
    "temperature_pos": 2.0, "temperature_neg": 2.0, "beta": 1.0, "divergence_low": 1e-3, "divergence_high": 1e-3,
    "ratio_cap": 1.1, "k_pos": 1.0, "k_neg": 1.0, "lambda_pos": 1.0, "lambda_neg": 1.0, "tau": 1.0,
}  # fmt: skip
COMMON: dict[str, dict[str, Any]] = {
    "kl_weight": {"kl_weight": 0.5},
    "kl": {"kl_weight": 0.5, "kl": "k1"},
    "kl_bias_correction": {"kl_weight": 0.5, "kl_bias_correction": True},
    "entropy_weight": {"entropy_weight": 0.5},
    "importance_cap": {"importance_cap": 1.01},
    "importance_range": {"importance_range": (0.9, 1.1)},
    "importance_level": {"importance_cap": 1.01, "importance_level": "sequence"},
    "importance_sequence_range": {"importance_sequence_range": (0.95, 1.05)},
    "off_policy_threshold": {"off_policy_threshold": 0.01},
}
BESIDE = {"kl": "kl_weight", "kl_bias_correction": "kl_weight", "importance_level": "importance_cap"}
"""Options that say how, and the one they say it of."""

WIDE: dict[str, dict[str, Any]] = {
    kind: {"clip_low": 0.9, "clip_high": 9.0} for kind in ("gspo", "gspo_token", "luspo")
}
"""Their own bounds are so narrow that the inputs below pass all of them."""


def run(kind: str, **options: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 1, 6, 3, 2, 4])

    def draw() -> Tensor:
        return torch.randn(21, generator=generator, dtype=torch.float64)

    old = -draw().abs()
    logp = (old + 0.5 * draw()).requires_grad_()
    entropy = draw().abs().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, -2.0, 2.0, -0.5, 0.7], dtype=torch.float64).repeat_interleave(lengths)
    got = policy_loss(
        logp, old, advantages, torch.arange(6).repeat_interleave(lengths), kind=kind, normalizer=1.0, entropy=entropy,
        rollout_logp=old + 0.2 * draw(), ref_logp=old + 0.2 * draw(), **options,
    )  # fmt: skip
    g, h = torch.autograd.grad(got.loss, (logp, entropy), allow_unused=True)
    return got.loss.detach(), g if h is None else torch.stack([g, h])


def differ(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return bool(one[0] != other[0]) and (one[1].shape != other[1].shape or not torch.allclose(one[1], other[1]))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, spec in KINDS.items() for name in spec.options])
def test_an_option_of_its_own_changes_loss_and_gradient(kind: str, name: str) -> None:
    around = WIDE.get(kind, {})
    assert differ(run(kind, **around), run(kind, **{**around, name: OWN[name]}))


@pytest.mark.parametrize("name", COMMON_OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_common_option_changes_loss_and_gradient(kind: str, name: str) -> None:
    if (kind, name) == ("vespo", "importance_level"):
        return  # refused, see test_policy_corrections.py
    with_it = COMMON[name]
    without = {key: value for key, value in with_it.items() if key == BESIDE.get(name)}
    around = WIDE.get(kind, {})
    assert differ(run(kind, **around, **without), run(kind, **around, **with_it))


BAD = [
    ("grpo", {"clip_low": -0.1}, "clip_low must not be negative, got -0.1"),
    ("grpo", {"clip_low": 1.5}, r"clip_low must be at most 1 \(ratios are positive\), got 1.5"),
    ("grpo", {"clip_high": math.nan}, "clip_high must not be negative, got nan"),
    ("grpo", {"clip_high": "0.2"}, "clip_high must be a number, got '0.2'"),
    ("grpo", {"clip_high": True}, "clip_high must be a number, got True"),
    ("grpo", {"clip_high": None}, "clip_high must be a number, got None"),
    ("grpo", {"dual_clip": 1.0}, "dual_clip must be above 1, got 1.0; None switches it off"),
    ("grpo", {"delta": 0.0}, "delta must be positive, got 0.0; None switches it off"),
    ("grpo", {"dual_clpi": 3.0}, "unknown option 'dual_clpi' of policy loss 'grpo': did you mean 'dual_clip'"),
    ("cispo", {"dual_clip": 3.0}, "unknown option 'dual_clip' of policy loss 'cispo'"),
    ("sapo", {"temperature_pos": 0.0}, "temperature_pos must be positive, got 0.0$"),
    ("sapo", {"temperature_pos": None}, "temperature_pos must be a number, got None"),
    ("dppo_tv", {"ratio_cap": -1.0}, "ratio_cap must be positive, got -1.0$"),
    ("vespo", {"lambda_neg": 0.0}, "lambda_neg must be positive"),
    ("kimi", {"tau": -1.0}, "tau must not be negative"),
    ("grpo", {"kl_weight": -0.1}, "kl_weight must not be negative"),
    ("grpo", {"kl": "k4"}, "unknown KL estimator 'k4': did you mean"),
    ("grpo", {"kl_bias_correction": 1}, "kl_bias_correction must be True or False, got 1"),
    ("grpo", {"importance_cap": 0.0}, "importance_cap must be positive, got 0.0; None switches it off"),
    ("grpo", {"importance_range": 2.0}, r"importance_range must be a pair \(low, high\), got 2.0"),
    ("grpo", {"importance_range": (2.0,)}, r"importance_range must be a pair \(low, high\), got \(2.0,\)"),
    ("grpo", {"importance_range": (2.0, 1.0)}, r"importance_range needs 0 <= low < high, got \(2.0, 1.0\)"),
    ("grpo", {"importance_range": ("a", 1.0)}, "importance_range must be a number, got 'a'"),
    ("grpo", {"importance_sequence_range": (-1.0, 1.0)}, "importance_sequence_range needs 0 <= low < high"),
    ("grpo", {"importance_level": "tokens"}, "unknown importance_level 'tokens': did you mean 'token'"),
    ("grpo", {"off_policy_threshold": -1.0}, "off_policy_threshold must be positive"),
    ("gspoo", {}, "unknown policy loss 'gspoo': did you mean 'gspo'"),
    ("????", {}, "unknown policy loss '.*': choose from grpo, dapo"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD)
def test_a_bad_option_is_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(kind, **options)


NEEDS = {
    "kl_weight": (0.1, "ref_logp"),
    "entropy_weight": (0.1, "entropy"),
    "importance_cap": (2.0, "rollout_logp"),
    "importance_range": ((0.5, 2.0), "rollout_logp"),
    "importance_sequence_range": ((0.5, 2.0), "rollout_logp"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_input_is_named(name: str) -> None:
    value, needed = NEEDS[name]
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=f"{name}=.* needs {needed}: hand it in, or leave {name} out"):
        policy_loss(x, x, x, x.long(), kind="grpo", normalizer=1.0, **{name: value})
