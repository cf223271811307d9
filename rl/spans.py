"""Comparing texts: SQuAD's normalisation in Unicode, equality, cover-match, and the words that hedge.

`normal_form` makes equal what a reader would call the same print: case, width, punctuation, a leading article, spaces
between characters of scripts that use none (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan). It does not
equate letters that only look alike (a Cyrillic а is no Latin a), accents, simplified and traditional characters.

Cover-match (gold inside the answer) is what QwenLong-L1.5 uses (arXiv 2512.12967, p. 12). A bare substring test pays
for "not Paris", "Paris or London" and whole pages, so here the gold must stand on word boundaries within the answer's
first comma part, the answer may be only `EXTRA` longer, and a word of doubt, choice or denial voids it.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from .answers import visible

# Words (characters, where words aren't separated) by which a covering answer may be longer than the gold.
EXTRA = 10

_UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_UNSPACED_GAP = re.compile(f"(?<=[{_UNSPACED}]) +(?=[{_UNSPACED}])")
_UNSPACED_TEXT = re.compile(f"[{_UNSPACED}]")
_ARTICLE = re.compile(r"\b(?:a|an|the)\s+(?=\S)")
# Dashes that Unicode keeps apart and printers don't.
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2212\ufe63\uff0d", "-"))
_SUPERSCRIPT = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079\u2080-\u2089]+")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_HEDGE = re.compile(
    r"\b(?:or|either|neither|nor|not|no|never|maybe|perhaps|possibly|probably|might|may|could|unless|unclear|unknown"
    r"|unsure|uncertain|alternatively|versus|vs|between|except|rather than|instead of|other than|depend\w{0,3}|guess)\b"
    r"|n['’]t\b|或|可能|也许|也許|不是|不确定|不確定|并非|並非|もしくは|または|かもしれ|ではない|หรือ|ไม่",
    re.IGNORECASE,
)
SEPARATOR = re.compile(
    r"\s(?:and/or|or|and|vs\.?|versus)\s|\s?[/;|；、，]\s?|,\s|(?:或者|或|もしくは|または)", re.IGNORECASE
)


@lru_cache(maxsize=4096)
def normal_form(text: str) -> str:
    """SQuAD normalisation in Unicode: NFKC, case folded, no punctuation, no leading articles, single spaces.

    Unlike SQuAD's it keeps what carries meaning beside digits ("1.5" is not "15", "12-5" not "125", "-5" not "5",
    "5%" not "5", "10²" not "102") and after letters ("C++"), and keeps an article that ends the text ("vitamin A"). A
    text that is nothing but punctuation or one article has the empty form, which matches nothing.
    """
    text = _VULGAR.sub(lambda found: " " + found[0], _SUPERSCRIPT.sub(lambda found: "^" + found[0], visible(text)))
    text = unicodedata.normalize("NFKC", text).casefold().translate(_DASHES)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\s%", "%", " ".join(text.split()))
    text = re.sub(r"(?<=\d)[^\w\s.%](?=\d)", " ", text)
    kept: list[str] = []
    for index, letter in enumerate(text):
        if unicodedata.category(letter)[0] not in "PS" or _means_something(text, index):
            kept.append(letter)
    words = _UNSPACED_GAP.sub("", " ".join("".join(kept).split()))
    words = _ARTICLE.sub("", words)
    return "" if words in ("a", "an", "the") else words


def _means_something(text: str, index: int) -> bool:
    letter, before, after = text[index], text[index - 1 : index], text[index + 1 : index + 2]
    if letter == ".":
        return after.isdigit() and (before.isdigit() or not before.isalnum())
    if letter == "-":
        return (after.isdigit() or (after != "" and after in "$€£.")) and not before.isalnum()
    if letter == "%":
        return before.isdigit()
    return letter in "+#" and (before.isalpha() or before in ("+", "#"))


def covers(answer: str, gold: str) -> bool:
    """Whether an answer says the gold one and little else; see the top of this file."""
    form, inside = normal_form(answer), normal_form(gold)
    if not form or not inside:
        return False
    if form == inside:
        return True
    if (hedges(answer) and not hedges(gold)) or re.search(r"[/;|；\n]", answer):
        return False
    # The first comma part is the answer's first guess; a gold with commas of its own takes as many parts.
    parts = re.split(r"[,，、]", answer)
    first = normal_form(",".join(parts[: 1 + len(re.findall(r"[,，、]", gold))]))
    if _UNSPACED_TEXT.search(inside):
        return len(inside) > 1 and inside in first and len(form) <= len(inside) + 2 * EXTRA
    longer = len(form.split()) - len(inside.split())
    return f" {inside} " in f" {first} " and longer <= EXTRA


def hedges(text: str) -> bool:
    """Whether a text holds a word of doubt, choice or denial."""
    return _HEDGE.search(text) is not None
