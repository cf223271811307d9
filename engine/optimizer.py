"""AdamW on the trainable parameters, global gradient clipping, and the learning rate as a function of the step.

AdamW's two averages take 8 bytes a parameter. `adamw-8bit` keeps them in blocks of 8-bit codes (2 bytes and a bit), and
`adamw-offload` in host memory, beside a copy of the weights that is updated there; both are torchao's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .model import trainable

KINDS = ("adamw", "adamw-8bit", "adamw-offload")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the learning rate stands with each stage. `grad_clip` bounds the global gradient norm (0 turns it off).

    `kind`: where its averages stand: adamw, adamw-8bit or adamw-offload (the last two need the `torchao` extra).
    """

    kind: str = "adamw"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"optimizer.kind is {self.kind!r}: it must be one of {', '.join(KINDS)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"optimizer.{name} must lie in [0, 1), not {getattr(self, name)}")
        if not self.epsilon > 0:
            raise ValueError(f"optimizer.epsilon must be positive, not {self.epsilon}")
        for name in ("weight_decay", "grad_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name} must be 0 (off) or positive, not {getattr(self, name)}")


@dataclass(frozen=True)
class Schedule:
    """Learning rate of a stage of `steps` updates: linear warm-up, then constant, or down to zero."""

    learning_rate: float
    warmup_steps: int = 0
    kind: str = "constant"

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule {self.kind!r} is not one of {', '.join(SCHEDULES)}")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a positive number, not {self.learning_rate}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 (none) or more, not {self.warmup_steps}")

    def at(self, update: int, updates: int) -> float:
        """Learning rate of update number `update` (from 0) of `updates`."""
        if update < self.warmup_steps:
            return self.learning_rate * (update + 1) / self.warmup_steps
        left = 1.0 - (update - self.warmup_steps) / max(1, updates - self.warmup_steps)
        if self.kind == "linear":
            return self.learning_rate * left
        return self.learning_rate * (0.5 - 0.5 * math.cos(math.pi * left) if self.kind == "cosine" else 1.0)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Matrices decay; vectors (norms, biases) don't.

    Raises:
        ValueError: nothing to train, or weights in half precision: their 8 or 11 bits would round small updates, and
            AdamW's averages with them, away; a kind that can't run here.
    """
    parameters = list(trainable(model).values())
    halved = sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.dtype.itemsize < 4})
    if halved:
        raise ValueError(
            f"the weights to train are {', '.join(halved)}, which rounds small updates away: load them with "
            'dtype = "float32" and autocast = true, or train adapters ([model.lora])'
        )
    if not parameters:
        raise ValueError("the model has no trainable parameters")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": config.epsilon}
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    if any(isinstance(p, DTensor) for p in parameters):
        raise ValueError(
            f"optimizer.kind = {config.kind!r} has not been shown right on weights that are sharded over ranks: set "
            'optimizer.kind = "adamw" (its averages are sharded too), or parallel.shard = false'
        )
    if find_spec("torchao") is None:
        raise ValueError(
            f'optimizer.kind = {config.kind!r} needs torchao: install longreach[torchao], or set optimizer.kind = "adamw"'
        )
    from . import torchao_optimizer  # an extra

    return torchao_optimizer.make(config.kind, groups, options)


def apply_update(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float, grad_clip: float) -> float:
    """Clips, steps and clears; gives the gradient norm before clipping.

    A parameter without a gradient gets a zero one, so that an update whose advantages are all zero moves the
    optimizer's averages in the same way whether its rows were computed or skipped.

    Raises:
        FloatingPointError: the gradient isn't finite; the weights are untouched.
    """
    parameters = list(trainable(model).values())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = clip_gradients(parameters, grad_clip or math.inf)
    if not bool(torch.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"gradient norm is {norm.item()}: lower the learning rate or look at the last rollouts"
        )
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # part of a compiled update
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients down to a global norm of `limit`; gives the norm before, the same on all ranks.

    Of a sharded gradient each rank has its part, and what isn't sharded every rank has whole: their squares are added
    over the ranks, or not. One collective, whatever the number of weights.
    """
    shards = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, limit)
    copied = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    group = next(p.grad.device_mesh.get_group() for p in parameters if isinstance(p.grad, DTensor))
    square = nn.utils.get_total_norm(shards).double().square()
    dist.all_reduce(square, group=group)
    if copied:
        square += nn.utils.get_total_norm(copied).double().square()
    norm = square.sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch's own
    for gradient in (*shards, *copied):
        gradient.mul_(scale.to(gradient.dtype))
    return norm
