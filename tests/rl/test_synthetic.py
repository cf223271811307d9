"""The synthetic reports: same seed same bytes, exact lengths, answers that only the document gives."""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from longreach.rl.synthetic import KINDS, Synthetic, make_rows, write_rows

ASSETS = Path(__file__).resolve().parents[2] / "rl" / "assets" / "demo-base"
ALL_KINDS = tuple(KINDS)
LENGTHS = ((140, 200), (230, 455), (480, 965))
Row = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    return [
        row
        for shortest, longest in LENGTHS
        for row in make_rows(Synthetic(rows=200, kinds=ALL_KINDS, shortest=shortest, longest=longest), tokenizer)
    ]


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# An independent reader: regular expressions over the text, which share nothing with the generator.


def read(context: str) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """(metric -> company -> value, linked name -> company), as the text of a document has it; contradictions fail."""
    figures: dict[str, dict[str, int]] = defaultdict(dict)
    stated = re.findall(r"The (\w+) of (\w+) was (\d+)\.", context)
    stated += re.findall(r"^ \| (\w+) \| (\w+) \| (\d+) \|$", context, flags=re.MULTILINE)
    for metric, company, value in stated:
        assert figures[metric].setdefault(company, int(value)) == int(value)
    links: dict[str, str] = {}
    for name, company in re.findall(r"(?:Director|City|Vendor) (\w+) is \w+ of (\w+)\.", context):
        assert links.setdefault(name, company) == company
    return figures, links


def answer(context: str, question: str) -> tuple[str, int]:
    """(answer, number of candidates), from the text of document and question alone."""
    figures, links = read(context)
    if match := re.fullmatch(r"What was the (\w+) of (\w+)\?", question):
        values = figures[match[1]]
        return str(values[match[2]]), len(set(values.values()))
    if match := re.fullmatch(r"What was the (\w+) of the company whose \w+ is \w+ (\w+)\?", question):
        values = figures[match[1]]
        return str(values[links[match[2]]]), len(set(values.values()))
    if match := re.fullmatch(r"Which company had the higher (\w+), (\w+) or (\w+)\?", question):
        return max(match[2], match[3], key=figures[match[1]].__getitem__), 2
    match = re.fullmatch(r"What was the (sum of|difference between) the (\w+) of (\w+) and the \2 of (\w+)\?", question)
    assert match, question
    combine: Callable[[int, int], int] = (lambda a, b: a + b) if match[1] == "sum of" else (lambda a, b: abs(a - b))
    values = figures[match[2]]
    return str(combine(values[match[3]], values[match[4]])), len(
        {combine(*pair) for pair in combinations(values.values(), 2)}
    )


def test_an_independent_reader_finds_every_answer_and_chance(rows: list[Row]) -> None:
    assert {row["benchmark"] for row in rows} == set(ALL_KINDS)
    for row in rows:
        found, candidates = answer(row["context"], row["question"])
        assert row["answers"] == [found]
        assert row["chance"] == pytest.approx(1 / candidates)
        assert row["answer_type"] == ("span" if row["benchmark"] == "compare" else "number")


def test_response_restates_the_document_and_concludes(rows: list[Row]) -> None:
    for row in rows:
        *facts, conclusion = re.split(r"(?<=\.) ", row["response"])
        assert conclusion == f"Therefore, the answer is {row['answers'][0]}."
        figures, links = read(row["context"])
        stated_figures, stated_links = read(" ".join(facts))
        assert stated_figures
        assert all(figures[metric][c] == v for metric, own in stated_figures.items() for c, v in own.items())
        assert stated_links.items() <= links.items()
        assert bool(stated_links) == (row["benchmark"] == "two_hop")


