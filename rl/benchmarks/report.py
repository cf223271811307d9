"""The report of an evaluation: report.md, and report.html as one page without scripts, images or links to anywhere.

Both are drawn from the same tables. Everything in them may have been written by a stranger's model or file: in HTML it is
escaped, and the page's policy allows its own style and nothing else; in Markdown cells are freed of what would end them.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.checkpoint import write_atomically
from ..figures import bucket_labels
from .published_table import published_table, unlike_published
from .registry import SEVEN

STYLE = Path(__file__).parents[1] / "assets" / "report.css"
SHOWN = 200
"""Failures that the page lists; all are in results.json."""

STRONG, TEXT = ' class="strong"', ' class="text"'

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A titled table: `lead` says how to read it, `strong` are the rows to be found first, `words` the columns of text."""

    title: str
    lead: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    words: frozenset[str] = frozenset()


def write_reports(root: Path, results: Results) -> None:
    """report.md and report.html in the results folder."""
    title, notes, made = (
        f"{results['conditions']['model']['name']}: long-document benchmarks",
        notes_of(results),
        tables(results),
    )
    write_atomically(root / "report.md", markdown(title, notes, made))
    write_atomically(root / "report.html", page(title, notes, made))


def notes_of(results: Results) -> list[str]:
    """What a reader must know to trust the numbers."""
    counts, conditions = results["counts"], results["conditions"]
    notes = [
        f"Made {results['made']['date']} by longreach {results['made']['longreach']}; {counts['responses']} responses to {counts['questions']} questions."
    ]
    if conditions["scored"]["judge"] is None and any(benchmark["judged"] for benchmark in results["benchmarks"]):
        notes.append("No judge was asked: the score is the rule's alone, and paraphrases count as wrong.")
    if conditions["model"]["min_p and penalties"] != "off":
        notes.append(
            "Sampling beyond temperature and top_p (top_k, min_p, penalties) was left to the server's own defaults."
        )
    for name, text in (
        ("failed_requests", "Failed requests, which count as wrong and are listed"),
        ("judge_failures", "Answers without a verdict of the judge, whose score is the rule's"),
        ("prompts_cut", f"Prompts longer than {conditions['asked']['max_input']:,} tokens, which lost their middle"),
        ("answers_cut", f"Answers cut off at {conditions['asked']['max_output']:,} tokens"),
    ):
        if counts[name]:
            notes.append(f"{text}: {counts[name]:,}.")
    for name, count in results["made"]["bad_rows"].items():
        notes.append(f"{name}: {count} rows could not be read and were left out.")
    return notes


def tables(results: Results) -> list[Table]:
    """All tables of the report, in order."""
    made = [_scores(results), _passes(results), _published(results), _differences(results), _rules(results)]
    made += [
        _needles(results),
        _buckets(results),
        _agreement(results),
        _counts(results),
        _failures(results),
        _unjudged(results),
        _conditions(results),
    ]
    return [table for table in made if table is not None]


def headline(results: Results) -> Table:
    """The table that a terminal shows."""
    return _scores(results)


def percent(value: Mapping[str, Any]) -> str:
    """`63.5 [56.9, 70.1]`, or a dash where there is none."""
    if value["mean"] is None:
        return "-"
    spread = "" if value["low"] is None else f" [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
    return f"{100 * value['mean']:.1f}{spread}"


def _scores(results: Results) -> Table:
    k = results["conditions"]["asked"]["samples"]
    rows = [
        (b["name"], str(b["score"]["n"]), *(percent(b[m]) for m in ("score", "rule", "judge", "published")))
        for b in results["benchmarks"]
    ]
    average = results["average"]
    if average:
        rows.append(
            (
                "average of the seven",
                str(average["score"]["n"]),
                *(percent(average[m]) for m in ("score", "rule", "judge", "published")),
            )
        )
    return Table(
        f"Scores (avg@{k}, %)",
        "score = max(rule, judge). In brackets the 95 % interval, by percentile bootstrap over questions (Clopper and Pearson's where all are right or all "
        "wrong). The last column is max(published "
        "rule, judge), the published table's own.",
        ("benchmark", "questions", "score", f"rule ({results['conditions']['scored']['rule']})", "judge", "with the published rule"),
        tuple(rows), frozenset({len(rows) - 1}) if average else frozenset(),
    )  # fmt: skip


def _passes(results: Results) -> Table | None:
    ks = list(results["benchmarks"][0]["pass_at"]) if results["benchmarks"] else []
    if len(ks) < 2:
        return None
    parts = [
        *results["benchmarks"],
        *([{"name": "average of the seven", **results["average"]}] if results["average"] else []),
    ]
    rows = tuple((b["name"], *(percent(b["pass_at"][k]) for k in ks)) for b in parts)
    strong = frozenset({len(rows) - 1}) if results["average"] else frozenset()
    lead = "The chance that at least one of k answers is right, by its unbiased estimate on the score."
    return Table("pass@k (%)", lead, ("benchmark", *(f"pass@{k}" for k in ks)), rows, strong)


