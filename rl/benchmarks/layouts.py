"""The forms in which the benchmarks are published, each turned into `Example`s; which form a row has is told from its columns.

    longbench    input, context, answers, length, dataset, language, all_classes, _id      LongBench v1 (arXiv 2308.14508)
    hotpotqa     question, answer, context: [[title, [sentence]]] or {title: [..], sentences: [[..]]}    HotpotQA, 2Wiki
    musique      question, answer, answer_aliases, answerable, paragraphs: [{title, paragraph_text}]
    narrativeqa  document: {text, summary, ..}, question: {text}, answers: [{text}]
    qasper       title, abstract, full_text: {section_name, paragraphs}, qas: {question, answers, ..}; many questions a row
    docmath      question_id, question, paragraphs, python_solution, ground_truth                        DocMath-Eval
    frames       Prompt, Answer, wiki_items: [{title, text}]
    longbench-v2 question, choice_A .. choice_D, answer, context, domain, difficulty, length       arXiv 2412.15204
    verl         prompt, reward_model                           docmath_all_test_200.jsonl is published in this form
    plain        context, question, answers                     ours (`rows.py`), under any benchmark's name

Read in source: the READMEs of LongBench, HotpotQA, 2WikiMultihopQA and DocMath-Eval, LongBench v2's prompt, MuSiQue's
evaluation script, Qasper's reader and sample file, the hub's loading scripts of Qasper and NarrativeQA, QwenLong-L1's DocMath
evaluation, and a public reader of the frames file with its pages. Only by the cards of copies: the columns of LongBench v2,
of HotpotQA and 2Wiki on the hub, and of google/frames-benchmark. No file of the hub itself was at hand: what one holds beside
these columns is not known here. QwenLong-L1 takes DocMath's golds from testmini's unrounded numbers; docmath_all_test_200
states them in sentences.

Gold answers keep the published order, since the published scores use the first alone; the strict rule takes any of them.
Documents: LongBench's as printed; DocMath and FRAMES joined as QwenLong-L1 does; passages printed like LongBench's; a paper
as title, abstract and sections. What it gives up: figures and tables of papers, which the data hold as file names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..prompts import TEMPLATE
from ..rows import Example, LeftOut, RowError, WrongForm, parse_row
from .fields import Row, decoded, golds, print_passages, read_objects, read_passages, read_text, read_texts

LETTERS = "ABCD"
# What a reader may say where the gold is "unanswerable": the published template asks for no certain word.
UNANSWERABLE = (
    "unanswerable",
    "not answerable",
    "cannot be answered",
    "the question cannot be answered",
    "not mentioned",
)


@dataclass(frozen=True)
class Place:
    """What a row's own columns don't say: the benchmark it is read for, LongBench's name of it, the id to fall back on."""

    benchmark: str
    answer_type: str
    datasets: tuple[str, ...]
    default_id: str


@dataclass(frozen=True)
class Layout:
    """A published form. fits: whether a row has it; read: its examples, and an error for each part that is none."""

    name: str
    columns: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, Place], Iterator[Example | RowError]]


def read_row(row: object, place: Place, layouts: Sequence[str]) -> Iterator[Example | RowError]:
    """The examples of one row in one of the named layouts. Raises RowError."""
    if not isinstance(row, Mapping):
        raise RowError("row", f"is of type {type(row).__name__}, must be an object with named columns")
    present = {name: value for name, value in row.items() if value is not None}
    for name in layouts:
        if LAYOUTS[name].fits(present):
            yield from LAYOUTS[name].read(present, place)
            return
    if "Prompt" in row and "Answer" in row and ("wiki_links" in row or "wikipedia_link_1" in row):
        raise WrongForm(
            "wiki_items",
            "is missing: google/frames-benchmark holds links, not pages; give the form with the pages' text "
            "(Tongyi-Zhiwen/frames:test.jsonl)",
        )
    forms = "; ".join(f"{name} ({LAYOUTS[name].columns})" for name in layouts)
    raise WrongForm("row", f"has the columns {sorted(row)[:12]}, none of the forms of {place.benchmark}: {forms}")


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(name in row for name in names)


