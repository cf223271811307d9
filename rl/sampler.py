"""Which prompts a step trains on: seeded epochs, optionally the same share from every task, and a queue of returned prompts.

Task-balanced sampling is QwenLong-L1.5's (arXiv 2512.12967): each batch draws equally from the task types. The state is a
few integers and a list, so a checkpoint holds it whole.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from .seeds import derive


class PromptSampler:
    """Endless prompt indices. `tasks[i]` is the task of prompt `i`; `members` are the indices that may be drawn."""

    def __init__(self, members: Sequence[int], tasks: Mapping[int, str], *, seed: int, balanced: bool = False) -> None:
        if not members:
            raise ValueError("no prompt to sample from")
        names = sorted({tasks[i] for i in members}) if balanced else [""]
        self._pools = {name: [i for i in members if not balanced or tasks[i] == name] for name in names}
        self._seed = seed
        self._drawn = dict.fromkeys(names, 0)
        self._next_task = 0
        self._queue: list[int] = []
        self._owed: list[int] = []
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def take(self, count: int) -> list[int]:
        """The next `count` prompts: returned ones first, then one from each task in turn."""
        taken = self._queue[:count]
        self._queue = self._queue[count:]
        names = list(self._pools)
        while len(taken) < count:
            taken.append(self._draw(names[self._next_task % len(names)]))
            self._next_task += 1
        return taken

    def give_back(self, prompts: Sequence[int]) -> None:
        """Surplus prompts of a step come first in the next one."""
        self._queue = [*prompts, *self._queue]

    def owe(self, prompts: Sequence[int]) -> None:
        """Prompts of this step that were not trained on: `owed` to the next one, on top of its own."""
        self._owed += prompts

    def owed(self) -> list[int]:
        """Takes them."""
        owed, self._owed = self._owed, []
        return owed

    def _draw(self, name: str) -> int:
        pool = self._pools[name]
        epoch, position = divmod(self._drawn[name], len(pool))
        if self._orders.get(name, (-1, []))[0] != epoch:
            order = pool.copy()
            random.Random(derive(self._seed, "epoch", name, epoch)).shuffle(order)
            self._orders[name] = (epoch, order)
        self._drawn[name] += 1
        return self._orders[name][1][position]

    def state(self) -> dict[str, Any]:
        return {
            "drawn": dict(self._drawn),
            "next_task": self._next_task,
            "queue": list(self._queue),
            "owed": list(self._owed),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self._drawn = dict(state["drawn"])
        self._next_task = state["next_task"]
        self._queue = list(state["queue"])
        self._owed = list(state.get("owed", ()))  # older checkpoints owe none