def _published(results: Results) -> Table | None:
    mine = {b["name"]: b for b in results["benchmarks"]}
    if not set(SEVEN) & set(mine):
        return None
    table, name = published_table(), results["conditions"]["model"]["name"]
    rows = [(r.model, *(f"{r.scores[b]:.1f}" for b in SEVEN), f"{r.average:.1f}") for r in table.rows]
    for measure, label in (("score", "our score"), ("published", "with the published rule")):
        cells = [percent(mine[b][measure]) if b in mine else "-" for b in SEVEN]
        average = percent(results["average"][measure]) if results["average"] else "-"
        rows.append((f"{name} ({label})", *cells, average))
    return Table(
        "Beside the published table (%)",
        f"{table.source}: one sample a question, no intervals given. Read the conditions that differ below before comparing. "
        + " ".join(f"{row.model}: {row.note}." for row in table.rows if row.note),
        ("model", *SEVEN, "average"), tuple(rows), frozenset({len(rows) - 2, len(rows) - 1}),
    )  # fmt: skip


def _differences(results: Results) -> Table | None:
    if not set(SEVEN) & {b["name"] for b in results["benchmarks"]}:
        return None
    rows = tuple((text,) for text in unlike_published(results, published_table()))
    return Table("What differs from the published conditions", "", ("condition",), rows)


def _rules(results: Results) -> Table | None:
    rules = results["conditions"]["scored"]["rules"]
    rows = tuple((b["name"], *(percent(b["rules"][rule]) for rule in rules)) for b in results["benchmarks"])
    lead = "The same responses under each rule, without the judge. Only the first scores what an answer means; the published ones are for comparison: qwenlong-l1 is the training reward, which gives 0 without closed reasoning; longbench is F1, longbench-em equality."
    return Table("Rules side by side (%)", lead, ("benchmark", *rules), rows) if rules else None


def _needles(results: Results) -> Table | None:
    rows = tuple(
        (
            row["benchmark"],
            row["by"],
            row["value"],
            str(row["score"]["n"]),
            percent(row["score"]),
            percent(row["named"]),
        )
        for row in results["needles"]
    )
    lead = "The score wants every value and nothing else; RULER's own is the share of the values that the answer names."
    return (
        Table(
            "Needle tests (%)",
            lead,
            ("benchmark", "by", "which", "questions", "score", "RULER's"),
            rows,
            words=frozenset({"by", "which"}),
        )
        if rows
        else None
    )


def _buckets(results: Results) -> Table:
    every = [{"name": "all", "buckets": results["buckets"]}, *results["benchmarks"]]
    bounds = list(dict.fromkeys(bucket["upper"] for part in every for bucket in part["buckets"]))
    bounds.sort(key=lambda upper: (upper is None, upper))
    labels = dict(zip(bounds, bucket_labels(bounds), strict=True))
    held = {bucket["upper"] for part in every for bucket in part["buckets"] if bucket["n"]}
    uppers = [upper for upper in bounds if upper in held]
    rows = []
    for part in every:
        found = {bucket["upper"]: bucket for bucket in part["buckets"]}
        cells = [f"{percent(found[u])} n={found[u]['n']}" if u in found and found[u]["n"] else "-" for u in uppers]
        rows.append((part["name"], *cells))
    return Table(
        "By length (score, %)",
        "Tokens of the prompt before any cut; n: questions of that length. Lengths without a question are left out.",
        ("benchmark", *(labels[upper] for upper in uppers)),
        tuple(rows),
    )


def _agreement(results: Results) -> Table | None:
    if not results["agreement"]:
        return None
    rows = tuple((name, *map(str, cells.values())) for name, cells in results["agreement"].items())
    head = ("benchmark", "both right", "rule alone", "judge alone", "both wrong")
    lead = "Answers that both have looked at. Many of the rule alone: it can be gamed; of the judge alone: it misses paraphrases."
    return Table("Rule and judge", lead, head, rows)


def _counts(results: Results) -> Table:
    names = ("questions", "responses", "prompts_cut", "answers_cut", "failed_requests", "judge_failures")
    rows = tuple((b["name"], *(str(b["counts"][name]) for name in names)) for b in results["benchmarks"])
    return Table("Counts", "", ("benchmark", *(name.replace("_", " ") for name in names)), rows)


