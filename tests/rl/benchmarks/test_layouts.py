"""Each published layout becomes the example it should, and garbage in any of its columns is named, never raised raw."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longreach.rl.benchmarks.layouts import UNANSWERABLE, split_template, with_choices
from longreach.rl.benchmarks.registry import BENCHMARKS, read_benchmark
from longreach.rl.data import ReadResult, read_examples
from longreach.rl.prompts import TEMPLATE
from longreach.rl.rows import Example
from longreach.rl.rules import rule_reward

Row = dict[str, Any]

LONGBENCH: Row = {
    "input": "Who built the mill?", "context": "Passage 1:\nThe mill\nIda built the mill.", "answers": ["Ida", "Ida Holm", "Ida"],
    "length": 12, "dataset": "musique", "language": "en", "all_classes": None, "_id": "5f3a",
}  # fmt: skip
HOTPOT: Row = {
    "_id": "h1", "question": "Is the mill older than the pier?", "answer": "yes", "type": "comparison", "level": "easy",
    "supporting_facts": [["Mill", 0], ["Pier", 1]],
    "context": [["Mill", ["The mill is old.", " It dates from 1802."]], ["Pier", ["A pier.", " It dates from 1911."]]],
}  # fmt: skip
HOTPOT_HUB: Row = {
    **{name: value for name, value in HOTPOT.items() if name != "_id"}, "id": "h1",
    "context": {"title": ["Mill", "Pier"], "sentences": [entry[1] for entry in HOTPOT["context"]]},
}  # fmt: skip
WIKI: Row = {
    "_id": "w1", "question": "When did the maker of Film X die?", "answer": "19 June 2013", "type": "compositional",
    "context": [["Film X", ["Film X was made by Ann Roe.", "It is a drama."]], ["Ann Roe", ["Ann Roe died on 19 June 2013."]]],
    "evidences": [["Film X", "director", "Ann Roe"]],
}  # fmt: skip
MUSIQUE: Row = {
    "id": "2hop__1_2", "question": "Who mended the roof of the house of Bo?", "answer": "Cy Lund", "answer_aliases": ["C. Lund", "Lund"],
    "answerable": True, "question_decomposition": [{"id": 1, "question": "house of Bo", "answer": "Elm House"}],
    "paragraphs": [
        {"idx": 0, "title": "Bo", "paragraph_text": "Bo lives in Elm House.", "is_supporting": True},
        {"idx": 1, "title": "Elm House", "paragraph_text": "Cy Lund mended its roof.", "is_supporting": True},
    ],
}  # fmt: skip
NARRATIVE: Row = {
    "document": {"id": "d9", "kind": "gutenberg", "text": "A long story about a fox.", "summary": {"text": "A fox."}},
    "question": {"text": "Which animal is it about?", "tokens": ["Which"]},
    "answers": [{"text": "A fox.", "tokens": ["A"]}, {"text": "fox", "tokens": ["fox"]}],
}  # fmt: skip


def _answer(**parts: Any) -> Row:
    empty = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": "", "evidence": ["p"]}
    return {"answer": {**empty, **parts}, "annotation_id": "a", "worker_id": "w"}


PAPER: Row = {
    "id": "1909.1", "title": "On mills", "abstract": "We study mills.",
    "full_text": [
        {"section_name": "Introduction", "paragraphs": ["Mills turn.", ""]},
        {"section_name": "Results ::: Speed", "paragraphs": ["They are fast.", "Very."]},
    ],
    "qas": [
        {"question": "What turns?", "question_id": "q1", "answers": [_answer(extractive_spans=["Mills", "sails"]), _answer(free_form_answer="mills")]},
        {"question": "Are they fast?", "question_id": "q2", "answers": [_answer(yes_no=True), _answer(yes_no=False)]},
        {"question": "Who paid?", "question_id": "q3", "answers": [_answer(unanswerable=True)]},
        {"question": "Nothing said?", "question_id": "q4", "answers": [_answer()]},
    ],
}  # fmt: skip
DOCMATH: Row = {
    "question_id": "complong-testmini-3", "question": "What is the growth in percent?", "paragraphs": ["| 2001 | 10 |", "| 2002 | 12.5 |"],
    "python_solution": "return 25.0", "ground_truth": 25.0, "table_evidence": [0, 1], "paragraph_evidence": [],
}  # fmt: skip
FRAMES: Row = {
    "Prompt": "How many years lie between the two?", "Answer": "87", "reasoning_types": "Numerical reasoning",
    "wiki_items": [{"title": "Mill", "text": "Built in 1802."}, {"title": "Pier", "text": "Built in 1889."}],
}  # fmt: skip
LINKS: Row = {"Prompt": "q", "Answer": "87", "wikipedia_link_1": "https://en.example/Mill", "wiki_links": "['..']"}
V2: Row = {
    "_id": "66f", "domain": "Single-Document QA", "sub_domain": "Legal", "difficulty": "hard", "length": "long",
    "question": "Which one holds?", "choice_A": "The first", "choice_B": "The second", "choice_C": "Both", "choice_D": "None",
    "answer": "B", "context": "A contract.",
}  # fmt: skip
VERL: Row = {
    "data_source": "docmath_complong", "ability": "doc-math",
    "prompt": [{"role": "user", "content": (
        "Please read the following text and answer the question below.\n\n<text>\n| 2001 | 10 |\n</text>\n\n"
        "What was it in 2001?\n\n"
        'Format your response as follows: "Therefore, the answer is (insert answer here)".'
    )}],
    "reward_model": {"style": "rule", "ground_truth": "Therefore, the answer is 10.5."},
}  # fmt: skip
PLAIN: Row = {"context": "A text.", "question": "Why?", "answers": ["so"]}
CHOICES: Row = {"context": "A text.", "question": "Which?", "answers": ["B"], "choices": ["red", "blue"]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(tmp_path: Path, name: str, *rows: Any, **options: Any) -> ReadResult:
    return read_benchmark(name, source=write(tmp_path / "rows.jsonl", *rows), **options)


def read_one(tmp_path: Path, name: str, row: Row) -> Example:
    (example,) = read(tmp_path, name, row).examples
    return example


PASSAGES = "Passage 1:\nMill\nThe mill is old. It dates from 1802.\n\nPassage 2:\nPier\nA pier. It dates from 1911."
# (benchmark, row, id, answers, answer type, question, context)
EXPECTED: list[tuple[str, Row, str, tuple[str, ...], str, str, str]] = [
    ("musique", LONGBENCH, "5f3a", ("Ida", "Ida Holm"), "auto", LONGBENCH["input"], LONGBENCH["context"]),
    ("2wikimultihopqa", {**LONGBENCH, "dataset": "2wikimqa"}, "5f3a", ("Ida", "Ida Holm"), "auto", LONGBENCH["input"], LONGBENCH["context"]),
    ("hotpotqa", HOTPOT, "h1", ("yes",), "auto", HOTPOT["question"], PASSAGES),
    ("hotpotqa", HOTPOT_HUB, "h1", ("yes",), "auto", HOTPOT["question"], PASSAGES),
    ("2wikimultihopqa", WIKI, "w1", ("19 June 2013",), "auto", WIKI["question"],
     "Passage 1:\nFilm X\nFilm X was made by Ann Roe. It is a drama.\n\nPassage 2:\nAnn Roe\nAnn Roe died on 19 June 2013."),
    ("2wikimultihopqa", {**WIKI, "context": json.dumps(WIKI["context"])}, "w1", ("19 June 2013",), "auto", WIKI["question"],
     "Passage 1:\nFilm X\nFilm X was made by Ann Roe. It is a drama.\n\nPassage 2:\nAnn Roe\nAnn Roe died on 19 June 2013."),
    ("musique", MUSIQUE, "2hop__1_2", ("Cy Lund", "C. Lund", "Lund"), "auto", MUSIQUE["question"],
     "Passage 1:\nBo\nBo lives in Elm House.\n\nPassage 2:\nElm House\nCy Lund mended its roof."),
    ("narrativeqa", NARRATIVE, "narrativeqa-rows-0", ("A fox.", "fox"), "auto", "Which animal is it about?", "A long story about a fox."),
    ("docmath", DOCMATH, "complong-testmini-3", ("25.0",), "number", DOCMATH["question"], "| 2001 | 10 |\n| 2002 | 12.5 |"),
    ("docmath", VERL, "docmath-rows-0", ("10.5",), "number", "What was it in 2001?", "| 2001 | 10 |"),
    ("frames", FRAMES, "frames-rows-0", ("87",), "auto", FRAMES["Prompt"], "Mill\nBuilt in 1802.\nPier\nBuilt in 1889."),
    ("longbench-v2", V2, "66f", ("B",), "choice",
     "Which one holds?\n\nChoose one of these options and answer with its letter:\n(A) The first\n(B) The second\n(C) Both\n(D) None", "A contract."),
    ("frames", PLAIN, "frames-rows-0", ("so",), "auto", "Why?", "A text."),
    ("docmath", {**PLAIN, "answers": [12]}, "docmath-rows-0", ("12",), "number", "Why?", "A text."),
    ("docmath", {**PLAIN, "answer_type": "span"}, "docmath-rows-0", ("so",), "span", "Why?", "A text."),
    ("hotpotqa", CHOICES, "hotpotqa-rows-0", ("B",), "auto",
     "Which?\n\nChoose one of these options and answer with its letter:\n(A) red\n(B) blue", "A text."),
]  # fmt: skip


@pytest.mark.parametrize("name, row, label, answers, answer_type, question, context", EXPECTED)
def test_a_published_row_becomes_its_example(
    tmp_path: Path, name: str, row: Row, label: str, answers: tuple[str, ...], answer_type: str, question: str, context: str
) -> None:  # fmt: skip
    example = read_one(tmp_path, name, row)
    assert (example.benchmark, example.id, example.answers, example.answer_type) == (name, label, answers, answer_type)
    assert (example.question, example.context) == (question, context)
    assert example.text is None and example.messages is None


@pytest.mark.parametrize("name, row, label, answers, answer_type, question, context", EXPECTED)
def test_each_gold_answer_is_right_and_another_is_not(
    tmp_path: Path, name: str, row: Row, label: str, answers: tuple[str, ...], answer_type: str, question: str, context: str
) -> None:  # fmt: skip
    example = read_one(tmp_path, name, row)

    def score(answer: str) -> float:
        said = f"So it is. Therefore, the answer is {answer}."
        return rule_reward(said, example.answers, answer_type=example.answer_type, choices=example.choices).score

    assert all(score(answer) == 1.0 for answer in answers)
    assert score({"yes": "no", "B": "C"}.get(answers[0], "1977")) == 0.0


def test_examples_survive_our_own_rows(tmp_path: Path) -> None:
    """What was read can be written as a plain row, read as one, and is the same question."""
    for number, (name, row, *_) in enumerate(EXPECTED):
        example = read_one(tmp_path, name, row)
        (again,) = read_examples(write(tmp_path / f"again-{number}.jsonl", example.to_row())).examples
        assert again == example


def test_qasper_asks_every_question_of_a_paper(tmp_path: Path) -> None:
    result = read(tmp_path, "qasper", PAPER, skip_bad_rows=True)
    text = "On mills\n\nWe study mills.\n\nIntroduction\nMills turn.\n\nResults ::: Speed\nThey are fast.\nVery."
    assert {example.context for example in result.examples} == {text}
    assert {example.id: example.answers for example in result.examples} == {
        "q1": ("Mills, sails", "mills"), "q2": ("yes", "no"), "q3": UNANSWERABLE,
    }  # fmt: skip
    assert [(bad.row, bad.field, bad.reason) for bad in result.bad] == [(1, "qas.q4.answers", "holds no answer")]
    assert {example.columns["paper"] for example in result.examples} == {"1909.1"}
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 1, qas\.q4\.answers: holds no answer"):
        read(tmp_path, "qasper", PAPER)
    assert [example.id for example in read(tmp_path, "qasper", PAPER, limit=2).examples] == ["q1", "q2"]


def lists(entries: list[Row]) -> Row:
    return {name: [entry[name] for entry in entries] for name in entries[0]}


def test_qasper_as_the_hub_and_its_authors_store_it(tmp_path: Path) -> None:
    plain = read(tmp_path, "qasper", PAPER, limit=3).examples
    hub = copy.deepcopy(PAPER)
    hub["qas"] = lists([{**question, "answers": lists(question["answers"])} for question in hub["qas"]])
    hub["full_text"] = lists(hub["full_text"])
    assert read(tmp_path, "qasper", hub, limit=3).examples == plain
    pq.write_table(pa.Table.from_pylist([hub]), tmp_path / "hub.parquet")
    assert read_benchmark("qasper", source=tmp_path / "hub.parquet", limit=3).examples == plain
    own = tmp_path / "qasper-dev-v0.3.json"
    paper = {name: value for name, value in PAPER.items() if name != "id"}
    for indent in (None, 2):
        own.write_text(json.dumps({"1909.1": paper, "1909.2": {**paper, "qas": []}}, indent=indent))
        result = read_benchmark("qasper", source=own, skip_bad_rows=True)
        assert result.examples == plain
        assert [bad.field for bad in result.bad] == ["qas.q4.answers", "qas"]


def test_musique_leaves_out_what_cannot_be_answered_and_says_so(tmp_path: Path) -> None:
    result = read(tmp_path, "musique", MUSIQUE, {**MUSIQUE, "answerable": False}, {**MUSIQUE, "id": "3"})
    assert [example.id for example in result.examples] == ["2hop__1_2", "3"]
    assert [(row.row, row.field) for row in result.left_out] == [(2, "answerable")] and result.bad == []
    assert any("1 rows were left out (answerable is false" in warning for warning in result.warnings)


def test_the_published_first_gold_stays_first(tmp_path: Path) -> None:
    row = {**LONGBENCH, "dataset": "qasper", "answers": ["Unanswerable", "the mill", "Unanswerable"]}
    example = read_one(tmp_path, "qasper", row)
    assert example.answers[:2] == ("Unanswerable", "the mill") and "not answerable" in example.answers
    first = rule_reward("</think>So the answer is the mill.", example.answers, scoring="qwenlong-l1-eval")
    second = rule_reward("</think>So the answer is unanswerable.", example.answers, scoring="qwenlong-l1-eval")
    assert (first.score, second.score) == (0.0, 1.0)
    assert rule_reward("The answer is cannot be answered.", example.answers).score == 1.0


def test_the_published_number_is_printed_as_published(tmp_path: Path) -> None:
    golds = [25, 25.0, 0.1234567890123, -3, True]
    rows = [{**DOCMATH, "question_id": str(index), "ground_truth": gold} for index, gold in enumerate(golds)]
    read_answers = [example.answers[0] for example in read(tmp_path, "docmath", *rows).examples]
    assert read_answers == ["25", "25.0", "0.1234567890123", "-3", "True"]


def test_other_columns_are_kept(tmp_path: Path) -> None:
    assert read_one(tmp_path, "musique", LONGBENCH).columns == {"length": 12, "dataset": "musique", "language": "en"}
    kept = {"ground_truth", "python_solution", "table_evidence", "paragraph_evidence"}
    assert set(read_one(tmp_path, "docmath", DOCMATH).columns) == kept
    assert read_one(tmp_path, "longbench-v2", V2).columns["difficulty"] == "hard"
    example = read_one(tmp_path, "frames", {**PLAIN, "benchmark": "tatqa", "source": "s"})
    assert example.columns == {"source": "s", "row_benchmark": "tatqa"}


def test_the_wrong_file_is_refused_at_its_first_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 1, wiki_items: .*links, not pages.*Tongyi-Zhiwen/frames"):
        read(tmp_path, "frames", LINKS, LINKS)
    with pytest.raises(ValueError, match=r"^[^\n]*rows\.jsonl, row 1, dataset: is 'musique', which is not hotpotqa"):
        read(tmp_path, "hotpotqa", LONGBENCH, LONGBENCH)
    with pytest.raises(
        ValueError, match=r"row 1, row: has the columns \['Answer', .*forms of docmath: docmath \(question"
    ):
        read(tmp_path, "docmath", FRAMES)
    with pytest.raises(ValueError, match=r"row 1, row: has the columns .*none of the forms of docmath"):
        read(tmp_path, "docmath", MUSIQUE)
    with pytest.raises(ValueError, match="hides it in its test sets; use testmini"):
        read(tmp_path, "docmath", {**DOCMATH, "ground_truth": None})
    with pytest.raises(ValueError, match="a summary is not the story"):
        read(tmp_path, "narrativeqa", {**NARRATIVE, "document": {"summary": {"text": "s"}}})
    result = read(tmp_path, "hotpotqa", LONGBENCH, HOTPOT, skip_bad_rows=True)
    assert (len(result.examples), len(result.bad)) == (1, 1)


GARBAGE: tuple[Any, ...] = (
    None,
    "",
    "   ",
    7,
    1.5,
    True,
    [],
    {},
    [None],
    [[]],
    [3],
    {"text": 5},
    [["t", 4]],
    "\ud800",
    [{}],
    ["x"],
)
ROWS = [
    ("musique", LONGBENCH), ("hotpotqa", HOTPOT), ("hotpotqa", HOTPOT_HUB), ("2wikimultihopqa", WIKI), ("musique", MUSIQUE),
    ("narrativeqa", NARRATIVE), ("qasper", PAPER), ("docmath", DOCMATH), ("docmath", VERL), ("frames", FRAMES),
    ("longbench-v2", V2), ("frames", PLAIN), ("hotpotqa", CHOICES),
]  # fmt: skip


def spoiled(value: Any) -> Iterator[Any]:
    """A row with garbage in one place, for every place of it and every kind of garbage."""
    if isinstance(value, dict):
        for name in value:
            yield {other: content for other, content in value.items() if other != name}
            yield from ({**value, name: inner} for inner in (*GARBAGE, *spoiled(value[name])))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from ([*value[:index], inner, *value[index + 1 :]] for inner in (*GARBAGE, *spoiled(value[index])))


@pytest.mark.parametrize("name, row", ROWS)
def test_garbage_anywhere_is_an_example_or_a_named_error(tmp_path: Path, name: str, row: Row) -> None:
    rows = list(spoiled(row))
    assert len(rows) > 40
    result = read(tmp_path, name, *rows, *GARBAGE, row, skip_bad_rows=True)
    read_rows = {bad.row for bad in result.bad}
    assert len(read_rows) > 20 and all(bad.field and bad.reason for bad in result.bad)
    for example in result.examples:
        assert example.benchmark == name and example.answers and all(answer.strip() for answer in example.answers)
        assert example.messages is not None or (example.context and example.question and example.question.strip())


def test_a_ready_prompt_is_taken_apart_only_if_it_is_the_published_one() -> None:
    text = TEMPLATE.replace("$DOC$", "a </text>\n\nb").replace("$Q$", "Why?")
    assert split_template(f"\n{text}\n") == ("a </text>\n\nb", "Why?")
    assert split_template(text.replace("Format", "Shape")) is None
    assert split_template(TEMPLATE.replace("$DOC$", " ").replace("$Q$", "Why?")) is None
    assert split_template("") is None


def test_options_are_listed_once() -> None:
    listed = "Know it?\n\nChoose one of these options and answer with its letter:\n(A) no\n(B) yes"
    assert with_choices("Know it?", ("no", "yes")) == listed, "the word 'no' stands in 'Know', and is no option there"
    assert with_choices("Know it?", ("A. no", "(B) yes")) == listed
    for question in ("Know it?\nA. no\nB. yes", "Know it? (A) no (B) yes", listed):
        assert with_choices(question, ("no", "yes")) == question


def test_every_benchmark_reads_our_own_rows(tmp_path: Path) -> None:
    for name, benchmark in BENCHMARKS.items():
        row = (
            {**CHOICES, "answer_type": "choice"} if benchmark.answer_type == "choice" else {**PLAIN, "answers": ["12"]}
        )
        assert read_one(tmp_path, name, row).benchmark == name