def _longbench(row: Row, place: Place) -> Iterator[Example]:
    dataset = row.get("dataset")
    if isinstance(dataset, str) and dataset.removesuffix("_e") not in place.datasets:
        raise WrongForm("dataset", f"is {dataset!r}, which is not {place.benchmark}; give that benchmark's own file")
    answers = golds(row["answers"], "answers")
    if place.benchmark == "qasper":
        answers = _with_unanswerable(answers)
    yield _example(row, place, "_id", read_text(row["context"], "context"), read_text(row["input"], "input"), answers,
                   used=("input", "context", "answers"))  # fmt: skip


def _hotpotqa(row: Row, place: Place) -> Iterator[Example]:
    passages = read_passages(decoded(row["context"]))
    yield _example(row, place, "_id", print_passages(passages), read_text(row["question"], "question"),
                   golds(row["answer"], "answer"), used=("context", "question", "answer"))  # fmt: skip


def _musique(row: Row, place: Place) -> Iterator[Example]:
    if row.get("answerable") is False:
        raise LeftOut("answerable", "is false: answers are scored on answerable questions alone")
    entries = read_objects(row["paragraphs"], "paragraphs")
    passages = [
        (str(entry.get("title", "")), read_text(entry.get("paragraph_text"), "paragraphs")) for entry in entries
    ]
    aliases = row.get("answer_aliases") or []
    answers = golds([row["answer"], *(aliases if isinstance(aliases, list | tuple) else [aliases])], "answer")
    yield _example(row, place, "id", print_passages(passages), read_text(row["question"], "question"), answers,
                   used=("paragraphs", "question", "answer", "answer_aliases"))  # fmt: skip


def _narrativeqa(row: Row, place: Place) -> Iterator[Example]:
    document = row["document"]
    if not document.get("text"):
        raise RowError("document", "has no text (a summary is not the story); give the form with the full text")
    answers = golds([answer.get("text") for answer in read_objects(row["answers"], "answers")], "answers")
    columns = {"document_id": document.get("id"), "kind": document.get("kind")}
    question = read_text(row["question"].get("text"), "question")
    yield _example(row, place, "id", read_text(document["text"], "document"), question, answers,
                   used=("document", "question", "answers"), **columns)  # fmt: skip


def _qasper(row: Row, place: Place) -> Iterator[Example | RowError]:
    sections = read_objects(row["full_text"], "full_text")
    parts = [_lines(row.get("title")), _lines(row.get("abstract"))]
    parts += [_lines(section.get("section_name"), section.get("paragraphs")) for section in sections]
    context = read_text("\n\n".join(filter(None, parts)), "full_text")
    for index, question in enumerate(read_objects(row["qas"], "qas")):
        label = str(question.get("question_id") or f"{row.get('id') or place.default_id}-{index}")
        try:
            found = [_qasper_answer(answer) for answer in _qasper_answers(question)]
            answers = _with_unanswerable(golds([answer for answer in found if answer], f"qas.{label}.answers"))
            text = read_text(question.get("question"), f"qas.{label}.question")
        except RowError as error:
            yield error
            continue
        yield _example({"id": label, "paper": row.get("id")}, place, "id", context, text, answers, used=())


def _lines(*values: object) -> str:
    """Texts and lists of texts, one below the other; what is null or blank is left out."""
    flat = [text for value in values for text in (value if isinstance(value, list | tuple) else (value,))]
    return "\n".join(text.strip() for text in flat if isinstance(text, str) and text.strip())


def _qasper_papers(row: Row, place: Place) -> Iterator[Example | RowError]:
    """Qasper's own file: one object, paper id -> paper."""
    for paper, content in row.items():
        yield from _qasper({**content, "id": paper}, replace(place, default_id=paper))


