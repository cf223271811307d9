"""8-bit and offloaded AdamW: near AdamW itself, exact over a checkpoint, and clipped like it.

torchao compiles its update, which takes a minute here; most of these tests run it as plain Python, which is the same
arithmetic. The offloaded one needs a GPU; here torchao's own code runs on the CPU with streams that do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longreach.engine.checkpoint import load_state, save_state
from longreach.engine.optimizer import OptimizerConfig, apply_update, make_optimizer

pytest.importorskip("torchao")
RATE = 0.01


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        before = torch.compiler.set_stance("force_eager")
        stack.enter_context(before)
        yield


def model_of(width: int = 96) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 64), nn.Linear(64, 1), nn.LayerNorm(1))


def made(kind: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    if kind != "adamw-offload":
        return make_optimizer(model, OptimizerConfig(kind=kind, **options))
    from longreach.engine.torchao_optimizer import OffloadedAdamW

    plain = make_optimizer(model, OptimizerConfig(**options))
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in plain.param_groups]
    return OffloadedAdamW(groups, {name: plain.defaults[name] for name in ("lr", "betas", "eps")})


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, clip: float = 0.5, rate: float = RATE
) -> float:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(2):  # two micro-batches
        (model[:4](torch.randn(5, 64, generator=draw)) - 1).square().mean().backward()  # type: ignore[index]
    return apply_update(optimizer, model, rate, clip)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def resumed(kind: str, folder: Path) -> None:
    """Three updates, a checkpoint, two more; and from the checkpoint the same two."""
    model = model_of()
    optimizer = made(kind, model, weight_decay=0.1)
    for seed in range(3):
        update(model, optimizer, seed)
    save_state({"optimizer": optimizer.state_dict(), "model": dict(model.state_dict())}, folder, "state")
    for seed in (3, 4):
        update(model, optimizer, seed)
    again, saved = model_of(), load_state(folder, "state")
    again.load_state_dict(saved["model"])
    other = made(kind, again, weight_decay=0.1)
    other.load_state_dict(saved["optimizer"])
    for seed in (3, 4):
        update(again, other, seed)
    assert torch.equal(weights(again), weights(model))
    save_state(other.state_dict(), folder, "again")
    save_state(optimizer.state_dict(), folder, "first")
    assert (folder / "again.safetensors").read_bytes() == (folder / "first.safetensors").read_bytes()


@pytest.mark.usefixtures("uncompiled")
def test_8_bit_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    resumed("adamw-8bit", tmp_path)
    plain = load_state(tmp_path, "state")["optimizer"]["state"]
    codes = [part["8-bit parts"]["codes"] for s in plain.values() for part in s.values() if isinstance(part, dict)]
    assert [c.dtype for c in codes] == [torch.uint8] * 4 and all(c.numel() == 96 * 64 for c in codes)


@pytest.mark.usefixtures("on_the_cpu")
def test_offloaded_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    resumed("adamw-offload", tmp_path)


@pytest.mark.usefixtures("uncompiled")
def test_8_bit_is_near_adamw_with_a_quarter_of_its_averages() -> None:
    models, sizes = [model_of(512), model_of(512)], []
    start = weights(models[0])
    for model, kind in zip(models, ("adamw", "adamw-8bit"), strict=True):
        optimizer = made(kind, model)
        norms = [update(model, optimizer, seed) for seed in range(8)]
        assert min(norms) > 0.5  # the clip is at work
        state: Any = optimizer.state.values()
        parts = [x for s in state for name in ("exp_avg", "exp_avg_sq") for x in _inner(s[name])]
        sizes.append(sum(x.nbytes for x in parts))
    moved, apart = (weights(models[0]) - start).norm(), (weights(models[0]) - weights(models[1])).norm()
    assert 0.0 < apart < 0.1 * moved
    assert 0.25 * sizes[0] < sizes[1] < 0.28 * sizes[0]


def _inner(x: Any) -> list[Tensor]:
    return [getattr(x, name) for name in x.__tensor_flatten__()[0]] if hasattr(x, "__tensor_flatten__") else [x]


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_offloaded_is_adamw_bit_for_bit(clip: float) -> None:
    """Clipped gradients, two micro-batches, and the last norm without any gradient, whose decay and averages go on."""
    models = [model_of(), model_of()]
    optimizers = [
        made(kind, model, weight_decay=0.1) for kind, model in zip(("adamw", "adamw-offload"), models, strict=True)
    ]
    for seed in range(3):
        norms = [update(m, o, seed, clip, RATE / (seed + 1)) for m, o in zip(models, optimizers, strict=True)]
        assert norms[0] == norms[1]
        assert all(p.grad is None for m in models for p in m.parameters())
        torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=0, atol=1e-7)
    host = optimizers[1].optim_dict  # type: ignore[attr-defined]
    assert [p.numel() for p in host] == [64 * 96, 64 * 96]  # small ones stay on the device


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["adamw-8bit", "adamw-offload"])
def test_the_learning_rate_and_a_bad_gradient_are_heeded(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "adamw-offload":
        request.getfixturevalue("on_the_cpu")
    model = model_of()
    optimizer = made(kind, model)
    before = weights(model)
    update(model, optimizer, 0, rate=1e-5)
    assert 0 < (weights(model) - before).abs().max() < 2e-5
    before = weights(model)
    (model[0](torch.ones(1, 64)).sum() * float("nan")).backward()  # type: ignore[index]
    with pytest.raises(FloatingPointError):
        apply_update(optimizer, model, RATE, 0.5)
    assert torch.equal(weights(model), before)
    update(model, optimizer, 1)
    assert torch.isfinite(weights(model)).all()


def test_offloading_from_a_cpu_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'adamw-offload' moves .* from a GPU .* are on cpu: set optimizer.kind = \"adamw\""
    ):
        make_optimizer(model_of(), OptimizerConfig(kind="adamw-offload"))


@pytest.mark.slow
def test_8_bit_as_torch_compiles_it(tmp_path: Path) -> None:
    """The update as it runs in life: near AdamW, and exact over a checkpoint."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64, bias=False) for _ in range(3)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[2].load_state_dict(layers[0].state_dict())
    kinds = ("adamw", "adamw-8bit", "adamw-8bit")
    optimizers = [make_optimizer(layer, OptimizerConfig(kind=kind)) for layer, kind in zip(layers, kinds, strict=True)]

    def step(i: int, seed: int) -> None:
        layers[i](torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        apply_update(optimizers[i], layers[i], RATE, 0.0)

    start = layers[0].weight.detach().clone()
    for seed in range(4):
        step(0, seed)
        step(1, seed)
        if seed == 1:
            save_state(optimizers[1].state_dict(), tmp_path, "optimizer")
            layers[2].load_state_dict(layers[1].state_dict())
    moved = (layers[0].weight - start).norm()
    assert 0.0 < (layers[1].weight - layers[0].weight).norm() < 0.1 * moved
    optimizers[2].load_state_dict(load_state(tmp_path, "optimizer"))
    for seed in (2, 3):
        step(2, seed)
    assert torch.equal(layers[2].weight, layers[1].weight)


@pytest.mark.gpu
def test_offloaded_on_a_gpu_is_adamw() -> None:
    models = [model_of().cuda(), model_of().cuda()]
    optimizers = [
        make_optimizer(m, OptimizerConfig(kind=k)) for m, k in zip(models, ("adamw", "adamw-offload"), strict=True)
    ]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model[:4](torch.ones(5, 64, device="cuda")).square().mean().backward()  # type: ignore[index]
            apply_update(optimizer, model, RATE, 0.5)
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=0, atol=1e-6)
