"""Options of policy losses: their defaults, their limits, and errors that name the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Option:
    """One option: its default, and a check that raises ValueError for (name, value) outside its limits."""

    default: Any
    check: Callable[[str, Any], None]


def number(default: float, *, most: float | None = None, why: str = "") -> Option:
    """At least 0 and, where `most` is given, at most that; `why` says what sets that limit."""

    def check(name: str, value: Any) -> None:
        _numeric(name, value)
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
        if most is not None and not value <= most:
            raise ValueError(f"{name} must be at most {most} ({why}), got {value}")

    return Option(default, check)


def positive(default: float | None, *, above: float = 0) -> Option:
    """Above 0, or above another limit; an option whose default is None is off, and None switches it off."""

    def check(name: str, value: Any) -> None:
        way_out = "; None switches it off" if default is None else ""
        if value is None and way_out:
            return
        _numeric(name, value)
        if value is None or not value > above:
            limit = f"above {above}" if above else "positive"
            raise ValueError(f"{name} must be {limit}, got {value}{way_out}")

    return Option(default, check)


def interval() -> Option:
    """A pair (low, high) with 0 <= low < high, off by default."""

    def check(name: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise ValueError(f"{name} must be a pair (low, high), got {value!r}; None switches it off")
        for bound in value:
            _numeric(name, bound)
        if not 0 <= value[0] < value[1]:
            raise ValueError(f"{name} needs 0 <= low < high, got {tuple(value)}; None switches it off")

    return Option(None, check)


def choice(default: str, known: Iterable[str], what: str) -> Option:
    """One of some names; `what` says in the error what they name."""
    names = tuple(known)

    def check(name: str, value: Any) -> None:
        if value not in names:
            raise ValueError(f"unknown {what} {value!r}{nearest(str(value), names)}")

    return Option(default, check)


def flag(default: bool) -> Option:
    """True or False."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")

    return Option(default, check)


def resolve(loss: str, known: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every known option's value, checked; ValueError for a name that isn't known, with the nearest that is."""
    for name in given:
        if name not in known:
            raise ValueError(f"unknown option {name!r} of policy loss {loss!r}{nearest(name, known)}")
    settings = {name: given.get(name, option.default) for name, option in known.items()}
    for name, value in settings.items():
        known[name].check(name, value)
    return settings


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, or all of them."""
    names = list(known)
    match = get_close_matches(name, names, n=1, cutoff=0.3)
    return f": did you mean {match[0]!r}?" if match else f": choose from {', '.join(names)}"


def _numeric(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
