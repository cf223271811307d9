"""Reward functions of the user, with TRL's signature: f(prompts, completions, completion_ids, **columns).

They return one finite number or None (no verdict) per completion, and may be async. What TRL also passes and this does
not: trainer_state, log_extra, log_metric.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .rows import Example


def load_function(spec: str) -> Callable[..., Any]:
    """The function that "module:function" or "path/file.py:function" names."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"reward function {spec!r} must read module:function or path/file.py:function")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ValueError(f"reward function {spec!r}: there is no file {Path(place).resolve()}")
        module_spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    else:
        if importlib.util.find_spec(place.partition(".")[0]) is None:
            raise ValueError(f"reward function {spec!r}: no module {place!r}; install it or give path/file.py:function")
        module = importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward function {spec!r}: {place} has no function {name!r}")
    return function


def trl_columns(
    examples: Sequence[Example],
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
) -> dict[str, list[Any]]:
    """The keyword arguments of a TRL reward function: every column as a list, one entry a completion.

    Conversational rows pass their messages as prompt, and [{"role": "assistant", "content": ...}] as completion.
    """
    fields = ("id", "benchmark", "answers", "answer_type", "question", "choices")
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns: dict[str, list[Any]] = {name: [example.columns.get(name) for example in examples] for name in names}
    columns |= {name: [getattr(example, name) for example in examples] for name in fields}
    columns["answers"] = [list(example.answers) for example in examples]
    chats = [example.messages is not None for example in examples]
    columns["prompts"] = [
        list(example.messages or ()) if chat else prompt
        for example, prompt, chat in zip(examples, prompts, chats, strict=True)
    ]
    columns["completions"] = [
        [{"role": "assistant", "content": text}] if chat else text
        for text, chat in zip(completions, chats, strict=True)
    ]
    columns["completion_ids"] = [list(ids) for ids in completion_ids]
    return columns


def checked_values(values: Any, count: int, name: str) -> list[float | None]:
    """What a function returned as numbers. Raises ValueError, naming it, for a wrong count or a number not finite."""
    values = list(values)
    if len(values) != count:
        raise ValueError(f"reward function {name} returned {len(values)} values for {count} completions")
    numbers = [None if value is None else float(value) for value in values]
    for index, number in enumerate(numbers):
        if number is not None and not math.isfinite(number):
            raise ValueError(f"reward function {name} returned {number} for completion {index}; None abstains")
    return numbers