def _qasper_answers(question: Row) -> list[Row]:
    return [entry["answer"] for entry in read_objects(question.get("answers"), "answers") if isinstance(entry.get("answer"), Mapping)]  # fmt: skip


def _qasper_answer(answer: Row) -> str | None:
    """One annotator's answer as Qasper's reader prints it; several spans are one answer."""
    if answer.get("unanswerable"):
        return UNANSWERABLE[0]
    if answer.get("yes_no") is not None:
        return "yes" if answer["yes_no"] else "no"
    spans = answer.get("extractive_spans")
    return ", ".join(span.strip() for span in read_texts(spans, "answers")) if spans else answer.get("free_form_answer")


def _docmath(row: Row, place: Place) -> Iterator[Example]:
    if "ground_truth" not in row:
        raise RowError("ground_truth", "is missing or null: DocMath-Eval hides it in its test sets; use testmini")
    context = "\n".join(read_texts(row["paragraphs"], "paragraphs"))
    yield _example(row, place, "question_id", context, read_text(row["question"], "question"),
                   golds(row["ground_truth"], "ground_truth"), used=("question", "paragraphs"))  # fmt: skip


def _frames(row: Row, place: Place) -> Iterator[Example]:
    pages = read_objects(row["wiki_items"], "wiki_items")
    context = "\n".join(f"{page.get('title', '')}\n{read_text(page.get('text'), 'wiki_items')}" for page in pages)
    yield _example(row, place, "id", context, read_text(row["Prompt"], "Prompt"), golds(row["Answer"], "Answer"),
                   used=("Prompt", "Answer", "wiki_items"))  # fmt: skip


def _longbench_v2(row: Row, place: Place) -> Iterator[Example]:
    names = [f"choice_{letter}" for letter in LETTERS]
    choices = tuple(read_text(row[name], name).strip() for name in names)
    answer = str(row["answer"]).strip()
    if len(answer) != 1 or answer not in LETTERS:
        raise RowError("answer", f"is {answer[:40]!r}, must be one of the letters {', '.join(LETTERS)}")
    question = with_choices(read_text(row["question"], "question"), choices)
    example = _example(row, place, "_id", read_text(row["context"], "context"), question, (answer,),
                       used=("context", "question", "answer", *names))  # fmt: skip
    yield replace(example, answer_type="choice", choices=choices)


def _verl(row: Row, place: Place) -> Iterator[Example]:
    example = parse_row({**row, "answer_type": "free"}, default_id=place.default_id, default_benchmark=place.benchmark,
                        needs="answers")  # fmt: skip
    text = example.messages[0]["content"] if example.messages is not None and len(example.messages) == 1 else ""
    parts = split_template(text)
    if parts is not None:
        example = replace(example, context=parts[0], question=parts[1], messages=None)
    yield replace(example, benchmark=place.benchmark, answer_type=place.answer_type)


def _plain(row: Row, place: Place) -> Iterator[Example]:
    example = parse_row(row, default_id=place.default_id, default_benchmark=place.benchmark, needs="answers")
    columns = dict(example.columns)
    if example.benchmark != place.benchmark:
        columns["row_benchmark"] = example.benchmark
    answer_type = place.answer_type if "answer_type" not in row and example.choices is None else example.answer_type
    question = example.question
    if example.choices is not None and question is not None:
        question = with_choices(question, example.choices)
    yield replace(example, benchmark=place.benchmark, columns=columns, answer_type=answer_type, question=question)


