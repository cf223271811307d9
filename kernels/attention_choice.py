"""Which backend does a call of `attention`: what can, and of those what was fastest on that kind of GPU.

On a GPU that no row was measured on, torch's FlashAttention goes first, being run by many. Our Triton kernel, which hands
out unrounded partial results and is bitwise repeatable, is taken there by its name alone, until a GPU has shown it right
and how fast it is. Forward and backward are chosen apart, since a backward takes any out and lse.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import attention_cuda, attention_flash
from .gpu import on_gpu

BACKENDS = ("auto", "reference", "blockwise", "cpu", "triton", "gluon", "flash", "cudnn", "flash-attn", "fa3", "fa4")
ROW_BACKENDS = frozenset({"triton", "gluon", "flash", *attention_flash.PACKAGES})
"""These take a whole row of segments; the others a rectangle of equal segments at a time."""
UNMEASURED = ("flash", "blockwise")
MEASURED: dict[str, dict[str, tuple[str, ...]]] = {}
"""GPU name -> pass ("forward", "backward") -> backends, fastest first, as bench/results/ has it. None is measured yet."""
SMALL_SCORES = 1 << 22
"""fp64 `auto` takes the reference up to this many scores in its largest segment, all heads counted."""

log = logging.getLogger("longreach.attention")


def choose(name: str, stage: str, q: Tensor, largest: int, deterministic: bool = False) -> str:
    """The backend `name` stands for in `stage` (forward or backward) of a call whose largest segment has `largest`
    scores. ValueError if it is unknown or can't do the call; it names one that can."""
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: choose from {', '.join(BACKENDS)}")
    if name != "auto":
        reason = _refusal(name, stage, q, deterministic)
        if reason:
            way_out = _automatic(stage, q, largest, deterministic)
            raise ValueError(f"attention backend {name!r} can't do this: {reason}; use {way_out!r} or 'auto'")
        return name
    chosen = _automatic(stage, q, largest, deterministic)
    _say(stage, chosen, str(q.device.type), q.dtype, q.shape[-1])
    return chosen


def _refusal(name: str, stage: str, q: Tensor, deterministic: bool) -> str | None:
    return unsuited(name, q) or _unordered(name, stage, q, deterministic) or _one_way(name, stage, q)


def unsuited(name: str, q: Tensor) -> str | None:
    """Why a backend can't take such queries (keys and values are like them), None if it can."""
    if name == "cpu":
        return None if q.device.type == "cpu" else f"it needs CPU tensors and these are on {q.device}"
    if name in attention_flash.PACKAGES:
        return attention_flash.unsuited(name, q)
    checks: dict[str, Callable[[Tensor], str | None]] = {
        "flash": attention_cuda.unsuited,
        "cudnn": attention_cuda.unsuited_cudnn,
        "triton": lambda q: _unsuited_by(triton_backend, q),
        "gluon": lambda q: _unsuited_by(gluon_backend, q),
    }
    return checks[name](q) if name in checks else None


def triton_backend() -> Any:
    """The module of our kernel; imported where it is used, since it needs Triton."""
    from . import attention_triton

    return attention_triton


def gluon_backend() -> Any:
    """The module of our experimental Hopper kernels, imported as the one above."""
    from .experimental import attention_gluon

    return attention_gluon


def _unsuited_by(backend: Callable[[], Any], q: Tensor, **how: Any) -> str | None:
    try:
        return backend().unsuited(q, q, q, **how)  # keys and values are like queries in what it looks at
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return "Triton isn't installed"


def _one_way(name: str, stage: str, q: Tensor) -> str | None:
    """A backward that can do less than its forward."""
    return _unsuited_by(gluon_backend, q, backward=True) if name == "gluon" and stage == "backward" else None


def _unordered(name: str, stage: str, q: Tensor, deterministic: bool) -> str | None:
    if not deterministic or stage != "backward":
        return None
    if name in attention_flash.PACKAGES:
        return attention_flash.unordered(name, q)
    if name in ("flash", "cudnn"):
        return "its backward sums in no fixed order, and deterministic=True was asked for"
    return None


def _automatic(stage: str, q: Tensor, largest: int, deterministic: bool) -> str:
    if q.dtype == torch.float64:
        return "reference" if largest * q.shape[1] <= SMALL_SCORES else "blockwise"
    if q.device.type == "cpu" and not on_gpu(q):
        return "cpu"
    if not on_gpu(q):
        return "blockwise"
    name = torch.cuda.get_device_name(q.device) if q.is_cuda else ""  # a pretended GPU is one that wasn't measured
    order = MEASURED.get(name, {}).get(stage, UNMEASURED)
    return next((name for name in order if not _refusal(name, stage, q, deterministic)), "blockwise")


@lru_cache(maxsize=64)
def _say(stage: str, chosen: str, device: str, dtype: torch.dtype, width: int) -> None:
    """Once for each kind of call."""
    log.info("attention %s on %s, %s, head dimension %d: %s", stage, device, dtype, width, chosen)


def compute_dtype(name: str, q: Tensor, wanted: torch.dtype) -> torch.dtype:
    """What a rectangle is computed in where results in `wanted` are asked for: cuDNN knows half precision alone; the
    fused CPU operator rounds its result to its inputs' dtype, so partial results in fp32 are computed in fp32."""
    return q.dtype if name == "cudnn" else torch.promote_types(q.dtype, wanted)
