"""Numbers: what a print says stays what it says through formats, and nothing else equals it."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.rl.numbers import Number, numbers_match, parse_gold, parse_number

INTEGERS = st.integers(min_value=-(10**15), max_value=10**15)


def number(text: str) -> Number:
    made = parse_number(text)
    assert made is not None, text
    return made


def same(answer: str, gold: str, **options: bool) -> bool:
    made = parse_gold(gold)
    assert made is not None, gold
    return numbers_match(number(answer), made, **options)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(INTEGERS, st.integers(min_value=1, max_value=10**9))
def test_integers_are_exact_in_every_format(value: int, more: int) -> None:
    grouped = f"{value:,}"
    dots = grouped.replace(",", ".")
    prints = [str(value), grouped, f"{value:,} stores", f"${value:,}", f"{value}.00"]
    prints += [grouped.replace(",", " "), grouped.replace(",", "'"), str(value).replace("-", "\u2212")]
    prints += [dots] if dots.count(".") > 1 else []
    for text in prints:
        assert number(text).value == value, text
        assert same(text, str(value))
        assert not same(str(value + more), text if "." not in text or text == dots else str(value))
    if value:
        assert not same(str(-value), str(value))
        assert not same(str(value * 10), str(value))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(INTEGERS, st.integers(min_value=1, max_value=6))
def test_decimals_in_both_conventions(value: int, places: int) -> None:
    exact = Fraction(value, 10**places)
    text = f"{'-' if value < 0 else ''}{abs(value) // 10**places:,}.{abs(value) % 10**places:0{places}d}"
    assert number(text).value == exact
    swapped = text.translate(str.maketrans(",.", ".,"))
    if "," in text or places != 3 or text.lstrip("-").startswith("0"):
        assert number(swapped).value == exact, swapped
    else:
        assert number(swapped).value == value  # 12,345 groups: the ambiguous comma


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(min_value=-(10**6), max_value=10**6), st.sampled_from(["million", "bn", "thousand", "%", "bps"]))
def test_scale_words_multiply(value: int, word: str) -> None:
    factor = {"million": 10**6, "bn": 10**9, "thousand": 10**3, "%": Fraction(1, 100), "bps": Fraction(1, 10**4)}[word]
    assert number(f"{value} {word}").value == value * factor
    if value:
        assert not same(str(value), f"{value} {word}")
        assert same(str(value), f"{value} {word}", any_scale=True) == (word != "bps")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.decimals(min_value=1, max_value=10**6, places=2), st.decimals(min_value=0, max_value=1, places=6))
def test_tolerance_is_the_stated_one(gold: object, shift: object) -> None:
    """Half a step of the last printed place or 1e-4, whichever is larger, and never more than 1 %."""
    value, off = Fraction(str(gold)), Fraction(str(shift))
    allowed = max(value / 10_000, min(Fraction(5, 1000), value / 100))
    assert same(f"{float(value + off):.8f}", str(gold)) == (off <= allowed) or off == allowed


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="0123456789.,-+()$%eE x×^/'± \u00b2½万kmb", max_size=14))
def test_whatever_is_read_equals_itself_and_not_its_opposite(text: str) -> None:
    made = parse_number(text)
    if made is None:
        return
    opposite = Number(-made.value, made.step, made.rounded, made.percent, made.unit)
    assert numbers_match(made, made)
    assert made.value == 0 or not numbers_match(opposite, made, any_scale=True)
    assert any(letter.isdecimal() for letter in text) or "½" in text


@pytest.mark.parametrize("text", ["5 or 6", "5-6", "5 to 6", "inf", "nan", "0x10", "1_0", "1e9999", "--5", "5 5", "", "-", "9" * 101])  # fmt: skip
def test_no_number(text: str) -> None:
    assert parse_number(text) is None


def test_a_gold_may_state_its_tolerance() -> None:
    assert parse_gold("5 ± 0.1") == Number(Fraction(5), Fraction(1), False, False, "", Fraction(1, 10))
    made = parse_gold("200 km +/- 2 %")
    assert made is not None and (made.unit, made.tolerance) == ("km", 4)
    assert parse_gold("5 ± x") is None
    assert parse_number("5 ± 0.1") is None  # an answer may not
