"""The generator that a recipe asks for, while a run needs it: servers start with the block and are gone when it ends, however it ends."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..policy import Policy
from .client import HandOver, VllmGenerator
from .handing import Handing

if TYPE_CHECKING:
    from ..recipe import Recipe


@contextmanager
def generating(
    policy: Policy, recipe: Recipe, window: int, *, home: Path | None, hand_over: HandOver | None = None,
    probe_ids: Sequence[int] = (), say: Callable[[str], object] = lambda text: None,
) -> Iterator[None]:  # fmt: skip
    """The policy generates as [generator] says, for sequences of up to `window` tokens.

    `home` is where servers keep their logs, and where weights are handed over unless `hand_over` does it another way; without
    one it is a new folder of the system's for temporary files. `probe_ids`: a prompt, with which pushes are probed.
    """
    if recipe.generator.kind == "local":
        yield
        return
    home = policy.ranks.first(lambda: home or Path(tempfile.mkdtemp(prefix="longreach-servers-"))).absolute()
    if hand_over is None:
        owner = f"{socket.gethostname()}:{home}"
        hand_over = Handing(recipe.generator.sync, owner, home / "handed-over", probe_ids)
    policy.served = VllmGenerator(policy, recipe.generator, home, hand_over=hand_over, say=say)
    try:
        policy.served.start(window)
        yield
    finally:
        policy.served.close()
        policy.served = None
