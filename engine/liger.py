"""Liger's RMSNorm, RoPE and SwiGLU in a loaded model (the `liger` extra; needs a GPU): fused, without fp32 copies.

Liger's own `apply_liger_kernel_to_*` also put their classes and their rotary embedding into transformers' modules, where every
other model of the process would find them, and swap the loss. Here only the instances of one model change: norms and MLPs get
the `forward` of Liger's modules, and each attention a copy of its own `forward` in whose globals `apply_rotary_pos_emb` is
Liger's. Names and weights stay. Each replaced module is compared with what it was on a few numbers, since a norm by another
formula (Gemma's adds one to its weight) looks the same from outside. Not run on a GPU yet.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROPE = "apply_rotary_pos_emb"
_TOLERANCE = 0.02
"""Of the largest output: rounding in bfloat16 makes a hundredth of it, another formula many times more."""


@dataclass(frozen=True)
class Kernels:
    """`norm` and `mlp` are methods of a module (self, x) -> y, `rope` is (q, k, cos, sin) -> (q, k)."""

    norm: Callable[[Any, Tensor], Tensor]
    mlp: Callable[[Any, Tensor], Tensor]
    rope: Callable[..., tuple[Tensor, Tensor]]


def use_liger(model: PreTrainedModel) -> None:
    """Puts Liger's kernels into the model.

    Raises:
        ValueError: no GPU, no liger-kernel, or a model whose parts are of another kind.
    """
    if model.device.type != "cuda":
        raise ValueError(
            f"model.liger needs a GPU, for Liger's kernels are Triton's, and the model is on {model.device}"
        )
    if find_spec("liger_kernel") is None:
        raise ValueError("model.liger needs liger-kernel: install longreach[liger], or leave model.liger out")
    bind(model, liger_kernels())


def liger_kernels() -> Kernels:
    """Liger's own."""
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb  # pyright: ignore[reportMissingImports]  (an extra)

    return Kernels(LigerRMSNorm.forward, LigerSwiGLUMLP.forward, liger_rotary_pos_emb)


def bind(model: PreTrainedModel, kernels: Kernels, *, verify: bool = True) -> list[str]:
    """Replaces what the kernels can compute; gives the names of the changed modules. ValueError if one isn't as expected;
    without `verify` no number is looked at."""
    changed: list[str] = []
    for name, module in model.get_decoder().named_modules():
        if "RMSNorm" in type(module).__name__:
            _replace(name, module, kernels.norm, next(module.parameters()).shape[-1], verify, **_norm_options(module))
        elif all(isinstance(getattr(module, part, None), nn.Module) for part in ("gate_proj", "up_proj", "down_proj")):
            _replace(name, module, kernels.mlp, model.config.get_text_config().hidden_size, verify)
        elif isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "o_proj"):
            _rotate_by(name, module, kernels.rope)
        else:
            continue
        changed.append(name)
    return changed


def _norm_options(module: Any) -> dict[str, Any]:
    """What `LigerRMSNorm.forward` reads of its module: llama's way of rounding, and the gradient written over its input."""
    epsilon = getattr(module, "variance_epsilon", None)
    return {
        "variance_epsilon": module.eps if epsilon is None else epsilon,
        "offset": 0.0, "casting_mode": "llama", "in_place": True, "row_mode": None,
    }  # fmt: skip


@torch.no_grad()
def _replace(
    name: str, module: nn.Module, forward: Callable[..., Tensor], width: int, verify: bool, **options: Any
) -> None:
    first = next(module.parameters())
    x = (
        torch.randn(1, 4, width, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(first)
        if verify
        else None
    )
    own = None if x is None else module(x)
    for key, value in options.items():
        setattr(module, key, value)
    module.forward = types.MethodType(forward, module)
    if x is None or own is None:
        return
    difference = (module(x) - own).abs().max()
    if not difference <= _TOLERANCE * own.abs().max():
        raise ValueError(
            f"{name} ({type(module).__name__}) computes something else than Liger's kernel, by {difference.item():.2g} of "
            f"{own.abs().max().item():.2g}: leave model.liger out for this model"
        )


def _rotate_by(name: str, module: nn.Module, rope: Callable[..., Any]) -> None:
    own = type(module).forward
    if inspect.unwrap(own) is not own or _ROPE not in own.__code__.co_names or _ROPE not in own.__globals__:
        raise ValueError(
            f"{name} ({type(module).__name__}) doesn't rotate its queries through {_ROPE}: leave model.liger out for this model"
        )
    copied = types.FunctionType(
        own.__code__, {**own.__globals__, _ROPE: rope}, own.__name__, own.__defaults__, own.__closure__
    )
    copied.__kwdefaults__ = own.__kwdefaults__
    module.forward = types.MethodType(copied, module)