def test_same_seed_same_bytes_and_splits_are_disjoint(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = Synthetic(seed=3, rows=20, kinds=ALL_KINDS)
    first = write_rows(config, tokenizer, tmp_path / "a.jsonl").read_bytes()
    assert write_rows(config, tokenizer, tmp_path / "b.jsonl").read_bytes() == first
    longer = write_rows(replace(config, rows=30), tokenizer, tmp_path / "c.jsonl").read_bytes()
    assert longer.startswith(first)
    contexts = {json.loads(line)["context"] for line in first.decode().splitlines()}
    for other in (replace(config, seed=4), replace(config, split="eval")):
        assert contexts.isdisjoint(row["context"] for row in make_rows(other, tokenizer))


@pytest.mark.parametrize("length", [150, 300, 600, 1200])
def test_length_is_met_within_a_few_percent(tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    for row in make_rows(Synthetic(rows=25, shortest=length, longest=length), tokenizer):
        count = len(tokens(tokenizer, row["context"]))
        # Never longer; shorter by less than the shortest filler sentence, which has nine tokens.
        assert length - 9 < count <= length


def test_tokenizer_round_trip_and_one_token_a_word(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> None:
    for row in rows[::5]:
        for text in (row["context"], row["question"], row["response"], *row["answers"]):
            assert tokenizer.decode(tokens(tokenizer, text)) == text
        words = re.findall(r"\w+", row["response"])
        assert len(tokens(tokenizer, row["response"])) == len(words) + len(re.findall(r"[.,]", row["response"]))
    strange = "Zażółć  gęślą\tjaźń — 12345 Größe\r\n"
    assert tokenizer.decode(tokens(tokenizer, strange)) == strange


def test_no_answer_without_the_document(tokenizer: PreTrainedTokenizerBase) -> None:
    """A reader that sees only questions and answers of 3,000 other rows is as bad as one that guesses."""
    config = Synthetic(rows=3000, kinds=("lookup", "two_hop", "compare"))
    known, asked = (list(make_rows(replace(config, split=split), tokenizer)) for split in ("train", "eval"))
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for row in known:
        for word in re.findall(r"\w+", row["question"]):
            seen[word][row["answers"][0]] += 1
    figures = [row for row in asked if row["benchmark"] != "compare"]
    hits = 0
    for row in figures:
        votes: Counter[str] = sum((seen[word] for word in re.findall(r"\w+", row["question"])), Counter())
        hits += votes.most_common(1)[0][0] == row["answers"][0]
    # 400 values, all equally likely: 1/400 with a standard deviation of 0.0011 over 2,000 rows.
    assert hits / len(figures) < 1 / 400 + 5 * 0.0011
    compare = [row for row in asked if row["benchmark"] == "compare"]
    first_named = sum(row["question"].split(", ")[1].startswith(row["answers"][0] + " ") for row in compare)
    assert abs(first_named / len(compare) - 0.5) < 4 * 0.5 / len(compare) ** 0.5


@pytest.mark.parametrize("choose", ["first", "last", "largest", "smallest", "most stated", "first in the notes"])
def test_no_short_cut_through_the_document(tokenizer: PreTrainedTokenizerBase, choose: str) -> None:
    """Rules that don't read the question stay at the chance level of the rows."""
    rows = list(make_rows(Synthetic(rows=1500, shortest=230, longest=455), tokenizer))
    hits = 0
    for row in rows:
        metric = row["question"].split()[3]
        statements = re.findall(rf"(?:The|\|) {metric} (?:of|\|) (\w+) (?:was|\|) (\d+)", row["context"])
        values = [value for _, value in statements]
        guesses = {
            "first": values[0],
            "last": values[-1],
            "largest": max(values, key=int),
            "smallest": min(values, key=int),
            "most stated": random.Random(row["id"]).choice(
                [v for v, n in Counter(values).items() if n == max(Counter(values).values())]
            ),
            "first in the notes": next(
                iter(re.findall(r"\d+", row["context"].partition("Notes to the accounts")[2])), ""
            ),
        }
        hits += guesses[choose] == row["answers"][0]
    chance = sum(row["chance"] for row in rows) / len(rows)
    assert hits / len(rows) < chance + 4 * (chance * (1 - chance) / len(rows)) ** 0.5


def test_values_are_independent_of_names(tokenizer: PreTrainedTokenizerBase) -> None:
    """Redrawing the document under the same question redraws the answer: the value of a name is uniform."""
    by_metric: dict[str, list[int]] = defaultdict(list)
    by_company: dict[str, list[int]] = defaultdict(list)
    for row in make_rows(Synthetic(rows=600, shortest=230, longest=455), tokenizer):
        for metric, own in read(row["context"])[0].items():
            for company, value in own.items():
                by_metric[metric].append(value)
                by_company[company].append(value)
    for values in (*by_metric.values(), *by_company.values()):
        # Uniform on 100..499: mean 299.5, standard deviation 115.5.
        assert abs(sum(values) / len(values) - 299.5) < 4.5 * 115.5 / len(values) ** 0.5


def test_bad_settings_say_what_is_wrong(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"look-up.*lookup"):
        Synthetic(kinds=("look-up",))
    with pytest.raises(ValueError, match=r"300\.\.200"):
        Synthetic(shortest=300, longest=200)
    with pytest.raises(ValueError, match="lengthen"):
        next(make_rows(Synthetic(shortest=120, longest=120, mentions=9.0), tokenizer))