def _failures(results: Results) -> Table | None:
    found = results["failures"]
    rows = tuple((f["benchmark"], f["id"], str(f["sample"]), f["why"]) for f in found[:SHOWN])
    lead = f"{len(rows)} of {len(found)}. Each counts as wrong."
    head = ("benchmark", "question", "sample", "why")
    return Table("Failed requests", lead, head, rows, words=frozenset({"question", "why"})) if rows else None


def _unjudged(results: Results) -> Table | None:
    found = results["judge_failures"]
    rows = tuple((f["benchmark"], f["id"], str(f["sample"]), f["answer"] or "") for f in found[:SHOWN])
    lead = f"{len(rows)} of {len(found)}. Their score is the rule's."
    head = ("benchmark", "question", "sample", "answer")
    return (
        Table("Answers without a verdict", lead, head, rows, words=frozenset({"question", "answer"})) if rows else None
    )


def _conditions(results: Results) -> Table:
    """What was asked of which model, and how it was scored; conditions.json holds all of it."""
    asked, scored, made = results["conditions"]["asked"], results["conditions"]["scored"], results["made"]
    judge = scored["judge"]
    rows = (
        ("model", results["conditions"]["model"]["name"]),
        ("tokenizer", made["tokenizer"]),
        ("run", "here" if results["conditions"]["model"]["kind"] == "directory" else "by a server"),
        ("questions from", "; ".join(f"{name}: {source}" for name, source in made["sources"].items())),
        ("longest prompt", f"{asked['max_input']:,} tokens; of longer ones: {asked['truncation']}"),
        ("longest answer", f"{asked['max_output']:,} tokens"),
        ("samples a question", str(asked["samples"])),
        (
            "sampling",
            f"temperature {asked['temperature']:g}, top_p {asked['top_p']:g}, top_k {asked['top_k'] or 'off'}",
        ),
        ("seed", str(asked["seed"])),
        ("rule", scored["rule"]),
        ("judge", "none" if judge is None else f"{judge['model']} (prompt {judge['prompt_version']})"),
        ("intervals", f"{scored['resamples']:,} resamples"),
    )
    lead = (
        "All of them, with the prompt's template and the fingerprints of questions and weights, are in conditions.json."
    )
    return Table("Conditions", lead, ("condition", "value"), rows, words=frozenset({"value"}))


def markdown(title: str, notes: Sequence[str], made: Sequence[Table]) -> str:
    parts = [f"# {_plain(title)}", "", *(f"* {_plain(note)}" for note in notes)]
    for table in made:
        parts += ["", f"## {table.title}", *([table.lead] if table.lead else []), ""]
        parts.append("| " + " | ".join(map(_plain, table.head)) + " |")
        parts.append("| " + " | ".join(["---"] * len(table.head)) + " |")
        for index, row in enumerate(table.rows):
            cells = [f"**{_plain(c)}**" if index in table.strong and c else _plain(c) for c in row]
            parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """One line in which Markdown finds no cell's end, no markup and no HTML."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(whole_characters(text).split()))


def page(title: str, notes: Sequence[str], made: Sequence[Table]) -> str:
    style = STYLE.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    body = "\n".join(map(_section, made))
    listed = "".join(f"<li>{_escaped(note)}</li>" for note in notes)
    box = f'<div class="notes"><ul>{listed}</ul></div>' if notes else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{_escaped(title)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{_escaped(title)}</h1>{box}</header>
<main>
{body}
</main>
</body>
</html>
"""


def _section(table: Table) -> str:
    head = "".join(f'<th scope="col"{TEXT if name in table.words else ""}>{_escaped(name)}</th>' for name in table.head)
    rows = []
    kinds = [' class="words"' if name in table.words else "" for name in table.head]
    for index, row in enumerate(table.rows):
        first, *rest = row
        cells = f'<th scope="row" class="name">{_escaped(first)}</th>' + "".join(
            f"<td{kind}>{_cell(cell)}</td>" for kind, cell in zip(kinds[1:], rest, strict=True)
        )
        rows.append(f"<tr{STRONG if index in table.strong else ''}>{cells}</tr>")
    lead = f'<p class="lead">{_escaped(table.lead)}</p>' if table.lead else ""
    return (
        f'<section><h2>{_escaped(table.title)}</h2>{lead}<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _cell(text: str) -> str:
    """The interval stands smaller, below its number."""
    found = re.fullmatch(r"([-+]?[0-9.]+) (\[[-+0-9., ]+\])( n=\d+)?", text)
    if not found:
        return _escaped(text)
    return f'{found[1]}<span class="pm">{found[2]}{found[3] or ""}</span>'


def _escaped(text: str) -> str:
    return html.escape(whole_characters(text), quote=True)


def whole_characters(text: str) -> str:
    """Without halves of surrogate pairs, which a server may send and no file can hold."""
    return text.encode("utf-8", "replace").decode()
