"""Reading rows in every form and from every source, and reporting all that is wrong with them."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError

from longreach.rl.data import BadRow, DataConfig, Example, read_examples
from longreach.rl.rows import LeftOut, RowError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
GOOD = {"context": "Paris is a city.", "question": "What is Paris?", "answers": ["a city"]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_one(tmp_path: Path, row: dict[str, Any], **options: Any) -> Example:
    (example,) = read_examples(write(tmp_path / "one.jsonl", row), **options).examples
    return example


def docqa(source: str, ability: str, truth: str) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": "<text>\nD\n</text>\n\nQ"}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 7, "split": "train"},
    }


def test_plain_row(tmp_path: Path) -> None:
    example = read_one(tmp_path, {**GOOD, "source": "web", "note": None})
    assert example == Example(
        "one-0", "one", ("a city",), context="Paris is a city.", question="What is Paris?", columns={"source": "web"}
    )
    full = {"id": 5, "benchmark": "b", "answer_type": "choice", "choices": ["x", "y"], "answer": "B", "response": "r"}
    example = read_one(tmp_path, {"context": "c", "question": "q", **full})
    assert (example.id, example.benchmark, example.answers, example.choices) == ("5", "b", ("B",), ("x", "y"))
    assert (example.answer_type, example.response, example.columns) == ("choice", "r", {})


def test_trl_rows(tmp_path: Path) -> None:
    example = read_one(tmp_path, {"prompt": "Say", "solution": 42, "level": 3})
    assert (example.text, example.answers, example.context) == ("Say", ("42",), None)
    assert example.columns == {"solution": 42, "level": 3}  # under TRL's names, for TRL's functions
    messages = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]
    example = read_one(tmp_path, {"prompt": messages, "answers": ["x", "y"]})
    assert example.messages == tuple(messages)
    assert example.answers == ("x", "y")


@pytest.mark.parametrize(
    "source, ability, truth, answer, answer_type",
    [
        ("long_toc_choices_0_20000", "doc-mc", "The correct answer is (B)", "(B)", "choice"),
        ("docmath_20000_40000", "doc-math", "Therefore, the answer is 12.5.", "12.5", "number"),
        ("docmath_0_20000", "doc-math", "Therefore, the answer is yes.", "yes", "number"),
        ("musique_0_20000", "doc-qa", "Therefore, the answer is St. Louis.", "St. Louis", "span"),
        ("multihoprag_0_20000", "doc-qa", "Therefore, the answer is \u5df4\u9ece", "\u5df4\u9ece", "span"),
        ("other", "math", "72", "72", "auto"),
    ],
)
def test_docqa_rl_rows(tmp_path: Path, source: str, ability: str, truth: str, answer: str, answer_type: str) -> None:
    example = read_one(tmp_path, docqa(source, ability, truth))
    assert (example.answers, example.answer_type, example.benchmark) == ((answer,), answer_type, source)
    assert example.id == "one-0"
    assert example.messages is not None
    assert set(example.columns) == {"data_source", "ability", "reward_model", "extra_info"}


@pytest.mark.parametrize(
    "row",
    [
        {**GOOD, "source": "web", "choices": ["a city", "a river"], "answer_type": "choice"},
        {"prompt": "Say", "solution": "42", "level": 3, "question": "why"},
        {"prompt": [{"role": "user", "content": "Hi"}], "answer": "x", "response": "long"},
        docqa("docmath_0_20000", "doc-math", "Therefore, the answer is 12.5."),
    ],
)
def test_dump_reads_back_equal(tmp_path: Path, row: dict[str, Any]) -> None:
    example = read_one(tmp_path, row)
    (again,) = read_examples(write(tmp_path / "other.jsonl", example.to_row())).examples
    assert again == example
    assert hash(again) == hash(example)


BAD: list[tuple[Any, str, str]] = [
    ({**GOOD, "context": "  "}, "context", "empty"),
    ({**GOOD, "question": None}, "question", "missing or null"),
    ({**GOOD, "question": 3}, "question", "type int"),
    ({**GOOD, "answers": []}, "answers", "empty"),
    ({**GOOD, "answers": [None]}, "answers", "null"),
    ({**GOOD, "answers": ["x", " "]}, "answers", "empty"),
    ({**GOOD, "answers": [True]}, "answers", "type bool"),
    ({**GOOD, "answers": {"a": 1}}, "answers", "type dict"),
    ({**GOOD, "answers": "the"}, "answers", "nothing can match"),
    ({"context": "c", "question": "q"}, "answers", "missing"),
    ({**GOOD, "answer_type": "essay"}, "answer_type", "unknown"),
    ({**GOOD, "answer_type": "number"}, "answers", "parse as a number"),
    ({**GOOD, "answer_type": "number-any-scale"}, "answers", "parse as a number"),
    ({**GOOD, "answer_type": "yes_no"}, "answers", "no yes_no"),
    ({**GOOD, "answer_type": "date", "answers": ["5/10/1987"]}, "answers", "no date"),
    ({**GOOD, "answer_type": "list", "answers": ["x; the"]}, "answers", "nothing can match"),
    ({**GOOD, "answer_type": "choice"}, "answers", "no letter"),
    ({**GOOD, "choices": ["x", "y"]}, "answers", "none of the 2"),
    ({**GOOD, "answers": "C", "choices": ["x", "y"]}, "answers", "none of the 2"),
    ({**GOOD, "choices": []}, "choices", "empty"),
    ({**GOOD, "id": ""}, "id", "empty"),
    ({**GOOD, "context": "\ud800"}, "context", "surrogate"),
    ({"prompt": [], "answer": "x"}, "prompt", "not empty"),
    ({"prompt": [{"role": "boss", "content": "x"}], "answer": "x"}, "prompt", "role"),
    ({"prompt": [{"role": "user"}], "answer": "x"}, "prompt", "null"),
    (
        {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "answer": "x"},
        "prompt",
        "ends",
    ),
    ({**docqa("s", "a", "x"), "reward_model": {}}, "reward_model", "ground_truth"),
    ({**docqa("s", "a", "x"), "reward_model": "x"}, "reward_model", "type str"),
    ({"text": "x"}, "row", "no form"),
    ([1], "row", "type list"),
    ("x", "row", "type str"),
]


@pytest.mark.parametrize("row, column, reason", BAD)
def test_bad_row_is_named(tmp_path: Path, row: Any, column: str, reason: str) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, row)
    with pytest.raises(ValueError, match=rf"data\.jsonl, row 2, {column}: .*{reason}"):
        read_examples(path)


def test_undecodable_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(
        b"\xef\xbb\xbf" + line + b"\n\n{oops\n\xff\xfe\n" + line.replace(b'"a city"', b"NaN") + b"\n" + line
    )
    result = read_examples(path, skip_bad_rows=True)
    assert [(bad.row, bad.field) for bad in result.bad] == [(3, "row"), (4, "row"), (5, "row")]
    assert ["JSON" in bad.reason for bad in result.bad] == [True, False, True]
    assert "UTF-8" in result.bad[1].reason
    assert [example.id for example in result.examples] == ["data-0", "data-5"]


def test_one_report_holds_all_and_shows_twenty(tmp_path: Path) -> None:
    rows = [GOOD] + [{**GOOD, "question": ""}] * 24
    with pytest.raises(ValueError, match="24 bad rows") as caught:
        read_examples(write(tmp_path / "data.jsonl", *rows))
    lines = str(caught.value).split("\n")
    assert sum(", question: is empty" in line for line in lines) == 20
    assert any("4 more" in line for line in lines)
    assert "--skip-bad-rows" in lines[-1]


def test_bad_rows_are_set_aside_and_counted(tmp_path: Path) -> None:
    path, aside = tmp_path / "data.jsonl", tmp_path / "run" / "bad.jsonl"
    path.write_bytes(json.dumps({**GOOD, "question": ""}).encode() + b"\n\xff\n" + json.dumps(GOOD).encode())
    result = read_examples(path, skip_bad_rows=True, set_aside=aside)
    written = [json.loads(line) for line in aside.read_text().splitlines()]
    assert [entry["row"] for entry in written] == [1, 2]
    assert written[0]["content"]["context"] == GOOD["context"]
    assert written[1]["content"] == "\\xff\n"
    assert result.bad[0] == BadRow(str(path), 1, "question", "is empty")
    assert len(result.examples) == 1
    with pytest.raises(ValueError, match="no usable row"):
        read_examples(write(path, {**GOOD, "question": ""}), skip_bad_rows=True)


def test_duplicate_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {**GOOD, "id": "x"}, {**GOOD, "id": "x"})
    with pytest.raises(ValueError, match=r"row 2, id: 'x' is already that of .*row 1"):
        read_examples(path)


def test_rows_for_warm_up(tmp_path: Path) -> None:
    example = read_one(tmp_path, {"context": "c", "question": "q", "response": "r"}, needs="response")
    assert example.answers == ()
    assert read_one(tmp_path, example.to_row(), needs="response") == example
    with pytest.raises(ValueError, match="response: is missing"):
        read_one(tmp_path, GOOD, needs="response")


def test_parquet_as_published(tmp_path: Path) -> None:
    rows = [docqa("docmath_0_20000", "doc-math", f"Therefore, the answer is {n}.") for n in range(130)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "test.parquet")
    result = read_examples(tmp_path)  # the folder as downloaded: train rows alone
    assert [example.answers[0] for example in result.examples] == [str(n) for n in range(130)]
    assert result.files == [str(tmp_path / "train.parquet")]
    assert len(read_examples(tmp_path, split="test").examples) == 1
    assert len(read_examples(tmp_path, limit=3).examples) == 3


def test_parquet_holes(tmp_path: Path) -> None:
    texts = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"c\xff")
    )
    columns = {"context": texts, "question": ["q", "q"], "answer": ["x", "x"], "weight": [math.nan, 1.0]}
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match="2 bad rows") as caught:
        read_examples(path)
    assert "row 1, weight: is nan" in str(caught.value)
    assert "row 2, row: is not UTF-8" in str(caught.value)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a parquet file"):
        read_examples(path)


def test_json_array_and_lines(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    array.write_text(json.dumps([GOOD, GOOD], indent=1))
    assert [example.id for example in read_examples(array).examples] == ["a-0", "a-1"]
    assert len(read_examples(write(tmp_path / "b.json", GOOD, GOOD, GOOD)).examples) == 3
    array.write_text("[{]")
    with pytest.raises(ValueError, match=r"a\.json, row 1, row: is not valid JSON"):
        read_examples(array)


def test_folders_and_globs(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "part.jsonl", GOOD)
    assert [e.id for e in read_examples(tmp_path).examples] == ["x/part.jsonl-0", "y/part.jsonl-0"]
    assert len(read_examples(str(tmp_path / "*" / "part.jsonl")).examples) == 2
    assert len(read_examples(tmp_path / "x").examples) == 1


def test_missing_source_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "hotpotqa.jsonl", GOOD)
    for source in (tmp_path / "hotpot.jsonl", tmp_path / "no" / "hotpotqa.jsonl", tmp_path / "hotpot*.parquet"):
        with pytest.raises(ValueError, match=r"hotpotqa\.jsonl"):
            read_examples(source)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"\.txt"):
        read_examples(tmp_path / "notes.txt")


def test_datasets_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        if name == "nobody/nothing":
            raise DatasetNotFoundError("not there")
        return datasets.Dataset.from_list([GOOD, GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load)
    result = read_examples("someone/cities", split="validation")
    assert asked == [("someone/cities", "validation")]
    assert [(e.id, e.benchmark) for e in result.examples] == [("cities-0", "cities"), ("cities-1", "cities")]
    with pytest.raises(ValueError, match=r"nobody/nothing.*no such file"):
        read_examples("nobody/nothing")


def test_config_is_checked() -> None:
    with pytest.raises(ValueError, match="'left'"):
        DataConfig(truncate="left")
    with pytest.raises(ValueError, match="max_length"):
        DataConfig(truncate="middle")
    with pytest.raises(ValueError, match="limit is 0"):
        DataConfig(limit=0)


def test_archives_of_files(tmp_path: Path) -> None:
    archive = tmp_path / "data.zip"
    pq.write_table(pa.Table.from_pylist([GOOD, GOOD]), tmp_path / "b.parquet")
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("data/a.jsonl", json.dumps(GOOD) + "\n")
        written.writestr("data/c.json", json.dumps([GOOD]))
        written.writestr("__MACOSX/data/._a.jsonl", "junk")
        written.writestr("data/readme.txt", "junk")
        written.write(tmp_path / "b.parquet", "data/b.parquet")
    assert [example.id for example in read_examples(archive).examples] == ["a-0", "b-0", "b-1", "c-0"]
    archive.write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"data\.zip: not a zip archive"):
        read_examples(archive)
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("readme.txt", "junk")
    with pytest.raises(ValueError, match=r"data\.zip: no \.jsonl, .* file in it"):
        read_examples(archive)


def test_one_file_of_many_by_its_name(tmp_path: Path) -> None:
    for stem in ("hotpotqa", "hotpotqa_e", "musique-dev", "musique-test", "other"):
        write(tmp_path / f"{stem}.jsonl", GOOD)
    assert read_examples(tmp_path, stems=("hotpotqa",)).files == [str(tmp_path / "hotpotqa.jsonl")]
    assert read_examples(tmp_path, stems=("x", "musique"), split="dev").files == [str(tmp_path / "musique-dev.jsonl")]
    assert len(read_examples(tmp_path, stems=("musique",)).files) == 2
    with pytest.raises(ValueError, match=r"no file of the name qasper or paper among hotpotqa, .*give the file itself"):
        read_examples(tmp_path, stems=("qasper", "paper"))


def test_one_object_over_many_lines_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    for indent in (None, 1):
        path.write_text(json.dumps(GOOD, indent=indent))
        assert [example.id for example in read_examples(path).examples] == ["one-0"]
    path.write_text('{\n"context": ')
    with pytest.raises(ValueError, match=r"one\.json, row 1, row: is not valid JSON"):
        read_examples(path)


def test_a_parser_may_make_many_examples_of_a_row_or_leave_it_out(tmp_path: Path) -> None:
    def parse(row: Any, default_id: str, benchmark: str) -> Iterator[Example | RowError]:
        if row == 0:
            raise LeftOut("row", "is zero")
        for index in range(row):
            if index == 3:
                yield RowError("third", "is one too many")
            else:
                yield Example(f"{default_id}.{index}", benchmark, ("x",), text="t")

    path = write(tmp_path / "n.jsonl", 2, 0, 5, 1)
    result = read_examples(path, parse=parse, skip_bad_rows=True, set_aside=tmp_path / "bad.jsonl")
    assert [example.id for example in result.examples] == [
        "n-0.0",
        "n-0.1",
        "n-2.0",
        "n-2.1",
        "n-2.2",
        "n-2.4",
        "n-3.0",
    ]
    assert result.left_out == [BadRow(str(path), 2, "row", "is zero")]
    assert result.bad == [BadRow(str(path), 3, "third", "is one too many")]
    assert [json.loads(line)["row"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [3]
    assert [example.id for example in read_examples(path, parse=parse, limit=4).examples][-1] == "n-2.1"
    with pytest.raises(ValueError, match=r"row 3, third: is one too many"):
        read_examples(path, parse=parse)
    with pytest.raises(ValueError, match=r"no usable row \(0 bad ones, 1 left out\); .*row 1, row: is zero"):
        read_examples(write(path, 0), parse=parse)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real documents are not here")
def test_real_files() -> None:
    counts = {path.stem: len(read_examples(path).examples) for path in SHARED.glob("*.jsonl")}
    assert sum(counts.values()) == 656
    for path in SHARED.glob("*.jsonl"):
        example = read_examples(path, limit=1).examples[0]
        assert example.context
        assert example.columns["source"]
        assert example.answer_type != "auto"
