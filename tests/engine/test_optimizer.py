from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from longreach.engine.optimizer import OptimizerConfig, Schedule, apply_update, make_optimizer

RATE = 0.01


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def backward(model: nn.Module, factor: float = 1.0) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    (factor * model(x).square().sum()).backward()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_schedules_warm_up_and_end_as_they_say() -> None:
    def rates(kind: str, warmup: int, updates: int = 6) -> list[float]:
        return [Schedule(2.0, warmup, kind).at(update, updates) for update in range(updates)]

    assert rates("constant", 0) == [2.0] * 6
    assert rates("constant", 4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates("linear", 2) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    cosine = [1 + math.cos(math.pi * i / 4) for i in range(4)]
    assert rates("cosine", 2) == pytest.approx([1.0, 2.0, *cosine])
    assert rates("linear", 9) == pytest.approx([2 * (i + 1) / 9 for i in range(6)])  # a warm-up longer than the stage
    assert all(rate > 0 for kind in ("constant", "linear", "cosine") for rate in rates(kind, 0))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "cosin"}, "'cosin' is not one of constant, linear, cosine"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number, not 0.0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps must be 0"),
    ],
)
def test_bad_schedules_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**{"learning_rate": 1.0, **options})


@pytest.mark.parametrize(
    "options", [{"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": 0.0}, {"weight_decay": -1.0}, {"grad_clip": -1.0},
                {"grad_clip": math.nan}]
)  # fmt: skip
def test_bad_optimizer_settings_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"optimizer.{name} must"):
        OptimizerConfig(**options)


def test_the_first_update_is_adamws() -> None:
    """After one step the averages are unbiased g and g^2, so each weight moves by rate * g / (|g| + eps)."""
    config = OptimizerConfig(weight_decay=0.1, grad_clip=0.0)
    model = small_model()
    backward(model)
    wanted = []
    for p in model.parameters():
        assert p.grad is not None
        decayed = p.detach() * (1 - RATE * (0.1 if p.ndim > 1 else 0.0))  # matrices decay, vectors don't
        wanted.append((decayed - RATE * p.grad / (p.grad.abs() + config.epsilon)).flatten())
    apply_update(make_optimizer(model, config), model, RATE, config.grad_clip)
    torch.testing.assert_close(weights(model), torch.cat(wanted), rtol=0, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_settings_reach_adamw() -> None:
    config = OptimizerConfig(weight_decay=0.3, beta1=0.5, beta2=0.6, epsilon=1e-3)
    matrices, vectors = make_optimizer(small_model(), config).param_groups
    assert (matrices["betas"], matrices["eps"]) == ((0.5, 0.6), 1e-3)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert [p.ndim for p in matrices["params"]] == [2, 2] and len(vectors["params"]) == 4


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_clipping_bounds_the_gradient_and_reports_its_norm_before(factor: float) -> None:
    model = small_model()
    # with these the update is rate * gradient, so that the gradient that was used can be read off
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    backward(model, factor)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    before = weights(model)
    norm = apply_update(optimizer, model, RATE, 0.5)
    assert norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    used = (before - weights(model)) / RATE
    assert float(used.norm()) == pytest.approx(min(norm, 0.5), rel=1e-2)
    assert torch.cosine_similarity(used, gradient, dim=0) > 0.999


def test_without_clipping_the_gradient_is_used_as_it_is() -> None:
    model = small_model()
    backward(model, 1e3)
    before = weights(model)
    norm = apply_update(torch.optim.SGD(model.parameters(), lr=0.0), model, RATE, 0.0)
    assert norm > 100
    assert float(((before - weights(model)) / RATE).norm()) == pytest.approx(norm, rel=1e-4)


def test_a_missing_gradient_counts_as_zero() -> None:
    """Averages then decay, and weights go on moving, whether rows without advantage were computed or skipped."""
    found = []
    for skipped in (True, False):
        model = small_model()
        optimizer = make_optimizer(model, OptimizerConfig())
        backward(model)
        apply_update(optimizer, model, RATE, 1.0)
        before = weights(model)
        if not skipped:
            backward(model, 0.0)
        assert apply_update(optimizer, model, RATE, 1.0) == 0.0
        assert not torch.equal(weights(model), before)
        found.append(weights(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_leaves_everything_untouched(bad: float, grad_clip: float) -> None:
    model = small_model()
    optimizer = make_optimizer(model, OptimizerConfig())
    backward(model)
    apply_update(optimizer, model, RATE, grad_clip)
    before, state = weights(model), [s["exp_avg"].clone() for s in optimizer.state.values()]
    backward(model)
    next(model.parameters()).grad[0, 0] = bad  # type: ignore[index]
    with pytest.raises(FloatingPointError, match=str(bad)):
        apply_update(optimizer, model, RATE, grad_clip)
    assert torch.equal(weights(model), before)
    assert all(torch.equal(s["exp_avg"], old) for s, old in zip(optimizer.state.values(), state, strict=True))
    assert all(p.grad is None for p in model.parameters())
    backward(model)
    apply_update(optimizer, model, RATE, grad_clip)  # and the next update is an ordinary one
    assert torch.isfinite(weights(model)).all()


def test_frozen_parameters_stay_out_of_it() -> None:
    model = small_model()
    first = model[0]  # type: ignore[index]
    first.requires_grad_(False)
    frozen = first.weight.clone()
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=1.0))
    backward(model)
    apply_update(optimizer, model, RATE, 1.0)
    assert torch.equal(first.weight, frozen) and first.weight.grad is None
    with pytest.raises(ValueError, match="no trainable parameters"):
        make_optimizer(model.requires_grad_(False), OptimizerConfig())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_would_round_updates_away_are_refused(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"{name}, which rounds small updates away.*autocast"):
        make_optimizer(small_model().to(dtype), OptimizerConfig())


def test_a_kind_that_is_unknown_or_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"optimizer.kind is 'sgd': it must be one of adamw, adamw-8bit, adamw-offload"
    ):
        OptimizerConfig(kind="sgd")
    monkeypatch.setattr("longreach.engine.optimizer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'adamw-8bit' needs torchao: install longreach\[torchao\]"):
        make_optimizer(small_model(), OptimizerConfig(kind="adamw-8bit"))
