"""The settings reader: types, nearest keys, overrides, and dumps that read back equal."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from longreach.rl.config import build, dump, nearest, override


@dataclass(frozen=True)
class Part:
    upper: int
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.upper < 1:
            raise ValueError(f"upper must be at least 1, not {self.upper}")


@dataclass(frozen=True)
class Whole:
    name: str
    flag: bool = False
    cap: float | None = None
    names: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    free: dict[str, Part] = field(default_factory=dict)
    section: Part | None = None


def read(**values: Any) -> Whole:
    return build(Whole, {"name": "x", **values})


def overridden(values: dict[str, Any], *pairs: tuple[str, str]) -> Whole:
    for key, text in pairs:
        override(values, key, text)
    return build(Whole, values)


def test_types_are_taken_as_they_stand_and_whole_numbers_serve_as_numbers() -> None:
    made = read(
        flag=True, cap=2, names=["a", "b"], parts=[{"upper": 3}], free={"any": {"upper": 4}}, section={"upper": 5}
    )
    assert made == Whole("x", True, 2.0, ("a", "b"), (Part(3),), {"any": Part(4)}, Part(5))
    assert type(made.cap) is float


@pytest.mark.parametrize(
    "values, words",
    [
        ({"flag": 1}, "'flag' must be true or false, not 1"),
        ({"cap": "2"}, "'cap' must be a finite number, not '2'"),
        ({"cap": True}, "'cap' must be a finite number"),
        ({"cap": float("nan")}, "'cap' must be a finite number"),
        ({"cap": float("inf")}, "'cap' must be a finite number"),
        ({"section": {"upper": 2.0}}, "'section.upper' must be a whole number, not 2.0"),
        ({"section": {"upper": True}}, "'section.upper' must be a whole number"),
        ({"names": "a,b"}, "'names' must be a list, not 'a,b'"),
        ({"names": [1]}, "'names.0' must be text, not 1"),
        ({"section": 3}, "'section' is a section, not 3"),
        ({"parts": {"upper": 3}}, "'parts' must be a list"),
        ({"parts": [3]}, "'parts.0' is a section, not 3"),
        ({"free": 3}, "'free' holds sections of free names, not 3"),
        ({"free": {"a": 3}}, "'free.a' is a section, not 3"),
        ({"parts": [{"upper": 1}, {"rate": 1.0}]}, "'parts.1.upper' is missing"),
        ({"parts": [{"upper": 1}, {"upper": 0}]}, "parts.1: upper must be at least 1, not 0"),
        ({"sectoin": {}}, "unknown key 'sectoin': did you mean 'section'?"),
        ({"section": {"uper": 3}}, "unknown key 'section.uper': did you mean 'upper'?"),
        ({"upper": 3}, "did you mean 'free.NAME.upper' or 'parts.N.upper' or 'section.upper'?"),
        ({"qqq": 3}, "unknown key 'qqq': known: cap, flag, free, name, names, parts, section"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_full_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        read(**values)


def test_a_missing_key_is_named_with_the_ways_to_give_it() -> None:
    with pytest.raises(ValueError, match="'name' is missing: give it in the recipe or as --name"):
        build(Whole, {})


def test_overrides_are_read_as_the_type_of_their_field() -> None:
    made = overridden(
        {"name": "x", "cap": 1.0, "parts": [{"upper": 1}, {"upper": 2}], "section": {"upper": 1}},
        ("flag", "yes"), ("cap", "none"), ("names", "a, b"), ("parts.1.upper", "1_000"), ("parts.0.rate", "1e-3"),
        ("free.some.upper", "7"), ("section", "none"), ("name", "none"),
    )  # fmt: skip
    assert made == Whole("none", True, None, ("a", "b"), (Part(1, 1e-3), Part(1000)), {"some": Part(7)}, None)


def test_a_list_may_have_items_with_commas() -> None:
    assert overridden({"name": "x"}, ("names", '["0,1", "2,3"]')).names == ("0,1", "2,3")
    assert overridden({"name": "x"}, ("names", "[]")).names == ()
    with pytest.raises(ValueError, match=r"'names\.0' must be text, not 1"):
        overridden({"name": "x"}, ("names", "[1]"))


def test_an_override_makes_the_section_that_is_not_there() -> None:
    assert overridden({"name": "x"}, ("section.upper", "3")).section == Part(3)


def test_dashes_do_for_underscores_on_the_command_line_unless_a_name_has_them() -> None:
    @dataclass(frozen=True)
    class Dashed:
        long_key: int = 0
        free: dict[str, Part] = field(default_factory=dict)

    values: dict[str, Any] = {"long_key": 1, "free": {"my-data": {"upper": 1}}}
    override(values, "long-key", "2")
    override(values, "free.my-data.upper", "3")
    assert build(Dashed, values) == Dashed(2, {"my-data": Part(3)})
    with pytest.raises(ValueError, match="unknown key 'long-key': did you mean 'long_key'"):
        build(Dashed, {"long-key": 1})  # two spellings in a file could contradict each other


@pytest.mark.parametrize(
    "key, text, words",
    [
        ("flag", "2", "'flag' must be true or false, not '2'"),
        ("cap", "a", "'cap' must be a finite number, not 'a'"),
        ("cap", "nan", "'cap' must be a finite number"),
        ("section.upper", "1.5", "'section.upper' must be a whole number, not '1.5'"),
        ("parts.2.upper", "1", "'2' is not one of the 2 items"),
        ("parts.x.upper", "1", "'x' is not one of the 2 items"),
        ("parts.-1.upper", "1", "'-1' is not one of the 2 items"),
        ("parts.²", "1", "'²' is not one of the 2 items"),
        ("name.x", "1", "'name' is a value, not a section"),
        ("name.x.y", "1", "'name' is a value, not a section"),
        ("section", "3", "'section' is a section, not '3'"),
        ("names", '["a"', """'names' must be a list, not '["a"': write A,B or ["A", "B"]"""),
        ("free", "3", "'free' holds sections of free names, not '3'"),
        ("nam", "y", "unknown key 'nam': did you mean 'name'?"),
        ("wrong.deep.key", "y", "unknown key 'wrong'"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(key: str, text: str, words: str) -> None:
    values: dict[str, Any] = {"name": "x", "parts": [{"upper": 1}, {"upper": 2}], "section": {"upper": 1}}
    with pytest.raises(ValueError, match=re.escape(words)):
        overridden(values, (key, text))


def test_a_dump_reads_back_equal_and_leaves_none_out() -> None:
    made = read(names=["a"], parts=[{"upper": 3, "rate": 1}], free={"any": {"upper": 4}})
    assert build(Whole, dump(made)) == made
    assert "cap" not in dump(made)
    assert dump(made)["parts"] == [{"upper": 3, "rate": 1.0}]


def test_nearest_lists_everything_when_nothing_is_near() -> None:
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("alpah", ["alpha", "beta"]) == "did you mean 'alpha'?"
