"""Strict reading of nested settings into frozen dataclasses.

An unknown key or a value of the wrong type stops with the key's full name, the nearest known key and what would fit.
A value from the command line comes as text (`Raw`) and is read as the type that the field has; a list as A,B or, where its items
have commas, as ["A", "B"]. Keys are written with
underscores; on the command line dashes do as well.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Raw(str):
    """Text from the command line, not yet read as a type."""

    __slots__ = ()


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?', or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from a mapping of its fields, nested ones included.

    Raises:
        ValueError: unknown key, missing key, wrong type, or what the dataclass itself refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            homes = [] if where else sorted(k for k in _keys(cls) if k.rpartition(".")[2] == key)
            hint = f"did you mean {' or '.join(map(repr, homes))}?" if homes else nearest(key, fields)
            raise ValueError(f"unknown key {_join(where, key)!r}: {hint}")
        arguments[key] = _read(hints[key], value, _join(where, key))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise ValueError(
                f"{_join(where, name)!r} is missing: give it in the recipe or as --{_join(where, name).replace('_', '-')}"
            )
    try:
        return cls(**arguments)
    except ValueError as error:  # says which of several sections (phases.1) it is about, where it doesn't already
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def read_overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """[--a.b value, --c.d=value] -> [(a.b, value), (c.d, value)]."""
    pairs: list[tuple[str, str]] = []
    items = iter(rest)
    for item in items:
        if not item.startswith("--"):
            raise ValueError(f"unexpected argument {item!r}: recipe keys are given as --section.key VALUE")
        key, equals, value = item[2:].partition("=")
        if not equals:
            following = next(items, None)
            if following is None or following.startswith("--"):
                raise ValueError(f"--{key} needs a value: --{key} VALUE, or --{key}=VALUE for one that begins with --")
            value = following
        pairs.append((key, value))
    return pairs


def override(values: dict[str, Any], key: str, text: str) -> None:
    """Sets the dotted `key` (list items by index: `phases.0.steps`) in nested `values` to raw text."""
    *path, last = key.split(".")
    at: Any = values
    for depth, part in enumerate(path):
        if isinstance(at, list):
            at = at[_index(part, at, ".".join(path[: depth + 1]))]
        else:
            at = at.setdefault(_key(part, at), {})
        if not isinstance(at, dict | list):
            raise ValueError(f"{key!r}: {'.'.join(path[: depth + 1])!r} is a value, not a section")
    if isinstance(at, list):
        at[_index(last, at, key)] = Raw(text)
    else:
        at[_key(last, at)] = Raw(text)


def dump(config: Any) -> dict[str, Any]:
    """The dataclass as nested plain values without None: what `build` reads back to an equal one."""
    if dataclasses.is_dataclass(config):
        items = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
        return {name: dump(value) for name, value in items if value is not None}
    if isinstance(config, dict):
        return {key: dump(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [dump(item) for item in config]  # type: ignore[return-value]
    return config


def _keys(hint: Any, where: str = "") -> Iterator[str]:
    """The dotted names of all keys below a dataclass; N and NAME stand for an index and a free name."""
    if dataclasses.is_dataclass(hint):
        for name, inner in typing.get_type_hints(hint).items():
            yield from _keys(inner, _join(where, name))
        return
    yield where
    step = {tuple: ".N", dict: ".NAME"}.get(typing.get_origin(hint), "")
    for inner in filter(dataclasses.is_dataclass, typing.get_args(hint)):
        yield from _keys(inner, where + step)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _key(part: str, at: Mapping[str, Any]) -> str:
    """A name that stands there as it is (sections of a free name may hold a dash), else with underscores."""
    return part if part in at else part.replace("-", "_")


def _index(part: str, items: list[Any], key: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise ValueError(f"{key!r}: {part!r} is not one of the {len(items)} items (counted from 0)")
    return int(part)


def _read(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if value is None or (isinstance(value, Raw) and value == "none"):
            return None
        return _read(inner[0], value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where!r} is a section, not {value!r}: write it as [{where}] with keys")
        return build(typing.cast(type, hint), value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where!r} holds sections of free names, not {value!r}: write [{where}.NAME] with keys")
        inner = typing.get_args(hint)[1]
        return {key: _read(inner, item, _join(where, key)) for key, item in value.items()}
    if origin is tuple:
        return _read_tuple(typing.get_args(hint)[0], value, where)
    return _read_scalar(hint, value, where)


def _read_tuple(item: Any, value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, Raw) and value.startswith("["):  # items that have commas themselves
        try:
            value = tomllib.loads(f"list = {value}")["list"]
        except tomllib.TOMLDecodeError:
            raise ValueError(f'{where!r} must be a list, not {value!r}: write A,B or ["A", "B"]') from None
    elif isinstance(value, Raw):
        value = [Raw(part.strip()) for part in value.split(",") if part.strip()]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{where!r} must be a list, not {value!r}")
    return tuple(_read(item, part, f"{where}.{index}") for index, part in enumerate(value))


_BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def _read_scalar(hint: type, value: Any, where: str) -> Any:
    wrong = ValueError(f"{where!r} must be {_NAMES[hint]}, not {value!r}")
    if hint is str:
        if isinstance(value, str):
            return str(value)
        raise wrong
    if isinstance(value, Raw):
        try:
            value = _BOOLEANS[value.lower()] if hint is bool else hint(value)
        except (ValueError, KeyError):
            raise wrong from None
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise wrong
    return value


_NAMES = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}
