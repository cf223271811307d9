"""The four behaviours counted by words alone: text in, counts out; no model, no randomness, linear time.

A response's reasoning is cut into sentences, and a sentence counts once for each behaviour that one of its cues shows
(`lexicon.py`). Quotations are taken out first: what a document says ("wait, we were wrong") is nobody's doubt. A cue that
stands alone ("Wait.") and the sentence after it are one instance. A quotation of three words and more that stands in the
document word for word is grounding by itself, announced or not; without the document, only an announced one is.

It gives up on paraphrase, on quotes in single quotation marks, and on other languages than English and Chinese.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..answers import thinking, visible
from .lexicon import BEHAVIOURS, PATTERN, QUOTE

Counts = dict[str, int]

LONGEST_QUOTE = 1000
"""Characters within a pair of quotation marks; what is longer is a mark that lost its partner."""

_QUOTED = re.compile(
    rf'"([^"\n]{{1,{LONGEST_QUOTE}}})"|“([^“”\n]{{1,{LONGEST_QUOTE}}})”|「([^「」\n]{{1,{LONGEST_QUOTE}}})」'
    rf"|«([^«»\n]{{1,{LONGEST_QUOTE}}})»|^[ \t]{{0,3}}>([^\n]{{1,{LONGEST_QUOTE}}})$",
    re.MULTILINE,
)
_END = re.compile(r"(?<=[.!?…])[*_)\]’”\"]{0,3}(?=\s)|[。！？；]+|\n+")
_LEAD = re.compile(r"^[\s\-*•·#>_()\d.、]{0,12}")
_WORD = re.compile(r"[a-z0-9']+|[\u4e00-\u9fff]")
_SPACE = re.compile(r"\s+")
_BARE = 3
"""A sentence of so few words is an interjection."""


@dataclass(frozen=True)
class Sentence:
    """`text` in lower case with `QUOTE` for each quotation; the quotations as they stand."""

    text: str
    quotes: tuple[str, ...]


@dataclass(frozen=True)
class Lexical:
    """`counts` by behaviour; `verbatim` of the grounding ones quote the document word for word (None: no document)."""

    counts: Counts
    verbatim: int | None = None


def normal(text: str) -> str:
    """What two texts are compared in: visible characters, lower case, every space alike."""
    return _SPACE.sub(" ", visible(text)).strip().lower()


def count(response: str, document: str | None = None) -> Lexical:
    """Instances in the reasoning of a response. `document`: the prompt's, already `normal`, None if it isn't known."""
    counts, verbatim = dict.fromkeys(BEHAVIOURS, 0), 0
    carried: set[str] = set()
    for sentence in sentences(thinking(response)):
        shown = shows(sentence.text)
        if document is not None and any(_stands_in(quote, document) for quote in sentence.quotes):
            verbatim += 1
            shown.add("grounding")
        for behaviour in shown - carried:
            counts[behaviour] += 1
        carried = shown if len(_WORD.findall(sentence.text, 0, 200)) <= _BARE and not sentence.quotes else set()
    return Lexical(counts, None if document is None else verbatim)


def shows(sentence: str) -> set[str]:
    """The behaviours that a sentence in lower case shows."""
    return {str(found.lastgroup) for found in PATTERN.finditer(sentence)} - {"neither"}


def sentences(text: str) -> Iterator[Sentence]:
    """In order, without the marks of lists and headings that they begin with."""
    text = visible(text).replace(QUOTE, " ")
    quotes = [next(filter(None, found.groups()), "") for found in _QUOTED.finditer(text)]
    text = _QUOTED.sub(QUOTE, text)
    taken = start = 0
    for end in (*(found.end() for found in _END.finditer(text)), len(text)):
        raw, start = text[start:end], end
        inside = raw.count(QUOTE)
        mine, taken = tuple(quotes[taken : taken + inside]), taken + inside
        said = _LEAD.sub("", raw).rstrip().lower().replace("’", "'")
        if said:
            yield Sentence(said, mine)


def _stands_in(quote: str, document: str) -> bool:
    """Long enough to be recalled rather than to happen: three words, or six Chinese characters."""
    found = normal(quote).strip(" .,;:!?…。，；：！？")
    words = len(found.split())
    return (words >= 3 or (not found.isascii() and len(_WORD.findall(found)) >= 6)) and found in document
