"""Numbers as people print them in reports: `$1,577.00`, `(1,234)`, `12.5 %`, `30.3 million`, `-0.2`.

A number is kept as an exact decimal with the unit it was printed with, so that two prints can be compared without
the slack that makes a rule reward exploitable (absolute values, powers of ten, loose relative tolerance). It gives up
on what is ambiguous: `1.234,56`, words for digits, ranges, and anything with a second number in it.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal

RELATIVE_TOLERANCE = Decimal("1e-4")
ROUNDING_CAP = Decimal("1e-2")

# Characters. No printed number is longer, and the patterns below stay cheap on whatever a policy writes.
_LONGEST = 100

_SCALES = {
    **dict.fromkeys(("k", "thousand", "thousands"), 3),
    **dict.fromkeys(("m", "mn", "mm", "mio", "million", "millions"), 6),
    **dict.fromkeys(("b", "bn", "billion", "billions"), 9),
    **dict.fromkeys(("tn", "trillion", "trillions"), 12),
}
_CURRENCIES = {
    **dict.fromkeys(("$", "us$", "usd", "dollar", "us dollar"), "USD"),
    **dict.fromkeys(("€", "eur", "euro"), "EUR"),
    **dict.fromkeys(("£", "gbp", "pound"), "GBP"),
    **dict.fromkeys(("¥", "rmb", "cny", "yuan"), "CNY"),
    **dict.fromkeys(("jpy", "yen"), "JPY"),
    **dict.fromkeys(("₹", "inr", "rupee"), "INR"),
}
_PERCENT = frozenset(("%", "percent", "per cent", "pct"))
# A trailing word that changes the value, or opens a second answer: such a text is not one number.
_NOT_A_UNIT = frozenset(
    "or and to than less more least most below above under over minus plus negative not hundred dozen half quarter "
    "third e thousandth millionth loss decrease decline".split()
)
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"))
_NUMBER = re.compile(
    r"""(?:(?:approximately|approx\.?|about|around|roughly|circa|nearly)\s+)?[~≈=]?\s*
    (?P<sign>[-+])?\s*(?P<open>\()?\s*(?P<sign2>[-+])?\s*
    (?P<currency>us\$|usd|eur|gbp|rmb|cny|jpy|inr|[$€£¥₹])?\s*
    (?P<open2>\()?\s*(?P<sign3>[-+])?
    (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:[ ']\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)
    (?:e(?P<exponent>[-+]?\d{1,3})|/(?P<denominator>[1-9]\d{0,8}))?
    \s*(?P<tail>[^\d]*)""",
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Number:
    """One printed number.

    value: the number itself; a percent is divided by 100, a scale word multiplied in.
    step: worth of one unit in the last printed place, in the units of `value` (0.01 for 24.26, 1 for 35).
    rounded: whether a decimal point or a scale word was printed, so that the print may stand for a longer number.
    unit: "" when none was printed, else a currency code or a singular lower-case word.
    """

    value: Decimal
    step: Decimal
    rounded: bool
    percent: bool
    unit: str

    @property
    def plain(self) -> bool:
        """True when nothing but an amount was printed: no unit beyond a currency."""
        return not self.unit or self.unit.isupper()


def parse_number(text: str) -> Number | None:
    """The one number that `text` is, or None when it is none, several, or ambiguous."""
    text = " ".join(unicodedata.normalize("NFKC", text).translate(_DASHES).split())
    if len(text) > _LONGEST:
        return None
    text = text.replace("\\$", "$").replace("\\%", "%")
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    signs = [match[name] for name in ("sign", "sign2", "sign3") if match[name]]
    opened = bool(match["open"]) + bool(match["open2"])
    tail = match["tail"]
    if len(signs) > 1 or opened > 1 or tail.count(")") != opened or "(" in tail:
        return None
    suffix = _read_tail(tail, _CURRENCIES.get((match["currency"] or "").lower(), ""))
    if suffix is None:
        return None
    scale, percent, unit = suffix
    digits = re.sub(r"[, ']", "", match["digits"]).rstrip(".")
    power = int(match["exponent"] or 0) + scale - (2 if percent else 0)
    value = Decimal(digits).scaleb(power) / Decimal(match["denominator"] or 1)
    step = Decimal(1).scaleb(power - (len(digits.partition(".")[2])))
    # Accounting: parentheses mean a loss. "(-5)" prints its sign already and stays -5.
    if "-" in signs or (opened and not signs):
        value = -value
    return Number(value, step, "." in digits or power > 0 or percent, percent, unit)


def _read_tail(tail: str, currency: str) -> tuple[int, bool, str] | None:
    """(power of ten, percent?, unit) of what follows the digits, or None if it is more than a unit."""
    tail = " ".join(tail.replace(")", " ").lower().rstrip(" .,;:!").split())
    scale = 0
    head, _, rest = tail.partition(" ")
    if head in _SCALES:
        scale, tail = _SCALES[head], rest
    if tail in _PERCENT:
        return (scale, True, currency) if not scale and not currency else None
    if not tail:
        return scale, False, currency
    words = tail.split()
    singular = " ".join(word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words)
    unit = _CURRENCIES.get(singular, singular)
    if currency:
        return (scale, False, currency) if unit == currency else None
    if len(words) > 2 or not re.fullmatch(r"[^\W\d_°][\w°²³/-]*(?: [^\W\d_]+)?", tail) or _NOT_A_UNIT & set(words):
        return None
    return scale, False, unit


def numbers_match(predicted: Number, gold: Number) -> bool:
    """Whether two prints mean the same number.

    Sign counts, powers of ten count, and units that are both printed must agree. `12%` equals `0.12` (the unit is
    stated) but neither `12` nor `0.12` alone equals the other. Rounding: a gold printed in full as an integer is
    exact against another integer. Otherwise the difference may be 1e-4 of the gold (what is lost by computing with
    rounded inputs), or half a step of the gold's last printed place if it was printed with a decimal point (a more
    precise answer that rounds to the gold is not wrong), but never more than 1 %, so that a gold of `0.2` does not
    open a window of 25 %.
    """
    if predicted.unit and gold.unit and predicted.unit != gold.unit:
        return False
    difference = abs(predicted.value - gold.value)
    if not gold.rounded and predicted.value == predicted.value.to_integral_value():
        return difference == 0
    size = abs(gold.value)
    allowed = RELATIVE_TOLERANCE * size
    if gold.rounded:
        allowed = max(allowed, min(gold.step / 2, ROUNDING_CAP * size))
    return difference <= allowed
