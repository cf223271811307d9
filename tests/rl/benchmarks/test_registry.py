"""Benchmarks by name: lists of names, sources, what is read of them, and what is said about it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from longreach.rl import hub
from longreach.rl.benchmarks.registry import BENCHMARKS, SEVEN, benchmark_names, find_benchmark, read_benchmark

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
PLAIN = {"context": "A text.", "question": "Why?", "answers": ["so"]}


def longbench(dataset: str, number: int) -> list[dict[str, Any]]:
    row = {"input": "Who?", "context": "c", "answers": ["Ida"], "length": 1, "dataset": dataset, "language": "en"}
    return [{**row, "all_classes": None, "_id": f"{dataset}-{index}"} for index in range(number)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_names() -> None:
    assert benchmark_names("all") == (*SEVEN, "longbench-v2")
    assert benchmark_names("seven") == SEVEN
    assert benchmark_names(" hotpotqa, needles-32k,needles-hop-128k ,hotpotqa") == (
        "hotpotqa", "needles-32k", "needles-hop-128k",
    )  # fmt: skip
    assert benchmark_names("qasper,seven")[:2] == ("qasper", "docmath")
    for text, reason in (
        ("hotpot", "did you mean 'hotpotqa'"), ("2wiki", "did you mean '2wikimultihopqa'"), ("xyz", "known: 2wiki"), ("needels-32k", "or a needle test such as needles-32k"),
        ("needles-hopp-32k", "did you mean 'hop'"), ("needles", "its form is"), (" , ", "names none; give all, seven, or some of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            benchmark_names(text)


def test_the_published_table_is_covered() -> None:
    assert [BENCHMARKS[name].title for name in SEVEN] == ["DocMath", "Frames", "2Wiki", "HQA", "Musi", "NarQA", "Qasp"]
    assert [BENCHMARKS[name].questions for name in SEVEN] == [200, 824, 200, 200, 200, 200, 200]
    assert all(BENCHMARKS[name].judged for name in SEVEN)
    assert not BENCHMARKS["longbench-v2"].judged and not find_benchmark("needles-hop-128k").judged
    assert find_benchmark("needles-hop-128k").title == "Needles hop 128K"


def test_longbench_comes_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The five names find their member of data.zip, not its LongBench-E twin; 200 questions need no remark."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for dataset in ("2wikimqa", "hotpotqa", "musique", "narrativeqa", "qasper", "gov_report"):
            archive.writestr(f"data/{dataset}.jsonl", lines(longbench(dataset, 200)))
            archive.writestr(f"data/{dataset}_e.jsonl", lines(longbench(dataset, 300)))

    def fetch(repository: str, file: str, *, repo_type: str) -> str:
        assert (repository, file, repo_type) == ("THUDM/LongBench", "data.zip", "dataset")
        return str(tmp_path / "data.zip")

    monkeypatch.setattr(hub, "cached_file", fetch)
    for name in SEVEN[2:]:
        result = read_benchmark(name)
        assert (len(result.examples), result.warnings, result.bad) == (200, [], [])
        assert {example.benchmark for example in result.examples} == {name}
        member = "2wikimqa" if name == "2wikimultihopqa" else name
        assert result.files == [str(tmp_path / "data.zip" / "data" / f"{member}.jsonl")]
        assert len(read_benchmark(name, source=tmp_path / "data.zip", limit=7).examples) == 7


def test_a_folder_of_several_benchmarks(tmp_path: Path) -> None:
    for name in ("hotpotqa", "2wikimqa"):
        (tmp_path / f"{name}.jsonl").write_text(lines(longbench(name, 3)))
    assert len(read_benchmark("2wikimultihopqa", source=tmp_path).examples) == 3
    with pytest.raises(ValueError, match=r"no file of the name frames among 2wikimqa, hotpotqa; give the file itself"):
        read_benchmark("frames", source=tmp_path)
    (tmp_path / "2wikimqa.jsonl").unlink()
    with pytest.raises(ValueError, match="dataset: is 'hotpotqa', which is not musique"):
        read_benchmark("musique", source=tmp_path)  # one file alone is taken for what is asked


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{**PLAIN, "answers": [gold], "benchmark": "hotpotqa"} for gold in ("so", "why not")]
    path.write_text(lines([*rows, {**PLAIN, "context": ""}]))
    result = read_benchmark("musique", source=path, skip_bad_rows=True)
    assert [warning.partition(": ")[2] for warning in result.warnings] == [
        "2 questions, where the published evaluation has 200: scores are not comparable",
        "2 rows call themselves hotpotqa",
        f"1 bad rows were left out, the first: {path}, row 3, context: is empty",
    ]
    assert read_benchmark("musique", source=path, limit=2).warnings == ["musique: 2 rows call themselves hotpotqa"]
    few = read_benchmark("musique", source=path, limit=5, skip_bad_rows=True).warnings
    assert few[0] == "musique: 2 questions, where the published evaluation has 200: scores are not comparable"
    # Half of a published gold list may be beyond a rule of exact equality: the question stays, and is named.
    row = {**longbench("qasper", 1)[0], "answers": ["...", "?"]}
    path.write_text(lines([row]))
    (warning,) = read_benchmark("qasper", source=path, limit=1).warnings
    assert "no answer can meet the strict rule on 1 questions (qasper-0)" in warning


def test_refusals(tmp_path: Path, bare: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([PLAIN]))
    with pytest.raises(ValueError, match="limit is 0 questions"):
        read_benchmark("musique", source=path, limit=0)
    with pytest.raises(ValueError, match="did you mean 'musique'"):
        read_benchmark("musiqe", source=path)
    with pytest.raises(ValueError, match=r"needles-2k is made to a length in tokens: give the tokenizer"):
        read_benchmark("needles-2k")
    with pytest.raises(ValueError, match="is made here and reads no source"):
        read_benchmark("needles-2k", source=path, tokenizer=bare)
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        read_benchmark("musique", source=tmp_path / "nowhere.jsonl")


def test_ids_are_unique_and_name_the_benchmark(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / f"frames-{part}.jsonl").write_text(lines([PLAIN, PLAIN]))
    ids = [example.id for example in read_benchmark("frames", source=tmp_path).examples]
    assert ids == ["frames-a-0", "frames-a-1", "frames-b-0", "frames-b-1"]
    (tmp_path / "rows.jsonl").write_text(lines(longbench("musique", 1) * 2))
    with pytest.raises(ValueError, match=r"row 2, id: 'musique-0' is already that of .*row 1"):
        read_benchmark("musique", source=tmp_path / "rows.jsonl")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real documents beside this checkout")
@pytest.mark.parametrize(
    "name, file, number",
    [
        ("2wikimultihopqa", None, 150), ("hotpotqa", None, 100), ("musique", None, 100), ("narrativeqa", None, 56),
        ("qasper", None, 51), ("docmath", "tatqa_dev.jsonl", 180), ("docmath", "financebench_filings.jsonl", 19),
    ],
)  # fmt: skip
def test_real_documents(name: str, file: str | None, number: int) -> None:
    result = read_benchmark(name, source=SHARED / file if file else SHARED)
    assert len(result.examples) == number and result.bad == []
    assert {example.benchmark for example in result.examples} == {name}
    assert len({example.id for example in result.examples}) == number
    counted = next(warning for warning in result.warnings if "published evaluation" in warning)
    assert f"{number} questions" in counted
