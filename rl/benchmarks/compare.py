"""Two evaluations of the same questions: paired differences with intervals, and which questions flipped.

Only evaluations under the same conditions are compared: same questions, sampling, cut, rule and judge. What may differ is
the model and, with it, its tokenizer. A question has flipped when its mean score over the samples was below one half in A and
is not in B, or the other way round; with one sample that is wrong and right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..seeds import derive
from .bootstrap import Difference, average_difference, paired
from .registry import SEVEN
from .report import Table, markdown, page
from .results import differences, read_results

MEASURES = ("score", "rule", "judge")
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Flip:
    """A question that one model gets right and the other doesn't; answers are as extracted, one a sample."""

    benchmark: str
    id: str
    question: str
    gold: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    gained: bool


@dataclass(frozen=True)
class Comparison:
    """`differences` are B - A, by benchmark (and `average`) and measure; `scores` what A and B have there."""

    names: tuple[str, str]
    notes: tuple[str, ...]
    differences: Mapping[str, Mapping[str, Difference]]
    flips: tuple[Flip, ...]
    scores: Mapping[str, tuple[float | None, float | None]]

    def dump(self) -> dict[str, Any]:
        return {
            "a": self.names[0], "b": self.names[1], "notes": list(self.notes),
            "differences": {name: {m: d.dump() for m, d in row.items()} for name, row in self.differences.items()},
            "scores": {name: list(pair) for name, pair in self.scores.items()},
            "flips": [dict(vars(flip)) for flip in self.flips],
        }  # fmt: skip


def compare_folders(first: Path, second: Path) -> Comparison:
    """Raises ValueError where either is no finished evaluation, or they can't be compared."""
    return compare(read_results(first), read_results(second), (str(first), str(second)))


def compare(a: Results, b: Results, folders: tuple[str, str] = ("A", "B")) -> Comparison:
    """B against A. Raises ValueError where conditions or questions differ, and says in what."""
    _refuse_unlike(a, b, folders)
    conditions = a["conditions"]
    resamples, seed = conditions["scored"]["resamples"], conditions["asked"]["seed"]
    pairs: dict[str, list[tuple[Results, Results]]] = {}
    for left, right in zip(a["questions"], b["questions"], strict=True):
        pairs.setdefault(left["benchmark"], []).append((left, right))
    columns = {
        name: {m: ([_mean(left, m) for left, _ in mine], [_mean(right, m) for _, right in mine]) for m in MEASURES}
        for name, mine in pairs.items()
    }
    made: dict[str, dict[str, Difference]] = {
        name: {m: paired(*row[m], resamples=resamples, seed=derive(seed, "compare", name)) for m in MEASURES}
        for name, row in columns.items()
    }
    if set(SEVEN) <= set(columns):
        made["average"] = {
            m: average_difference(
                [columns[name][m] for name in SEVEN], resamples=resamples, seed=derive(seed, "compare", "average")
            )
            for m in MEASURES
        }
    flips = [flip for mine in pairs.values() for pair in mine for flip in _flip(*pair)]
    names = (a["conditions"]["model"]["name"], b["conditions"]["model"]["name"])
    left, right = (_scores_of(results) for results in (a, b))
    scores = {name: (left.get(name), right.get(name)) for name in made}
    return Comparison(names, tuple(_notes(a, b)), made, tuple(flips), scores)


def _scores_of(results: Results) -> dict[str, float | None]:
    found = {benchmark["name"]: benchmark["score"]["mean"] for benchmark in results["benchmarks"]}
    return {**found, **({"average": results["average"]["score"]["mean"]} if results["average"] else {})}


def _refuse_unlike(a: Results, b: Results, folders: tuple[str, str]) -> None:
    told = [
        text for part in ("asked", "scored") for text in differences(a["conditions"][part], b["conditions"][part], part)
    ]
    if told:
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        raise ValueError(
            f"{folders[0]} and {folders[1]} were not evaluated alike ({'; '.join(told[:5])}{more}; there is {folders[0]}): evaluate "
            "one of them again as the other was"
        )
    left, right = ([(q["benchmark"], q["id"], len(q["samples"])) for q in r["questions"]] for r in (a, b))
    for x, y in zip_longest(left, right):
        if x != y:
            raise ValueError(
                f"{folders[0]} and {folders[1]} don't hold the same questions (the first is {' '.join(map(str, (x or y)[:2]))}): evaluate "
                "again"
            )


