"""The benchmarks by name, and reading one: the seven of QwenLong-L1 (arXiv 2505.17667), LongBench v2, needle tests.

Each has a default source on the hub; a file, folder, archive or other name takes its place, in any of the layouts that
`layouts.py` reads for it. Needle tests (`needles.py`) are made here and need the model's tokenizer instead.

Where the published questions come from: DocMath is a list of 200 questions of DocMath-Eval's testmini, published as ready
prompts with the gold in a sentence; FRAMES with the text of its pages; the other five are LongBench v1. LongBench's hub
repository has a loading script, which `datasets` no longer runs, so its archive is fetched and read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..config import nearest
from ..data import Parse, ReadResult, read_examples
from ..rows import Example, RowError
from ..rules import rule_reward
from .layouts import Place, read_row
from .needles import make_needles, needle_test

SEVEN: tuple[str, ...] = ("docmath", "frames", "2wikimultihopqa", "hotpotqa", "musique", "narrativeqa", "qasper")
_SHOWN = 10


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    title: as the published table prints it. source: where its published questions are (`hub.py` has the form of names).
    judged: whether a judge is asked besides the rule. questions: how many the published evaluation has, None where that
    is the user's choice. answer_type: of questions that don't say it themselves. stems: names of its file in a folder
    that holds several benchmarks. forms: the layouts that are read for it, tried in this order. split: read of a source
    that has several, unless it names one.
    """

    name: str
    title: str
    source: str
    judged: bool = True
    questions: int | None = 200
    answer_type: str = "auto"
    stems: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    split: str = "test"


def _longbench(name: str, title: str, stems: tuple[str, ...], *forms: str) -> Benchmark:
    return Benchmark(name, title, "THUDM/LongBench:data.zip", stems=stems, forms=("longbench", *forms, "verl", "plain"))


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("docmath", "DocMath", "Tongyi-Zhiwen/docmath:docmath_all_test_200.jsonl", answer_type="number",
                  stems=("docmath_all_test_200", "docmath"), forms=("docmath", "verl", "plain")),
        Benchmark("frames", "Frames", "Tongyi-Zhiwen/frames:test.jsonl", questions=824, stems=("frames",),
                  forms=("frames", "verl", "plain")),
        _longbench("2wikimultihopqa", "2Wiki", ("2wikimqa", "2wikimultihopqa"), "hotpotqa"),
        _longbench("hotpotqa", "HQA", ("hotpotqa",), "hotpotqa"),
        _longbench("musique", "Musi", ("musique",), "musique"),
        _longbench("narrativeqa", "NarQA", ("narrativeqa",), "narrativeqa"),
        _longbench("qasper", "Qasp", ("qasper",), "qasper", "qasper-papers"),
        Benchmark("longbench-v2", "LBv2", "THUDM/LongBench-v2:data.json", judged=False, questions=503, answer_type="choice",
                  stems=("longbench-v2", "data"), forms=("longbench-v2", "plain"), split="train"),
    )
}  # fmt: skip


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name. Raises ValueError that names the nearest known one."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if name.startswith("needle"):
        test = needle_test(name)
        return Benchmark(name, test.title, "made here", judged=False, questions=None)
    raise ValueError(
        f"benchmark {name!r} is unknown; {nearest(name, BENCHMARKS)}, or a needle test such as needles-32k"
    )


def benchmark_names(text: str) -> tuple[str, ...]:
    """Names out of a comma-separated list; "seven" and "all" (the seven and longbench-v2) stand for several.

    Raises ValueError for an unknown or an empty list.
    """
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        groups = {"seven": SEVEN, "all": tuple(BENCHMARKS)}
        names += groups[part] if part in groups else (find_benchmark(part).name,)
    if not names:
        raise ValueError(f"benchmarks {text!r} names none; give all, seven, or some of {', '.join(BENCHMARKS)}")
    return tuple(dict.fromkeys(names))


def read_benchmark(
    name: str,
    *,
    source: str | Path | None = None,
    limit: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> ReadResult:
    """The questions of a benchmark, their ids unique within it and their `benchmark` its name.

    Args:
        source: a file, folder, archive or hub name instead of the benchmark's own.
        limit: the first so many questions; of a needle test, how many there are.
        tokenizer, seed: for needle tests alone, which are made to a length in its tokens.
        skip_bad_rows: list what can't be read in `bad` instead of stopping.

    What is odd about the data without being an error stands in `warnings`: a count that is not the published one, rows
    left out by the benchmark's own rules, gold answers that the strict rule cannot match.
    Raises ValueError for an unknown name, a source that is not there or holds another benchmark, and bad rows.
    """
    benchmark = find_benchmark(name)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit} questions, must be at least 1")
    if name not in BENCHMARKS:
        return _needles(name, source, limit, tokenizer, seed)
    result = read_examples(
        benchmark.source if source is None else source, split=benchmark.split, limit=limit,
        skip_bad_rows=skip_bad_rows, parse=_parser(benchmark), stems=benchmark.stems,
    )  # fmt: skip
    return replace(result, warnings=list(_warnings(benchmark, result, limit)))


def _needles(
    name: str, source: str | Path | None, limit: int | None, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> ReadResult:
    if source is not None:
        raise ValueError(f"{name} is made here and reads no source, but {source} is given")
    if tokenizer is None:
        raise ValueError(f"{name} is made to a length in tokens: give the tokenizer of the model")
    return ReadResult(list(make_needles(needle_test(name), tokenizer, questions=limit, seed=seed)), [], [])


def _parser(benchmark: Benchmark) -> Parse:
    place = partial(Place, benchmark.name, benchmark.answer_type, (benchmark.name, *benchmark.stems))

    def parse(row: object, default_id: str, _: str) -> Iterator[Example | RowError]:
        own = default_id if default_id.startswith(benchmark.name) else f"{benchmark.name}-{default_id}"
        return read_row(row, place(own), benchmark.forms)

    return parse


def _warnings(benchmark: Benchmark, result: ReadResult, limit: int | None) -> Iterator[str]:
    found, expected = len(result.examples), benchmark.questions
    if expected is not None and found != expected and (limit is None or limit > found):
        yield f"{benchmark.name}: {found} questions, where the published evaluation has {expected}: scores are not comparable"
    others = Counter(
        e.columns["row_benchmark"] for e in result.examples if e.columns.get("row_benchmark") in BENCHMARKS
    )
    for other, number in others.items():
        yield f"{benchmark.name}: {number} rows call themselves {other}"
    if result.left_out:
        reasons = sorted({f"{row.field} {row.reason}" for row in result.left_out})
        yield f"{benchmark.name}: {len(result.left_out)} rows were left out ({'; '.join(reasons)})"
    if result.bad:
        yield f"{benchmark.name}: {len(result.bad)} bad rows were left out, the first: {result.bad[0]}"
    odd = [example.id for example in result.examples if not _can_be_right(example)]
    if odd:
        shown = ", ".join(odd[:_SHOWN]) + (f" and {len(odd) - _SHOWN} more" if odd[_SHOWN:] else "")
        yield f"{benchmark.name}: no answer can meet the strict rule on {len(odd)} questions ({shown}); a judge can still say yes"


def _can_be_right(example: Example) -> bool:
    """Whether some gold answer, said in the form that is asked for, passes the strict rule."""
    return any(
        rule_reward(
            f"Therefore, the answer is {gold}.", example.answers,
            answer_type=example.answer_type, choices=example.choices,
        ).score == 1.0
        for gold in example.answers
    )  # fmt: skip
