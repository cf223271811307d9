"""Finding the answer in a completion and comparing it with the gold ones, strictly.

Everything here is text in, text out. The rules are the reward of the recipe (QwenLong-L1, arXiv 2505.17667, eq. 12)
without the holes of its released code: no substring match, no empty answer, no hedge, no slack in numbers. What a
strict rule gives up is paraphrase: "New York" for "New York City" scores 0 here and is left to the judge.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from .numbers import numbers_match, parse_number

ANSWER_TYPES = ("auto", "span", "number", "choice", "free")
PLACEHOLDER = "insert answer here"
# Characters of a line that are read as its answer: keeps the cost of a rule small whatever a policy writes. A longer
# line says so in its text, and so matches nothing shorter.
_LONGEST, _CUT = 4000, " (cut)"

_EMPHASIS = re.compile(r"[*`]+|(?<!\w)_+|_+(?!\w)")
_MARKER = re.compile(r"\banswer[*_`\s]+is\b(?!n't)[*_`\s]*:?|\\boxed\s*(?=\{)", re.IGNORECASE)
_SPECIAL = re.compile(r"<[|｜][^<>\n]{0,60}[|｜]>|</?s>|<eos>")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b(?:a|an|the)\s+(?=\S)")
_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_LETTER = re.compile(r"(?:(?:option|choice)\s+)?(?:\(([A-Z])\)|([A-Z]))(?:\s*[.:)]\s*(.*))?", re.IGNORECASE | re.DOTALL)
_SEPARATOR = re.compile(r"\s+(?:and/or|or|and)\s+|\s*[/;|]\s*|,\s+", re.IGNORECASE)


def after_thinking(completion: str) -> str | None:
    """What follows the last `</think>`; None if a `<think>` was opened and never closed (the completion was cut)."""
    _, found, tail = completion.rpartition("</think>")
    if found:
        return tail
    return None if "<think>" in completion else completion


def extract_answer(text: str) -> str | None:
    """The answer announced last by "answer is" or `\\boxed{}`: first line, without emphasis and final punctuation.

    None when nothing is announced. May be the empty string.
    """
    announced = _announced(text)
    return announced[0] if announced else None


def is_cut(text: str) -> bool:
    """Whether the announced answer runs into the end of the text, so that a length limit may have cut it ("12|34")."""
    announced = _announced(text)
    return announced is not None and not announced[1]


def _announced(text: str) -> tuple[str, bool] | None:
    """(answer, complete): complete when a line end, a closing mark or an end-of-text token follows the answer."""
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    marker = markers[-1]
    rest = text[marker.end() :].lstrip()
    if marker[0].startswith("\\"):
        content = _braced(rest)
        return clean(content.partition("\n")[0]), len(content) + 1 < len(rest)
    parts = _SPECIAL.split(rest, maxsplit=1)
    line, newline, _ = parts[0].partition("\n")
    # A full stop after a digit may be a decimal point.
    closed = re.search(r"""(?<!\d)[.!?)"”]\s*$""", line) is not None
    return clean(line), bool(newline) or len(parts) > 1 or closed


def _braced(text: str) -> str:
    """The content of the leading {...}, nested braces respected; the rest if the brace never closes."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:index]
    return text[1:]


def clean(line: str) -> str:
    """Strip emphasis, LaTeX text wrappers, quotes and final punctuation from one line."""
    line = " ".join(line.split())
    line = line if len(line) <= _LONGEST else line[:_LONGEST] + _CUT
    line = _LATEX_TEXT.sub(r"\1", _EMPHASIS.sub("", line)).replace("\\$", "$").replace("\\%", "%").replace("\\,", "")
    if (
        len(line) > 2
        and line.count("$") == 2
        and line.strip(" .,;:").startswith("$")
        and line.rstrip(" .,;:").endswith("$")
    ):
        line = line.replace("$", "")
    return line.strip().rstrip(" .,;:!?\"'”’»").lstrip(" :\"'“‘«")


def normal_form(text: str) -> str:
    """SQuAD normalisation in unicode: NFKC, case folded, no punctuation, no leading articles, single spaces.

    Unlike SQuAD's it keeps what carries meaning beside digits ("1.5" is not "15", "12-5" not "125", "-5" not "5",
    "5%" not "5") and after letters ("C++"), and keeps an article that ends the text ("vitamin A"). A text that is
    nothing but punctuation or one article has the empty form, which matches nothing.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\s+%", "%", text)
    text = re.sub(r"(?<=\d)[^\w\s.%](?=\d)", " ", text)
    kept: list[str] = []
    for index, letter in enumerate(text):
        if unicodedata.category(letter)[0] not in "PS" or _means_something(text, index):
            kept.append(letter)
    words = " ".join("".join(kept).split())
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


