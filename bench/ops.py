"""Every op by name, and the cases of a request."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from .case import Case

NAMES = ("linear_logprob", "linear_policy_loss", "policy_loss", "attention", "step", "train_step", "headline")
SHAPES = ("small", "default", "large")


def load_op(name: str) -> Any:
    """The module of an op; imported when asked for, since `step` brings transformers."""
    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(NAMES)}"
        raise ValueError(f"there is no bench named {name!r}: {hint}")
    return importlib.import_module(f".{name}", __package__)


def cases(op: Any, name: str, device: str, shapes: str, dtypes: Sequence[str] | None = None) -> list[Case]:
    """Dims x dtypes of an op on a device; ValueError for a dtype that the op isn't measured in there."""
    offered = op.DTYPES[device]
    wrong = sorted(set(dtypes or ()) - set(offered))
    if wrong:
        raise ValueError(f"{name} is measured in {', '.join(offered)} on {device}, not in {wrong[0]}")
    return [
        Case(name, dims, dtype, device)
        for dims in op.SIZES[device][shapes]
        for dtype in offered
        if not dtypes or dtype in dtypes
    ]
