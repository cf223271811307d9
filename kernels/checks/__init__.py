"""What can be proven of a Triton kernel without a GPU; `python -m longreach.kernels.check` is the way in.

A file here that bears the name of an op, as `linear_logprob.py` does that of `kernels/linear_logprob.py`, describes that
op's Triton kernels (`case.Description`); the others are the machinery.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import cast

from .case import Description

HERE = Path(__file__).resolve().parent


def names() -> list[str]:
    """The described ops."""
    ops = {path.stem for folder in (HERE.parent, HERE.parent / "experimental") for path in folder.glob("*.py")}
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem in ops - {"__init__"})


def load(name: str) -> Description:
    """An op's description. Raises ValueError for a name that has none, and names the nearest."""
    known = names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ValueError(f"no check is called {name!r}: {hint}There are: {', '.join(known) or 'none'}")
    return cast(Description, importlib.import_module(f"{__name__}.{name}"))