def split_template(text: str) -> tuple[str, str] | None:
    """(document, question) of a prompt in the published template; None for any other text.

    A document that is known as such can be cut without its question.
    """
    before, rest = TEMPLATE.split("$DOC$")
    between, after = rest.split("$Q$")
    text = text.strip()
    if not text.startswith(before) or not text.endswith(after):
        return None
    document, mark, question = text[len(before) : len(text) - len(after)].rpartition(between)
    if not mark or not document.strip() or not question.strip():
        return None
    return document, question


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question with its options listed by letter, unless it prints them so already."""
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    bare = [re.sub(rf"^\s*\(?{letter}[.:)]\s*", "", choice) for letter, choice in zip(letters, choices, strict=True)]
    options = list(zip(letters, bare, strict=True))
    if all(re.search(rf"\b{letter}[.:)]\s*{re.escape(text)}", question) for letter, text in options):
        return question
    listed = "\n".join(f"({letter}) {text}" for letter, text in options)
    return f"{question.strip()}\n\nChoose one of these options and answer with its letter:\n{listed}"


def _with_unanswerable(answers: tuple[str, ...]) -> tuple[str, ...]:
    if not any(answer.lower().strip(" .") == UNANSWERABLE[0] for answer in answers):
        return answers
    return tuple(dict.fromkeys([*answers, *UNANSWERABLE]))


def _example(
    row: Row, place: Place, id_column: str, context: str, question: str, answers: tuple[str, ...], *,
    used: Iterable[str], **columns: Any,
) -> Example:  # fmt: skip
    label = next((row[name] for name in (id_column, "id", "_id") if name in row), place.default_id)
    kept = {name: value for name, value in row.items() if name not in {*used, id_column, "id", "_id", "answers"}}
    kept |= {name: value for name, value in columns.items() if value is not None}
    return Example(id=str(label), benchmark=place.benchmark, answers=answers, answer_type=place.answer_type,
                   context=context, question=question, columns=kept)  # fmt: skip


def _plain_fits(row: Row) -> bool:
    # A context of passages is another form; what is wrong with any other value is said by `rows.py`.
    return "context" in row and "question" in row and not isinstance(row["context"], list | Mapping)


def _hotpotqa_fits(row: Row) -> bool:
    if not _has("question", "answer", "context")(row):
        return False
    context = row["context"]
    return not isinstance(context, str) or context.lstrip().startswith("[[")


def _narrativeqa_fits(row: Row) -> bool:
    return _has("document", "question", "answers")(row) and isinstance(row["document"], Mapping) and isinstance(row["question"], Mapping)  # fmt: skip


def _docmath_fits(row: Row) -> bool:
    # MuSiQue's paragraphs are objects.
    paragraphs = row.get("paragraphs")
    return "question" in row and "paragraphs" in row and not (isinstance(paragraphs, list) and paragraphs and isinstance(paragraphs[0], Mapping))  # fmt: skip


def _papers_fit(row: Row) -> bool:
    return bool(row) and all(
        isinstance(value, Mapping) and "qas" in value and "full_text" in value for value in row.values()
    )


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("longbench", "input, context, answers", _has("input", "context", "answers"), _longbench),
        Layout("hotpotqa", "question, answer, context of [title, sentences]", _hotpotqa_fits, _hotpotqa),
        Layout("musique", "question, answer, paragraphs", _has("question", "answer", "paragraphs"), _musique),
        Layout("narrativeqa", "document, question, answers with text", _narrativeqa_fits, _narrativeqa),
        Layout("qasper", "full_text, qas", _has("full_text", "qas"), _qasper),
        Layout("qasper-papers", "one object of papers with full_text, qas", _papers_fit, _qasper_papers),
        Layout("docmath", "question, paragraphs, ground_truth", _docmath_fits, _docmath),
        Layout("frames", "Prompt, Answer, wiki_items", _has("Prompt", "Answer", "wiki_items"), _frames),
        Layout("longbench-v2", "question, choice_A to choice_D, answer, context",
               _has("question", "answer", "context", *(f"choice_{letter}" for letter in LETTERS)), _longbench_v2),
        Layout("verl", "prompt, reward_model", _has("prompt", "reward_model"), _verl),
        Layout("plain", "context, question, answers", _plain_fits, _plain),
    )
}  # fmt: skip
