"""Numbers as people print them in reports: `$1,577.00`, `(1,234)`, `12.5 %`, `30.3 million`, `1.234,56`, `1.2亿元`.

A number is kept as an exact fraction with the unit it was printed with, so that two prints can be compared without
the slack that makes a rule reward exploitable (absolute values, powers of ten, loose relative tolerance).

Separators: a comma before each three digits groups, a dot is the decimal point. Read the other way round only where
that reading is impossible: `1.234,56` and `1.234.567` group by dots; `0,5`, `3,14`, `1234,567` have a decimal comma.
So the ambiguous `1.234` is one and a bit, and the ambiguous `1,234` is a thousand, whatever the gold looks like.

It gives up on what is ambiguous or more than one number: ranges, words for digits, `5 to 6`, conversions of units.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

RELATIVE_TOLERANCE = Fraction(1, 10_000)
ROUNDING_CAP = Fraction(1, 100)
# What people lose or gain when a table says "in thousands": percent, thousand, million, billion, trillion.
SLIPS = tuple(Fraction(10) ** power for power in (2, 3, 6, 9, 12))

# Characters. No printed number is longer, and the patterns below stay cheap on whatever a policy writes.
_LONGEST = 100

_SCALES = {
    **dict.fromkeys(("k", "thousand", "thousands"), 3),
    **dict.fromkeys(("m", "mn", "mm", "mio", "mln", "million", "millions"), 6),
    **dict.fromkeys(("b", "bn", "bln", "billion", "billions"), 9),
    **dict.fromkeys(("tn", "trn", "trillion", "trillions"), 12),
    **dict.fromkeys(("lakh", "lakhs"), 5),
    **dict.fromkeys(("crore", "crores"), 7),
}
_EAST_ASIAN_SCALES = {
    "万亿": 12,
    "萬億": 12,
    "千万": 7,
    "千萬": 7,
    "百万": 6,
    "百萬": 6,
    "亿": 8,
    "億": 8,
    "万": 4,
    "萬": 4,
}
_CURRENCIES = {
    **dict.fromkeys(("$", "us$", "usd", "dollar", "us dollar", "u.s. dollar", "美元", "美金"), "USD"),
    **dict.fromkeys(("€", "eur", "euro", "欧元", "歐元"), "EUR"),
    **dict.fromkeys(("£", "gbp", "pound", "pound sterling", "英镑", "英鎊"), "GBP"),
    **dict.fromkeys(("¥", "rmb", "cny", "yuan", "元", "人民币", "人民幣"), "CNY"),
    **dict.fromkeys(("jpy", "yen", "日元", "円"), "JPY"),
    **dict.fromkeys(("₹", "inr", "rupee"), "INR"),
}
# Units of a hundredth and below: (power of ten of the value).
_PARTS = {
    **dict.fromkeys(("%", "percent", "per cent", "pct", "percentage point", "percentage points", "pp"), -2),
    **dict.fromkeys(("bp", "bps", "basis point", "basis points"), -4),
    "‰": -3,
}
_UNIT_NAMES = {
    **dict.fromkeys(("kilometer", "kilometre"), "km"), **dict.fromkeys(("meter", "metre"), "metre"),
    **dict.fromkeys(("kilogram", "kilogramme", "kg"), "kg"), **dict.fromkeys(("hr", "hour"), "hour"),
    **dict.fromkeys(("min", "minute"), "minute"), **dict.fromkeys(("sec", "second"), "second"),
    **dict.fromkeys(("yr", "year", "年"), "year"), **dict.fromkeys(("people", "person", "人"), "person"),
}  # fmt: skip
# A trailing word that changes the value, or opens a second answer: such a text is not one number.
_NOT_A_UNIT = frozenset(
    "or and to than less more least most below above under over minus plus negative not hundred dozen half quarter "
    "third e thousandth millionth loss decrease decline maybe perhaps possibly".split()
)
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-") | {"\u2019": "'"})
_SUPERSCRIPT = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_NUMBER = re.compile(
    r"""(?:(?:approximately|approx\.?|about|around|roughly|circa|ca\.|nearly|almost|exactly|an?\ estimated|a\ total\ of
    |in\ the\ year|the\ year|in|约|大约|大概|約)\ ?)?[~≈=]?\ ?
    (?P<sign>[-+]|minus\ |negative\ |负|負)?\ ?(?P<open>\()?\ ?(?P<sign2>[-+])?\ ?
    (?P<currency>us\$|usd|eur|gbp|rmb|cny|jpy|inr|[$€£¥₹])?\ ?
    (?P<open2>\()?\ ?(?P<sign3>[-+])?
    (?:(?P<whole>\d{1,9})\ (?P<numerator>\d{1,9})/(?P<below>[1-9]\d{0,8})
      |(?P<european>\d{1,3}(?:\.\d{3})+,\d+|(?!0)\d{1,3}(?:\.\d{3}){2,}|(?!0)\d{1,3}(?:[ ']\d{3})+,\d+
        |0,\d+|\d+,\d{1,2}|\d+,\d{4,}|\d{4,},\d{3})
      |(?P<english>(?!0)\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?!0)\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?
        |(?!0)\d{1,3}(?:[ ']\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)
       (?:e(?P<exponent>[-+]?\d{1,3})|\ ?[x×*]\ ?10\^?\{?(?P<power>[-+]?\d{1,3})\}?|/(?P<denominator>[1-9]\d{0,8}))?)
    \ ?(?P<tail>[^\d]*)""",
    re.VERBOSE | re.IGNORECASE,
)
_UNIT = re.compile(r"[^\W\d_°][\w°²³/.-]*(?: [^\W\d_]+){0,2}")


@dataclass(frozen=True)
class Number:
    """One printed number.

    value: the number itself; a percent is divided by 100, a scale word multiplied in.
    step: worth of one unit in the last printed place, in the units of `value` (0.01 for 24.26, 1 for 35).
    rounded: whether a decimal point or a scale word was printed, so that the print may stand for a longer number.
    unit: "" when none was printed, else a currency code or a singular lower-case word.
    tolerance: what a gold answer states itself ("5 ± 0.1"), None if it states none.
    """

    value: Fraction
    step: Fraction
    rounded: bool
    percent: bool
    unit: str
    tolerance: Fraction | None = None

    @property
    def plain(self) -> bool:
        """True when nothing but an amount was printed: no unit beyond a currency."""
        return not self.unit or self.unit.isupper()


def parse_gold(text: str) -> Number | None:
    """Like `parse_number`, for a gold answer, which may state its tolerance: `5 ± 0.1`, `5 km +/- 2 %` (of the value)."""
    head, sign, tail = text.replace("+/-", "±").partition("±")
    number = parse_number(head)
    if not sign or number is None:
        return number
    slack = parse_number(tail)
    if slack is None or slack.value < 0:
        return None
    relative = slack.percent and not number.percent
    allowed = slack.value * abs(number.value) if relative else slack.value
    return Number(number.value, number.step, number.rounded, number.percent, number.unit, allowed)


def parse_number(text: str) -> Number | None:
    """The one number that `text` is, or None when it is none, several, or ambiguous."""
    if len(text) > 2 * _LONGEST:
        return None
    # NFKC would make 10² a 102 and 5½ a 51/2.
    text = _VULGAR.sub(lambda found: " " + found[0], _SUPERSCRIPT.sub(lambda found: "^" + found[0], text))
    text = " ".join(unicodedata.normalize("NFKC", text).translate(_DASHES).replace("\u2044", "/").split())
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
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
    value, decimals = _digits(match)
    power = scale + int(match["exponent"] or match["power"] or 0)
    # Accounting: parentheses mean a loss. "(-5)" prints its sign already and stays -5.
    negative = any(sign != "+" for sign in signs) or (opened > 0 and not signs)
    value *= Fraction(10) ** power
    return Number(-value if negative else value, Fraction(10) ** (power - decimals), decimals > 0 or power > 0 or percent, percent, unit)  # fmt: skip


def _digits(match: re.Match[str]) -> tuple[Fraction, int]:
    """(the value of the digits, how many decimal places are printed)."""
    if match["whole"]:
        return int(match["whole"]) + Fraction(int(match["numerator"]), int(match["below"])), 0
    if match["european"]:
        printed = re.sub(r"[. ']", "", match["european"]).replace(",", ".")
    else:
        printed = re.sub(r"[, ']", "", match["english"]).rstrip(".")
    whole, _, places = printed.partition(".")
    value = Fraction(int(whole + places), 10 ** len(places))
    return value / int(match["denominator"] or 1), len(places)


def _read_tail(tail: str, currency: str) -> tuple[int, bool, str] | None:
    """(power of ten, percent?, unit) of what follows the digits, or None if it is more than a unit."""
    tail = " ".join(tail.replace(")", " ").lower().rstrip(" .,;:!").split())
    scale = 0
    head, _, rest = tail.partition(" ")
    if head in _SCALES:
        scale, tail = _SCALES[head], rest
    else:
        word = next((word for word in _EAST_ASIAN_SCALES if tail.startswith(word)), None)
        if word is not None:
            scale, tail = _EAST_ASIAN_SCALES[word], tail.removeprefix(word).strip()
    if tail in _PARTS:
        return (_PARTS[tail], True, currency) if not scale and not currency else None
    if not tail:
        return scale, False, currency
    words = tail.split()
    singular = " ".join(word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words)
    unit = _CURRENCIES.get(singular, _UNIT_NAMES.get(singular, singular))
    if currency:
        return (scale, False, currency) if unit == currency else None
    known = unit in _CURRENCIES.values()
    if not known and (len(words) > 2 or not _UNIT.fullmatch(tail) or _NOT_A_UNIT & set(words)):
        return None
    return scale, False, unit


def numbers_match(predicted: Number, gold: Number, *, any_scale: bool = False) -> bool:
    """Whether two prints mean the same number.

    Sign counts, powers of ten count, and units that are both printed must agree. `12%` equals `0.12` (the unit is
    stated) but neither `12` nor `0.12` alone equals the other. A tolerance that the gold states is the only one then.
    Else rounding: a gold printed in full as an integer is exact against another integer. Otherwise the difference may
    be 1e-4 of the gold (what is lost by computing with rounded inputs), or half a step of the gold's last printed
    place if it was printed with a decimal point (a more precise answer that rounds to the gold is not wrong), but
    never more than 1 %, so that a gold of `0.2` does not open a window of 25 %. any_scale: a row may say that its
    question leaves the scale open; then a factor of one of `SLIPS`, up or down, is forgiven. The sign never is.
    """
    if predicted.unit and gold.unit and predicted.unit != gold.unit:
        return False
    factors = (Fraction(1), *SLIPS, *(1 / slip for slip in SLIPS)) if any_scale else (Fraction(1),)
    return any(_close(predicted.value * factor, gold) for factor in factors)


def _close(value: Fraction, gold: Number) -> bool:
    difference = abs(value - gold.value)
    if gold.tolerance is not None:
        return difference <= gold.tolerance
    if not gold.rounded and value.denominator == 1:
        return difference == 0
    size = abs(gold.value)
    allowed = RELATIVE_TOLERANCE * size
    if gold.rounded:
        allowed = max(allowed, min(gold.step / 2, ROUNDING_CAP * size))
    return difference <= allowed
