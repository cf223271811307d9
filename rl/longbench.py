"""LongBench's own rules (arXiv 2308.14508, metrics.py; 2412.15204 for choices), in behaviour and for comparison alone.

`longbench`: F1 of SQuAD-normalised words, each word counted as often as both sides hold it, maximum over the gold
answers, 0 where nothing is shared. `longbench-em`: equality of those forms, as the HotpotQA and QwenLong-L1 evaluations
add it. Choices: LongBench v2's letter after "The correct answer is (B)".

One deliberate deviation: LongBench scores the whole response, because its prompts ask for nothing but the answer. Our
template asks for a sentence, so what follows its last "the answer is" is scored where a response has one (as
QwenLong-L1's evaluation does before it calls the same function), and the whole response, less its reasoning, where it
has none. Not here: the Chinese data sets' F1 on segmented words, ROUGE, and the classification and code metrics; the
English rule stands for every text, as LongBench applies it to the seven English benchmarks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .answers import LONGEST
from .choices import choice_letter
from .published import Scored, announced_choice, announced_span, squad_form


def longbench_score(
    completion: str, golds: Sequence[str], answer_type: str, choices: Sequence[str] | None, *, exact: bool
) -> Scored:
    """(score in [0, 1], reason, what was scored or None)."""
    text = completion.rpartition("</think>")[2]
    plain = text.replace("*", "")
    if answer_type == "choice" or choices is not None:
        letter = announced_choice(plain)
        right = letter is not None and letter == choice_letter(golds[0], choices)
        return float(right), "correct" if right else "no_answer" if letter is None else "wrong", letter
    announced = announced_span(plain)
    predicted = text if announced is None else announced
    form = squad_form(predicted)
    if exact:
        score = float(any(form == squad_form(gold) for gold in golds))
    else:
        words = Counter(form.split())
        score = max(f1(words, Counter(squad_form(gold).split())) for gold in golds)
    reason = "correct" if score >= 1.0 else "partial" if score > 0.0 else "wrong" if form else "empty"
    return score, reason, predicted.strip()[:LONGEST] or None


def f1(predicted: Counter[str], gold: Counter[str]) -> float:
    """Harmonic mean of precision and recall over words; 0 where none is shared, two empty texts too."""
    shared = (predicted & gold).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / predicted.total(), shared / gold.total()
    return 2 * precision * recall / (precision + recall)
