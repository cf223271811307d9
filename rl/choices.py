"""Answers out of a closed set: the letter or the text of an option, yes and no."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from .answers import clean, unwrap
from .spans import normal_form

YES_NO = {
    **dict.fromkeys(("yes", "true", "是", "是的", "对", "對", "はい", "ใช่"), "yes"),
    **dict.fromkeys(("no", "false", "否", "不是", "不", "いいえ", "ไม่ใช่"), "no"),
}
_YES_NO = re.compile(r"\s?([^\W\d_]+)\s?(?:$|[,.;:!，。；：！](.*))", re.DOTALL)
_OPPOSITE = frozenset("yes no not true false or maybe perhaps unless however but".split())
_LETTER = re.compile(
    r"(?:(?:option|choice|answer|选项|選項)\s?)?(?:\(([A-Z])\)|([A-Z]))(?:\s?[.:)、]\s?(.*)|\s(?=\S)(.*))?",
    re.IGNORECASE | re.DOTALL,
)
_ANOTHER = re.compile(r"(?:\(|\b)[A-Z](?:[.:)]|$)|\b(?:or|and|not)\s[A-Z]\b")


def yes_or_no(text: str) -> str | None:
    """ "yes" or "no" for an answer that opens with one and holds no opposite word; None otherwise."""
    match = _YES_NO.match(unicodedata.normalize("NFKC", text))
    verdict = YES_NO.get(match[1].lower()) if match else None
    if match is None or verdict is None:
        return None
    rest = set(re.findall(r"[a-z]+", (match[2] or "").lower()))
    return None if rest & _OPPOSITE or any(word in (match[2] or "") for word in "是否不或") else verdict


def choice_letter(text: str, choices: Sequence[str] | None) -> str | None:
    """The letter that an answer picks: "B", "(B)", "B. text", or the text of a choice; None if none or several.

    A text after the letter must be that choice's own when the choices are known, and may not name another letter.
    Choices that print their own letter ("A. Paris") are read without it.
    """
    text = clean(unicodedata.normalize("NFKC", text))
    texts = [_bare(choice, index) for index, choice in enumerate(choices)] if choices is not None else None
    match = _LETTER.fullmatch(text)
    if match is not None and (match[4] is None or texts is not None):
        letter, rest = (match[1] or match[2]).upper(), (match[3] or match[4] or "").strip()
        if texts is None:
            return None if _ANOTHER.search(rest) else letter
        index = ord(letter) - ord("A")
        if index < len(texts) and (not rest or normal_form(unwrap(rest)) == normal_form(texts[index])):
            return letter
        if match[4] is None:
            return None  # "A cat" may still be a choice of its own; "B. Paris" may not
    form = normal_form(text)
    same = [index for index, choice in enumerate(texts or ()) if form and normal_form(choice) == form]
    return chr(ord("A") + same[0]) if len(same) == 1 else None


def _bare(choice: str, index: int) -> str:
    letter = chr(ord("A") + index)
    match = re.fullmatch(rf"\s?\(?{letter}[.:)]\s?(.+)", choice, re.DOTALL)
    return match[1] if match else choice
