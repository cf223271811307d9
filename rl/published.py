"""The lenient rule reward of the released QwenLong-L1 code, for comparison only (arXiv 2505.17667, its reward_score).

Written anew from its described behaviour, so that a run can be scored both ways. Do not train on it: its holes are
  * spans: the gold may lie inside the answer or the answer inside the gold, so "the" (normalises to nothing, which is
    inside everything), "e" for "Peter", "3" for "13", "not Paris" and "Paris or London" all score 1;
  * numbers: signs are dropped, any power of ten is forgiven, so is 0.15 %; the *first* number announced counts;
  * choices: only the literal words "The correct answer is (B)" are read.
One deliberate difference: the original gives 0 to a completion without `</think>`, which presumes a thinking model.
Only the first gold answer is used, as there.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

_DOCMATH = re.compile(r"the answer is (=?≈?`?%?\$?°?£?€?¥?-?[0-9.,]+)", re.IGNORECASE)
_UNITS = re.compile(r"[£€¥$%°=≈`,]|\b(?:million|billion|thousand|us|usd|rmb)\b", re.IGNORECASE)
_SPECIAL = re.compile(r"<[|｜][^<>\n]{0,60}[|｜]>|</?s>")
_SLIPS = (100.0, 1000.0, 100000.0)
_TOLERANCE = 0.0015


def published_score(completion: str, answers: Sequence[str], answer_type: str) -> tuple[float, str | None]:
    """(0.0 or 1.0, what was extracted or None) for a completion under the published rules."""
    text = completion.rpartition("</think>")[2]
    gold = answers[0]
    if answer_type == "choice":
        found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(
            r"The correct answer is ([A-D])", text
        )
        return float(found is not None and found[1] == gold.strip("() .")), found[1] if found else None
    text = text.replace("*", "")
    if answer_type == "number":
        match = _DOCMATH.search(text)
        predicted = match[1].replace(",", "") if match else None
        return float(predicted is not None and _same_number(predicted, gold)), predicted
    _, marker, tail = text.rpartition("the answer is")
    predicted = _SPECIAL.sub("", tail).strip().strip(".").strip()
    if not marker or not predicted:
        return 0.0, None
    left, right = _squad_form(predicted), _squad_form(gold)
    return float(left in right or right in left), predicted


def _squad_form(text: str) -> str:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _to_float(text: str) -> float | None:
    text = _UNITS.sub("", text).strip().rstrip(".")
    if text.lower() in ("yes", "true", "no", "false"):
        return float(text.lower() in ("yes", "true"))
    return float(text) if re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", text) else None


def _same_number(predicted: str, gold: str) -> bool:
    left, right = _to_float(predicted), _to_float(gold)
    if left is None or right is None:
        return False
    left, right = abs(left), abs(right)
    if left and right:
        power = math.log10(left / right)
        if math.isclose(power, round(power), abs_tol=1e-12):
            return True
    if math.ceil(left * 1000) == math.ceil(right * 1000):
        return True
    pairs = [(left, right), *((left * slip, right) for slip in _SLIPS), *((left, right * slip) for slip in _SLIPS)]
    return any(abs(a - b) <= _TOLERANCE * max(abs(b), 1e-12) for a, b in pairs)
