"""Corrections for a generator that isn't the trainer, weight by weight in Python floats, and the off-policy mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.kernels.policy_kind import LOG_RATIO_LIMIT
from longreach.kernels.policy_loss import KINDS, PolicyLoss, policy_loss

LENGTHS = [3, 1, 4, 2]
IDS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 5, 5])
# old - rollout, token by token; the third sequence agrees to within a thousandth, one token of the last is far out
GAPS = [0.3, -0.2, 0.1, 1.0, 0.0004, -0.0003, 0.0002, 0.0001, 2.5, -2.0]
PREFIX = "sampling/importance_sampling_ratio/"


def run(gaps: list[float] = GAPS, keep: list[float] | None = None, **options: Any) -> tuple[list[float], PolicyLoss]:
    """The weight of each token, read off the gradient: REINFORCE with advantage 1 has -weight."""
    logp = torch.full((10,), -1.5, dtype=torch.float64, requires_grad=True)
    old = torch.linspace(-2, -1, 10, dtype=torch.float64)
    weights = None if keep is None else torch.tensor(keep, dtype=torch.float64)
    got = policy_loss(
        logp, old, torch.ones(10, dtype=torch.float64), IDS, kind="reinforce", normalizer=1.0, keep=weights,
        rollout_logp=old - torch.tensor(gaps, dtype=torch.float64), **options,
    )  # fmt: skip
    got.loss.backward()
    assert logp.grad is not None
    return (-logp.grad).tolist(), got


def metrics(got: PolicyLoss) -> dict[str, float]:
    return {k.removeprefix(PREFIX): mean.value for k, mean in got.metrics.items() if k.startswith(PREFIX)}


def per_sequence(values: list[float]) -> list[list[float]]:
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    return [values[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


def test_without_an_option_the_ratio_is_a_metric_alone() -> None:
    weights, got = run()
    assert weights == [1.0] * 10
    assert metrics(got) == {"mean": pytest.approx(sum(math.exp(x) for x in GAPS) / 10)}


def test_tis_truncates_each_token() -> None:
    weights, got = run(importance_cap=1.2)
    want = [min(math.exp(x), 1.2) for x in GAPS]
    assert weights == pytest.approx(want)
    assert metrics(got) == {"mean": pytest.approx(sum(want) / 10), "capped_mean": pytest.approx(0.3)}


def test_without_a_bound_it_is_plain_importance_sampling() -> None:
    assert run(importance_cap=math.inf)[0] == pytest.approx([math.exp(x) for x in GAPS])


def test_tis_of_a_whole_sequence() -> None:
    weights, got = run(importance_cap=1.5, importance_level="sequence")
    want = [min(math.exp(sum(gaps)), 1.5) for gaps in per_sequence(GAPS) for _ in gaps]
    assert weights == pytest.approx(want)
    # the second sequence and the last
    assert metrics(got) == {"mean": pytest.approx(sum(want) / 10), "capped_mean": pytest.approx(0.3)}


def test_mis_and_icepop_drop_what_is_outside() -> None:
    weights, got = run(importance_range=(0.5, 5.0))
    want = [math.exp(x) if 0.5 <= math.exp(x) <= 5 else 0.0 for x in GAPS]
    assert want.count(0.0) == 2
    assert weights == pytest.approx(want)
    assert metrics(got) == {"mean": pytest.approx(sum(want) / 10), "masked_mean": pytest.approx(0.2)}


def test_mis_of_a_whole_sequence_with_a_list_as_toml_has_it() -> None:
    weights, got = run(importance_range=[0.9, 1.3], importance_level="sequence")
    products = [math.exp(sum(gaps)) for gaps in per_sequence(GAPS) for _ in gaps]
    want = [x if 0.9 <= x <= 1.3 else 0.0 for x in products]
    assert weights == pytest.approx(want)
    assert metrics(got)["masked_mean"] == pytest.approx(0.3)


def test_the_range_looks_at_the_ratio_before_the_cap() -> None:
    weights, _ = run(importance_range=(0.5, 5.0), importance_cap=1.2)
    assert weights == pytest.approx([min(math.exp(x), 1.2) if 0.5 <= math.exp(x) <= 5 else 0.0 for x in GAPS])


def test_the_sequence_mask_drops_whole_sequences() -> None:
    weights, got = run(importance_sequence_range=(0.999, 1.002))
    assert weights == [0.0] * 4 + [1.0] * 4 + [0.0] * 2
    assert metrics(got)["sequence_masked_mean"] == pytest.approx(0.6)
    # beside the tokens' own weights, as seq-mask-tis
    weights, _ = run(importance_sequence_range=(0.999, 1.002), importance_cap=1.0001)
    assert weights[4:8] == pytest.approx([min(math.exp(x), 1.0001) for x in GAPS[4:8]])
    assert not any(weights[:4] + weights[8:])


def test_tokens_left_out_are_no_part_of_their_sequence() -> None:
    keep = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    gaps = [math.nan if k == 0 else x for x, k in zip(GAPS, keep, strict=True)]
    weights, got = run(gaps, keep, importance_cap=math.inf, importance_level="sequence")
    kept = [
        [x for x, k in zip(*pair, strict=True) if k]
        for pair in zip(per_sequence(gaps), per_sequence(keep), strict=True)
    ]
    products = [math.exp(sum(part)) for part, tokens in zip(kept, per_sequence(gaps), strict=True) for _ in tokens]
    assert weights == pytest.approx([p * k for p, k in zip(products, keep, strict=True)])
    assert metrics(got)["mean"] == pytest.approx(sum(p for p, k in zip(products, keep, strict=True) if k) / 7)
    weights, _ = run(gaps, keep, importance_sequence_range=(0.8, 1.25))
    inside = [0.8 <= math.exp(sum(part) / len(part)) <= 1.25 for part in kept]
    assert weights == [k * i for tokens, i in zip(per_sequence(keep), inside, strict=True) for k in tokens]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratios_beyond_the_limit_stay_finite(level: str) -> None:
    weights, got = run([1e4] * 5 + [-1e4] * 5, importance_cap=math.inf, importance_level=level)
    low, high = math.exp(-LOG_RATIO_LIMIT), math.exp(LOG_RATIO_LIMIT)
    # the sequence of the four tokens in the middle holds one of the first kind and three of the second
    middle = [high, low, low, low] if level == "token" else [low] * 4
    assert weights == pytest.approx([high] * 4 + middle + [low] * 2)
    assert math.isfinite(got.loss.item())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_level_weight_multiplies_every_kind(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(10, generator=generator, dtype=torch.float64)
    logp = old + 1e-4 * torch.randn(10, generator=generator, dtype=torch.float64)
    inputs = {"rollout_logp": old - torch.tensor(GAPS, dtype=torch.float64), "kind": kind, "normalizer": 1.0}
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))

    def gradient(**options: Any) -> Tensor:
        leaf = logp.clone().requires_grad_()
        loss = policy_loss(leaf, old, advantages, IDS, **inputs, **options).loss
        return torch.autograd.grad(loss, leaf)[0]

    if kind == "vespo":
        with pytest.raises(ValueError, match="use 'token'"):
            gradient(importance_cap=1.5, importance_level="sequence")
        return
    plain = gradient()
    assert plain.all()
    weights = [min(math.exp(sum(gaps)), 1.5) for gaps in per_sequence(GAPS) for _ in gaps]
    corrected = gradient(importance_cap=1.5, importance_level="sequence")
    torch.testing.assert_close(corrected, plain * torch.tensor(weights, dtype=torch.float64))


def off_policy(advantages: list[float], logp: Tensor, old: Tensor | None, **how: Any) -> tuple[Tensor, PolicyLoss]:
    leaf = logp.clone().requires_grad_()
    got = policy_loss(
        leaf, old, torch.tensor(advantages, dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS)), IDS,
        kind="reinforce", normalizer=1.0, **how,
    )  # fmt: skip
    return torch.autograd.grad(got.loss, leaf)[0], got


def test_wrong_sequences_that_the_policy_left_lose_their_policy_term() -> None:
    old = torch.full((10,), -1.0, dtype=torch.float64)
    # mean of old - logp per sequence: 0.4, 0.6, 0.5, -0.6
    logp = old - torch.tensor([0.2, 0.4, 0.6, 0.6, 0.2, 0.8, 0.9, 0.1, -0.6, -0.6], dtype=torch.float64)
    signs = [-1.0, -1.0, 1.0, -1.0]
    g, got = off_policy(signs, logp, old, off_policy_threshold=0.45)
    assert g.tolist() == [1.0] * 3 + [0.0] + [-1.0] * 4 + [1.0] * 2
    assert got.metrics["sampling/off_policy_masked_mean"].value == pytest.approx(0.1)
    assert got.loss.item() == pytest.approx(float(logp[:3].sum() - logp[4:8].sum() + logp[8:].sum()))
    # the KL term stays
    g, _ = off_policy(signs, logp, old, off_policy_threshold=0.45, kl_weight=2.0, kl="k1", ref_logp=old)
    assert g.tolist() == [3.0] * 3 + [2.0] + [1.0] * 4 + [3.0] * 2


def test_what_sampled_the_sequence_is_the_generator_where_it_is_known() -> None:
    old = torch.full((10,), -1.0, dtype=torch.float64)
    g, _ = off_policy([-1.0] * 4, old, None, off_policy_threshold=0.45)
    assert g.all()
    rollout = torch.cat([old[:4] + 0.5, old[4:] + 0.4])
    for on_policy in (False, True):
        g, got = off_policy(
            [-1.0] * 4, old, None if on_policy else old, off_policy_threshold=0.45, rollout_logp=rollout
        )
        assert g.tolist() == [0.0] * 4 + [1.0] * 6
        assert got.metrics["sampling/off_policy_masked_mean"].value == pytest.approx(0.4)


def apart(got: PolicyLoss) -> dict[str, float]:
    names = (
        "sampling_logp_difference/mean",
        "sampling_logp_difference/max",
        "k3_kl",
        "ratio/mean",
        "ratio/mean_square",
    )
    return {name: got.metrics[f"sampling/{name}"].value for name in names}


def test_how_far_the_two_are_apart_is_measured_corrected_or_not() -> None:
    want = {
        "sampling_logp_difference/mean": sum(map(abs, GAPS)) / 10,
        "sampling_logp_difference/max": 2.5,
        "k3_kl": sum(math.exp(x) - 1 - x for x in GAPS) / 10,
        "ratio/mean": sum(map(math.exp, GAPS)) / 10,
        "ratio/mean_square": sum(math.exp(2 * x) for x in GAPS) / 10,
    }
    corrections: list[dict[str, Any]] = [{}, {"importance_cap": 1.2}]
    corrections.append({"importance_range": (0.5, 5.0), "importance_level": "sequence"})
    for options in corrections:
        assert apart(run(**options)[1]) == pytest.approx(want)


def test_the_greatest_difference_is_of_what_counts_and_adds_up() -> None:
    keep = [1.0] * 8 + [0.0, 0.5]
    _, first = run(keep=keep)
    name = "sampling/sampling_logp_difference/max"
    assert first.metrics[name].value == pytest.approx(2.0)  # the token that is 2.5 apart has no weight
    _, second = run([x / 10 for x in GAPS])
    for one, other in ((first, second), (second, first)):
        assert (one.metrics[name] + other.metrics[name]).value == pytest.approx(2.0)
    _, nothing = run(keep=[0.0] * 10)
    assert math.isnan(nothing.metrics[name].value)
    assert (nothing.metrics[name] + second.metrics[name]).value == pytest.approx(0.25)
