"""Peers beside us: what can be imported and can run here, or the reason why not."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

import torch

from .case import Missing


def need(module: str, *, device: str | None = None, cuda: bool = False) -> Any:
    """The imported module.

    Raises:
        Missing: it isn't installed, lacks something it needs, or needs a GPU (`cuda`) that the case is not on.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{module.split('.')[0]} can't be imported: {error}") from error
    if cuda and device != "cuda":
        raise Missing("needs a CUDA device")
    return found


def need_gpu(backend: str, tensor: torch.Tensor) -> None:
    """Missing for a Triton backend off the GPU: its interpreter proves numerics, and its speed says nothing."""
    if "triton" in backend and not tensor.is_cuda:
        raise Missing("needs a CUDA device")


def version(package: str | None) -> str | None:
    """Of a distribution; None for what belongs to torch or this project, or has no metadata."""
    if package is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def failures() -> tuple[type[Exception], ...]:
    """What running a contender may raise: it becomes a gap row with the reason, and the others go on."""
    known: tuple[type[Exception], ...] = (
        Missing, ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError,
    )  # fmt: skip
    if torch.cuda.is_available():
        from triton.errors import TritonError  # of its compiler: a plain Exception

        known = (*known, TritonError)
    return known