def yes_or_no(text: str) -> str | None:
    """ "yes" or "no" for an answer that opens with one and holds no opposite word; None otherwise."""
    match = re.match(r"\s*(yes|no|true|false)\s*(?:$|[,.;:!](.*))", text, re.IGNORECASE | re.DOTALL)
    if match is None:
        return None
    verdict = _YES_NO[match[1].lower()]
    rest = set(re.findall(r"[a-z]+", (match[2] or "").lower()))
    return None if rest & {"yes", "no", "not", "true", "false", "or", "maybe"} else verdict


def choice_letter(text: str, choices: Sequence[str] | None) -> str | None:
    """The letter that an answer picks: "B", "(B)", "B. text", or the text of a choice; None if none or several.

    A text after the letter must be that choice's own when the choices are known, and may not name another letter.
    """
    text = clean(text)
    match = _LETTER.fullmatch(text)
    if match is not None:
        letter, rest = (match[1] or match[2]).upper(), (match[3] or "").strip()
        if choices is not None:
            index = ord(letter) - ord("A")
            right = index < len(choices) and (not rest or normal_form(rest) == normal_form(choices[index]))
            return letter if right else None
        return None if re.search(r"(?:\(|\b)[A-Z](?:[.:)]|$)|\b(?:or|and)\s+[A-Z]\b", rest) else letter
    form = normal_form(text)
    same = [index for index, choice in enumerate(choices or ()) if form and normal_form(choice) == form]
    return chr(ord("A") + same[0]) if len(same) == 1 else None


def gold_type(gold: str, choices: Sequence[str] | None) -> str:
    """What a gold answer is: choice | yes_no | number | span."""
    if choices is not None or re.fullmatch(r"\(?[A-J]\)?\.?", gold.strip()):
        return "choice"
    if gold.strip(" .").lower() in _YES_NO:
        return "yes_no"
    number = parse_number(gold)
    return "number" if number is not None and number.plain else "span"


def matches(answer: str, gold: str, answer_type: str, choices: Sequence[str] | None) -> bool:
    """Whether one extracted answer equals one gold answer under the strict rule of its type."""
    kind = gold_type(gold, choices)
    if answer_type == "choice" or (answer_type == "auto" and kind == "choice"):
        letter = choice_letter(answer, choices)
        return letter is not None and letter == choice_letter(gold, choices)
    if kind == "yes_no":
        return yes_or_no(answer) == _YES_NO[gold.strip(" .").lower()]
    gold_number = (
        parse_number(gold) if answer_type == "number" or (answer_type == "auto" and kind == "number") else None
    )
    if gold_number is not None:
        number = parse_number(answer)
        return number is not None and numbers_match(number, gold_number)
    form = normal_form(gold)
    return bool(form) and normal_form(_unwrap(answer)) == form


def _unwrap(answer: str) -> str:
    """The template prints its slot in parentheses, so "(Paris)" is "Paris"."""
    return answer[1:-1] if answer.startswith("(") and answer.find(")") == len(answer) - 1 else answer


def is_hedged(answer: str, golds: Sequence[str], answer_type: str, choices: Sequence[str] | None) -> bool:
    """Whether a wrong answer names a gold one among others ("Paris or London")."""
    parts = _SEPARATOR.split(answer)
    return len(parts) > 1 and any(
        part and matches(clean(part), gold, answer_type, choices) for part in parts for gold in golds
    )
