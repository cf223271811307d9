"""Whether one answer is one gold answer, by the rule of its type; and whether a wrong one only hedges.

Types: `span` (text, equal in its normal form), `number`, `number-any-scale` (a row's leave to be off by percent,
thousand, million, billion or trillion), `choice`, `yes_no`, `date`, `list` (order doesn't count, duplicates do), `free`
(like a span; says that paraphrases are left to the judge), and `auto`: what the gold looks like, never a list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .answers import clean, first_sentence, unwrap
from .choices import YES_NO, choice_letter, yes_or_no
from .dates import parse_date
from .numbers import numbers_match, parse_gold, parse_number
from .spans import SEPARATOR, covers, hedges, normal_form

ANSWER_TYPES = ("auto", "span", "number", "number-any-scale", "choice", "yes_no", "date", "list", "free")
# Parts of an answer that are still looked at; with more it is a dump.
MOST_PARTS = 8
MOST_ITEMS = 50

_BULLET = re.compile(r"\s{0,8}(?:[-*•·]|\d{1,3}[.)])\s{1,8}")
_RESERVE = re.compile(
    r"^.{0,40}?\b(?:not|maybe|perhaps|possibly|probably|either|both|may be|might be|could be)\s", re.IGNORECASE
)
_LIST_SEPARATOR = re.compile(r",\s?(?:and|or|&)\s|,\s?|\s(?:and|&)\s|[、，]|和|与|與|及", re.IGNORECASE)


def gold_type(gold: str, choices: Sequence[str] | None) -> str:
    """What a gold answer is: choice | yes_no | number | date | span."""
    if choices is not None or re.fullmatch(r"\(?[A-J]\)?\.?", gold.strip()):
        return "choice"
    if gold.strip(" .").lower() in YES_NO:
        return "yes_no"
    if parse_date(gold) is not None:
        return "date"
    number = parse_gold(gold)
    return "number" if number is not None and number.plain else "span"


def matches(answer: str, gold: str, answer_type: str, choices: Sequence[str] | None, *, cover: bool = False) -> bool:
    """Whether one extracted answer equals one gold answer under the rule of its type; cover: see `spans.covers`."""
    kind = gold_type(gold, choices) if answer_type in ("auto", "span", "free") or answer_type.startswith("number") else answer_type  # fmt: skip
    if kind == "choice" and answer_type in ("auto", "choice"):
        letter = choice_letter(answer, choices)
        return letter is not None and letter == choice_letter(gold, choices)
    if kind == "list":
        return same_items(list_items(answer), list_items(gold))
    if kind == "yes_no":
        said = yes_or_no(answer)
        return said is not None and said == yes_or_no(gold)
    number = parse_gold(gold) if answer_type.startswith("number") or (answer_type == "auto" and kind == "number") else None  # fmt: skip
    if number is not None:
        return _same_number(answer, gold, answer_type)
    if kind == "date" and answer_type in ("auto", "date"):
        date = parse_date(gold)
        if date is not None and parse_date(answer) == date:
            return True
    form = normal_form(gold)
    return bool(form) and (normal_form(unwrap(answer)) == form or (cover and covers(answer, gold)))


def _same_number(answer: str, gold: str, answer_type: str) -> bool:
    predicted, number = parse_number(answer), parse_gold(gold)
    if predicted is None or number is None:
        return False
    return numbers_match(predicted, number, any_scale=answer_type == "number-any-scale")


def candidates(answer: str, choices: Sequence[str] | None) -> list[str]:
    """The answer's line, and its first sentence where another one follows that takes nothing back ("Paris. It is")."""
    first = first_sentence(answer)
    rest = answer[len(first) :].strip(" .!?。！？")
    # "B. Paris" is an option with its letter, not a sentence and the next.
    option = (len(first) == 1 and first.isalpha()) or normal_form(rest) in map(normal_form, choices or ())
    return [answer] if not rest or option or hedges(rest) else [answer, clean(first)]


def is_hedged(answer: str, golds: Sequence[str], answer_type: str, choices: Sequence[str] | None) -> bool:
    """Whether a wrong answer names a gold one among others ("Paris or London") or under reserve ("maybe Paris")."""
    parts = [answer, *SEPARATOR.split(answer)[: MOST_PARTS + 1]]
    parts = [clean(_RESERVE.sub("", part, count=1)) for part in parts]
    return any(matches(part, gold, answer_type, choices) for part in parts if part and part != answer for gold in golds)


def is_dump(answer: str, golds: Sequence[str]) -> bool:
    """Whether an answer is a pile of candidates: more parts than `MOST_PARTS`, or 100 words, beyond any gold's own."""
    own_parts = max(len(SEPARATOR.split(gold)) for gold in golds)
    own_words = max(len(gold.split()) for gold in golds)
    return len(SEPARATOR.split(answer)) > MOST_PARTS + own_parts or len(answer.split()) > 100 + own_words


def list_items(text: str) -> list[str]:
    """The items of a list: bulleted lines, else what stands between semicolons, else between commas and "and"."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and all(_BULLET.match(line) for line in lines[1:]):
        items = [_BULLET.sub("", line, count=1) for line in lines]
    else:
        line = unwrap(clean(lines[0] if lines else ""))
        items = re.split(r"[;；]", line) if re.search(r"[;；]", line) else _LIST_SEPARATOR.split(line)
    cleaned = [re.sub(r"(?i)^(?:and|or)\s", "", clean(item)) for item in items]
    return [item for item in cleaned if item]


def same_items(answer: Sequence[str], gold: Sequence[str]) -> bool:
    """Whether each gold item is one of the answer's, one for one, in any order."""
    if not gold or len(answer) != len(gold) or len(gold) > MOST_ITEMS:
        return False
    left = list(answer)
    for item in sorted(gold, key=len, reverse=True):
        found = next((other for other in left if normal_form(other) == normal_form(item) != ""), None)
        found = found or next((other for other in left if matches(other, item, "auto", None)), None)
        if found is None:
            return False
        left.remove(found)
    return True
