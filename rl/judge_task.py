"""What a judge is asked, apart from how it is reached: a prompt, and a reader of the words that come back.

The clients (`judge_http.py`, `judge_local.py`) carry any task: verdicts on answers (`judge_prompt.VERDICT`), or behaviours
counted in a response (`behaviours/judged.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

C = TypeVar("C")
V = TypeVar("V")

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Task(Generic[C, V]):
    """`messages` of a case; `parse` reads the judge's words about it, None: they are no answer.

    version: part of the cache's keys, raised with every change of prompt or grammar. stakes: what would come of going on
    with a judge that fails too often.
    """

    version: int | str
    messages: Callable[[C], Chat]
    parse: Callable[[C, str], V | None]
    stakes: str
