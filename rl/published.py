"""The rules of the released QwenLong-L1 code (arXiv 2505.17667), in behaviour and for comparison alone.

`qwenlong-l1` is its training reward (reward_score/docqa, docmath, long), `qwenlong-l1-eval` its evaluation (eval/).
Written anew from what those functions do; a data file of their measured outcomes is in the tests. Do not train on it:
  * no `</think>`: 0 in training; the evaluation then reads the whole response;
  * spans: the last literal "the answer is", SQuAD's normalisation, and the gold may lie inside the answer or the
    answer inside the gold, so "the" (normalises to nothing, which is inside everything), "e" for "Peter", "3" for
    "13", "not Paris" and "Paris or London" all score 1;
  * numbers: the *first* number announced; signs are dropped, so is any power of ten, 0.15 %, and a difference that
    rounding up to 3 decimals (evaluation: 2) hides; a text that isn't a literal is 0. The evaluation drops parentheses
    first, training does not see "(32.4)";
  * choices: only the words "The correct answer is (B)", A to D.
Only the first gold answer counts. Which rule applies they tell by data set; here it is the row's answer type: choice,
number, or anything else as a span ("auto" too: five of the seven benchmarks compare years as spans).

Their numbers go through `eval`. Both sides have matched `[0-9.,]+` before, so that only a signed literal reaches it;
ours is read by a whitelist of syntax nodes (a number, a minus). Deviations, all of them 0 here:
  1. a gold answer in which their pattern finds no number makes their code raise ("yes", "about 5");
  2. so do infinities (a literal above 1.8e308) compared with each other, and in the evaluation integers too large for
     a float;
  3. integers of more than 4,300 digits: their outcome depends on the interpreter's limit, ours assumes the default;
  4. a gold choice may be an option's text: theirs is always a letter.
"""

from __future__ import annotations

import ast
import math
import re
import string
from collections.abc import Sequence

from .answers import LONGEST
from .choices import choice_letter

_NUMBER = re.compile(r"the answer is (=?≈?`?%?\$?°?£?€?¥?-?[0-9.,]+)", re.IGNORECASE)
# Their patterns for units, on what can still reach them: a dot or two in front of the digits are taken for a unit.
_LEADING_DOTS = re.compile(r"\.{1,2}(\d+|\d*\.+\d+)")
_SYMBOLS = str.maketrans("", "", "£€¥`%$°")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TOLERANCE = 0.0015
_MOST_DIGITS = 4300

Scored = tuple[float, str, str | None]


def qwenlong_score(
    completion: str, golds: Sequence[str], answer_type: str, choices: Sequence[str] | None, *, evaluation: bool
) -> Scored:
    """(0.0 or 1.0, reason, what was extracted or None)."""
    text = completion.rpartition("</think>")[2].strip() if "</think>" in completion else ""
    if evaluation and not text:
        text = completion.strip()
    if not text:
        return 0.0, "truncated" if completion.strip() else "empty", None
    text, gold = text.replace("*", ""), golds[0]
    if answer_type == "choice" or choices is not None:
        predicted = announced_choice(text)
        right = predicted is not None and predicted == choice_letter(gold, choices)
    elif answer_type.startswith("number"):
        predicted = _announced_number(text, evaluation)
        right = bool(predicted) and _same_number(predicted or "", gold, evaluation)
    else:
        predicted = announced_span(text)
        right = bool(predicted) and _inside(predicted or "", gold if evaluation else _sentence(gold))
    if not predicted:
        return 0.0, "no_answer", None
    return float(right), "correct" if right else "wrong", predicted[:LONGEST]


def announced_choice(text: str) -> str | None:
    """The letter of the first "The correct answer is (B)", or without parentheses where none has them."""
    match = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return match[1] if match else None


def announced_span(text: str) -> str | None:
    """What follows the last "the answer is"; None where nothing does."""
    _, marker, tail = text.rpartition("the answer is")
    if not marker:
        return None
    return tail.strip().replace("<｜Assistant｜>", "").replace("<｜end▁of▁sentence｜>", "").strip().strip(".").strip()


def squad_form(text: str) -> str:
    """SQuAD's own normalisation: lower case, ASCII punctuation dropped, then articles, then spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def _sentence(gold: str) -> str:
    """A gold answer as their training reads it: out of the sentence that announces it."""
    return announced_span(f"Therefore, the answer is {gold}.".replace("*", "")) or ""


def _inside(predicted: str, gold: str) -> bool:
    left, right = squad_form(predicted), squad_form(gold)
    return left in right or right in left


def _announced_number(text: str, evaluation: bool) -> str | None:
    if evaluation:
        text = text.replace("(", "").replace(")", "")
    match = _NUMBER.search(text)
    return match[1].replace(",", "").rstrip(".") if match else None


def _same_number(predicted: str, gold: str, evaluation: bool) -> bool:
    announced = _announced_number(f"Therefore, the answer is {gold}.".replace("*", ""), evaluation)
    if announced is None:
        return False
    left, right = _value(predicted), _value(announced)
    try:
        return _close(left, right, evaluation)
    except (OverflowError, ValueError):  # a number too large for a float, an infinity less an infinity
        return False


def _value(text: str) -> int | float:
    """Their normalisation of one announced number, what is no literal being 0."""
    text = text.strip().rstrip(".").translate(_SYMBOLS).rpartition("=")[2].rpartition("≈")[2].strip()
    match = _LEADING_DOTS.fullmatch(text)
    text = match[1] if match else text
    if not text or ("." not in text and len(text.lstrip("-")) > _MOST_DIGITS):
        return 0
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):  # 007, 1.2.3
        return 0
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    value = node.value if isinstance(node, ast.Constant) else None
    return sign * value if isinstance(value, int | float) else 0


def _close(predicted: int | float, gold: int | float, evaluation: bool) -> bool:
    """Their comparison, operation by operation, since an exact power of ten is judged on rounded logarithms."""
    high, low = max(abs(gold), abs(predicted)), min(abs(gold), abs(predicted))
    if high != 0 and low != 0:
        power = math.log10(high / low) if evaluation else math.log10(high) - math.log10(low)
        if int(power) == power:
            return True
    for part, slip in ((50, 100), (500, 1000), (50000, 100000)):
        if low <= high / part and _within(low * slip, high):
            return True
    factor = 100 if evaluation else 1000
    if math.ceil(high * factor) / factor == math.ceil(low * factor) / factor:
        return True
    return _within(predicted, gold)


def _within(predicted: int | float, gold: int | float) -> bool:
    slack = abs(gold) * _TOLERANCE
    return gold - slack <= predicted <= gold + slack
