"""The rule reward: one completion, its gold answers, a verdict with its reason.

Strict by default: the final answer (`answers.py`) must equal a gold one by the rule of its type (`matching.py`), the
outcome reward of QwenLong-L1 (arXiv 2505.17667, eq. 12) without the holes of its released code. What it gives up is
paraphrase: "New York" for "New York City" scores 0 here and is left to the judge. `cover` also takes a span that
says the gold and little else. The published rules (`published.py`, `longbench.py`) are there for comparison alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from .answers import Extraction, extract
from .longbench import longbench_score
from .matching import ANSWER_TYPES, candidates, gold_type, is_dump, is_hedged, matches
from .published import qwenlong_score
from .rows import Example
from .spans import normal_form

SCORINGS = ("strict", "cover", "qwenlong-l1", "qwenlong-l1-eval", "longbench", "longbench-em")
# Every reason that a verdict can have. What rewards.py adds for the judge and the pipeline stands there.
REASONS: Mapping[str, str] = MappingProxyType(
    {
        "correct": "the answer is a gold answer",
        "partial": "LongBench's F1 lies between 0 and 1",
        "wrong": "one answer, and not a gold one",
        "hedged": "a gold answer among others, or under reserve",
        "rivals": "two statements side by side that disagree",
        "dump": "a pile of candidates, or an answer too long to be one",
        "no_answer": "nothing announces an answer",
        "placeholder": "the template echoed back",
        "empty": "nothing was written, or nothing stands where the answer should",
        "truncated": "the reasoning never ends, or the length limit cut the answer",
    }
)
# Reasons for which there is nothing to show a judge: it would be asked to guess.
NOT_JUDGED = frozenset(("placeholder", "empty", "truncated", "rivals", "dump"))


@dataclass(frozen=True)
class Verdict:
    """score: 0.0 or 1.0, with `longbench` anything between. reason: one of REASONS.

    extracted: the announced answer, None if there is none.
    """

    score: float
    reason: str
    extracted: str | None


def rule_reward(
    completion: str,
    answers: Sequence[str],
    *,
    answer_type: str = "auto",
    choices: Sequence[str] | None = None,
    scoring: str = "strict",
) -> Verdict:
    """Score one completion against its gold answers by rule.

    Any one gold answer suffices (under qwenlong-l1 only the first counts, as published). answer_type "auto" takes each
    gold answer for what it looks like. Nothing is ever evaluated as code.
    Raises ValueError for no answers, an unknown answer_type or an unknown scoring.
    """
    answers = (answers,) if isinstance(answers, str) else answers
    if not answers:
        raise ValueError("no gold answers to compare with; give at least one")
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"answer_type {answer_type!r} is unknown; choose one of {', '.join(ANSWER_TYPES)}")
    check_scoring(scoring)
    if scoring.startswith("qwenlong-l1"):
        return Verdict(*qwenlong_score(completion, answers, answer_type, choices, evaluation=scoring.endswith("-eval")))
    if scoring.startswith("longbench"):
        return Verdict(*longbench_score(completion, answers, answer_type, choices, exact=scoring.endswith("-em")))
    return _strict(extract(completion), answers, answer_type, choices, cover=scoring == "cover")


def check_scoring(scoring: str) -> None:
    """Raises ValueError for an unknown scoring."""
    if scoring not in SCORINGS:
        raise ValueError(f"reward scoring {scoring!r} is unknown; choose one of {', '.join(SCORINGS)}")


def score_example(example: Example, completion: str, finish_reason: str, scoring: str) -> Verdict:
    """`rule_reward` of one sampled completion of an example that has gold answers.

    Under our own rules an answer that the length limit cut, or that was about to come, is no answer ("12|34").
    """
    verdict = rule_reward(
        completion, example.answers, answer_type=example.answer_type, choices=example.choices, scoring=scoring
    )
    if finish_reason != "length" or scoring not in ("strict", "cover"):
        return verdict
    if verdict.reason == "no_answer" or not extract(completion).complete:
        return Verdict(0.0, "truncated", verdict.extracted)
    return verdict


def _strict(
    found: Extraction, golds: Sequence[str], answer_type: str, choices: Sequence[str] | None, *, cover: bool
) -> Verdict:
    if found.answer is None or found.reason is not None:
        return Verdict(0.0, found.reason or "no_answer", found.answer)
    if answer_type == "list":
        said = [found.block if "\n" in found.block else found.printed]
    else:
        # A gold printed in parentheses is met by the same print: "(1,234)" of an account for "(1,234)".
        if found.printed != found.answer and found.printed in golds:
            return Verdict(1.0, "correct", found.answer)
        said = candidates(found.answer, choices)
    if any(matches(one, gold, answer_type, choices, cover=cover) for one in said for gold in golds):
        return Verdict(1.0, "correct", found.answer)
    # An "a" is a letter where letters are asked for, and an article elsewhere.
    letters = answer_type == "choice" or (answer_type == "auto" and gold_type(golds[0], choices) == "choice")
    if not normal_form(found.answer) and not letters:
        return Verdict(0.0, "empty", found.answer)
    if is_dump(found.answer, golds):
        return Verdict(0.0, "dump", found.answer)
    hedged = answer_type != "list" and is_hedged(found.answer, golds, answer_type, choices)
    return Verdict(0.0, "hedged" if hedged else "wrong", found.answer)
