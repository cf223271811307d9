"""Dates as people print them: `5 October 1987`, `Oct. 5th, 1987`, `Monday, October 5, 1987`, `1987-10-05`, `1987年10月5日`.

A date is what is printed: day, month and year, or two of them. One that says more or less than the gold is another
answer. Day or month first? With the year in front the month follows it. In `5/10/1987` one number above 12 decides;
where none does, the text is ambiguous and is no date: it equals only a gold of the same print. Years have four
digits; a weekday must be the right one. A year alone is a number.
"""

from __future__ import annotations

import datetime
import re
import unicodedata
from dataclasses import dataclass

_LONGEST = 60
_NAMES = "january february march april may june july august september october november december".split()
_MONTHS = {name: index for index, name in enumerate(_NAMES, 1)} | {name[:3]: index for index, name in enumerate(_NAMES, 1)}  # fmt: skip
_MONTHS["sept"] = 9
_WEEKDAYS = tuple(str(day) for day in "monday tuesday wednesday thursday friday saturday sunday".split())
_DAYS_IN_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_MONTH = "(?P<month>" + "|".join(sorted(_MONTHS, key=len, reverse=True)) + r")\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4})"
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"{_DAY}(?: of)?[ -]{_MONTH}(?:,? |-){_YEAR}",
        rf"{_MONTH} {_DAY},? {_YEAR}",
        rf"{_YEAR},? {_MONTH} {_DAY}",
        rf"{_MONTH},?(?: of)? {_YEAR}",
        rf"{_MONTH} {_DAY}",
        rf"{_DAY}(?: of)? {_MONTH}",
        r"(?P<year>\d{4})([-/.])(?P<number>\d{1,2})\2(?P<day>\d{1,2})(?:t00:00(?::00)?z?)?",
        r"(?P<first>\d{1,2})([-/.])(?P<second>\d{1,2})\2(?P<year>\d{4})",
        r"(?P<year>\d{4}) ?年 ?(?P<number>\d{1,2}) ?月(?: ?(?P<day>\d{1,2}) ?[日号號])?",
        r"(?P<number>\d{1,2}) ?月 ?(?P<day>\d{1,2}) ?[日号號]",
    )
)


@dataclass(frozen=True)
class Date:
    """year, month, day: None where it isn't printed."""

    year: int | None
    month: int
    day: int | None


def parse_date(text: str) -> Date | None:
    """The one date that `text` is, or None when it is none, no day of the calendar, or ambiguous."""
    if len(text) > _LONGEST:
        return None
    text = (
        " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        .rstrip(".")
        .removeprefix("on ")
        .removeprefix("the ")
    )
    weekday, comma, rest = text.partition(" ")
    named = next((day for day in _WEEKDAYS if weekday.rstrip(",.") in (day, day[:3])), None) if comma else None
    match = next((found for form in _FORMS if (found := form.fullmatch(rest if named else text))), None)
    if match is None:
        return None
    date = _date(match.groupdict())
    if date is None or named is None:
        return date
    if date.year is None or date.day is None:
        return None  # which year's Monday?
    return date if datetime.date(date.year, date.month, date.day).weekday() == _WEEKDAYS.index(named) else None


def _date(parts: dict[str, str | None]) -> Date | None:
    """The date of a match's named parts, if the calendar has it."""
    said = {name: int(text) for name, text in parts.items() if text and text.isdecimal()}
    year, day = said.get("year"), said.get("day")
    if "first" in said:
        first, second = said["first"], said["second"]
        if first != second and first <= 12 and second <= 12:
            return None
        day, month = (second, first) if second > 12 else (first, second)
    else:
        month = said["number"] if "number" in said else _MONTHS[parts["month"] or ""]
    if not 1 <= month <= 12 or (day is not None and not 1 <= day <= _DAYS_IN_MONTH[month - 1]) or year == 0:
        return None
    if year is not None and (month, day) == (2, 29) and (year % 4 or (year % 100 == 0 and year % 400)):
        return None
    return Date(year, month, day)