def _notes(a: Results, b: Results) -> list[str]:
    notes = []
    if a["conditions"]["tokenizer"] != b["conditions"]["tokenizer"]:
        cut = max(a["counts"]["prompts_cut"], b["counts"]["prompts_cut"])
        told = f", and of up to {cut} prompts that were cut the two may have seen different middles" if cut else ""
        notes.append(f"The two have different tokenizers: lengths in tokens differ{told}.")
    left, right = (r["conditions"]["model"]["min_p and penalties"] for r in (a, b))
    if left != right:
        notes.append(f"Sampling beyond temperature and top_p was {left} for A and {right} for B.")
    for name, results in zip("AB", (a, b), strict=True):
        counts = results["counts"]
        notes += [f"{name}: {text}: {counts[what]:,}." for what, text in (
            ("failed_requests", "failed requests, which count as wrong"), ("judge_failures", "answers without a verdict of the judge"),
        ) if counts[what]]  # fmt: skip
    return notes


def _mean(question: Results, measure: str) -> float | None:
    known = [sample[measure] for sample in question["samples"] if sample[measure] is not None]
    return sum(known) / len(known) if known else None


def _flip(left: Results, right: Results) -> list[Flip]:
    before, after = ((_mean(q, "score") or 0.0) >= 0.5 for q in (left, right))
    if before == after:
        return []
    return [
        Flip(
            left["benchmark"],
            left["id"],
            left["question"],
            tuple(left["answers"]),
            _answers(left),
            _answers(right),
            after,
        )
    ]


def _answers(question: Results) -> tuple[str, ...]:
    return tuple(
        s["answer"] if s["answer"] is not None else f"({s['failed'] or s['reason']})" for s in question["samples"]
    )


def comparison_tables(made: Comparison) -> list[Table]:
    """The differences, then what was gained and lost."""
    rows = tuple(
        (
            name,
            str(row["score"].n),
            *map(_percent, made.scores[name]),
            *(cell for m in MEASURES for cell in (_points(row[m]), _p(row[m]))),
            *_flip_counts(made, name),
        )
        for name, row in made.differences.items()
    )
    measured = [text for m in MEASURES for text in (f"{m}: B less A", "p")]
    head = ("benchmark", "questions", "A's score", "B's score", *measured, "gained", "lost")
    lead = (
        "Scores in %, differences in points of B over A with the 95 % interval of the paired bootstrap over questions, and its "
        "two-sided p. Gained and lost: questions that flipped; any are listed below."
    )
    strong = frozenset({len(rows) - 1}) if "average" in made.differences else frozenset()
    tables = [Table("B less A", lead, head, rows, strong)]
    listing = ("benchmark", "id", "question", "gold", "A", "B")
    for gained, title in ((True, "Gained: wrong in A, right in B"), (False, "Lost: right in A, wrong in B")):
        flips = [flip for flip in made.flips if flip.gained == gained]
        listed = tuple(
            (f.benchmark, f.id, f.question, " | ".join(f.gold), " | ".join(f.before), " | ".join(f.after))
            for f in flips
        )
        if listed:
            answers = "Answers as they were read, one a sample."
            tables.append(Table(f"{title} ({len(listed)})", answers, listing, listed, words=frozenset(listing[1:])))
    return tables


def write_comparison(made: Comparison, path: Path) -> Path:
    """A page, as .html or .md by the path's ending."""
    title = f"A: {made.names[0]}, B: {made.names[1]}"
    draw = markdown if path.suffix == ".md" else page
    path.write_text(draw(title, made.notes, comparison_tables(made)), encoding="utf-8")
    return path


def _flip_counts(made: Comparison, name: str) -> tuple[str, str]:
    mine: Sequence[Flip] = [
        f for f in made.flips if f.benchmark == name or (name == "average" and f.benchmark in SEVEN)
    ]
    gained = sum(flip.gained for flip in mine)
    return str(gained), str(len(mine) - gained)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _points(made: Difference) -> str:
    if made.mean is None or made.low is None or made.high is None:
        return "-"
    return f"{100 * made.mean:+.1f} [{100 * made.low:+.1f}, {100 * made.high:+.1f}]"


def _p(made: Difference) -> str:
    return "-" if made.p is None else f"{made.p:.4f}" if made.p >= 0.001 else f"{made.p:.1e}"
