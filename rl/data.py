"""Reading data sets: JSONL, JSON, parquet, folders and globs of them, or a `datasets` name.

Every row becomes an `Example` (`rows.py`) or a `BadRow`; none vanishes. Bad rows end in one report of all of them, or,
on request, are written aside and counted. Files are streamed row by row, so that memory is the examples' own; a `.json`
array is the exception and is parsed whole. Ids must be unique in a source: difficulty, pool and rollouts go by them.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .rows import Example, Needs, RowError, parse_row

__all__ = ["BadRow", "DataConfig", "Example", "ReadResult", "read_examples"]

_SUFFIXES = (".jsonl", ".json", ".parquet")
_SHOWN = 20


@dataclass(frozen=True)
class DataConfig:
    """What to learn from. train, eval: files, folders, globs or `datasets` names.

    split, eval_split: of a `datasets` name, and of a folder that names its files by split. limit: first rows of train.
    truncate: what happens to a prompt above max_length tokens: error | middle | keep (the phases then sort it).
    """

    train: str = ""
    eval: tuple[str, ...] = ()
    split: str = "train"
    eval_split: str = "test"
    limit: int | None = None
    skip_bad_rows: bool = False
    truncate: str = "keep"
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.truncate not in ("error", "middle", "keep"):
            raise ValueError(f"data truncate {self.truncate!r} is unknown; choose error, middle or keep")
        if self.truncate != "keep" and self.max_length is None:
            raise ValueError(f"data truncate {self.truncate!r} needs max_length, in tokens")
        for name in ("limit", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data {name} is {value}, must be at least 1")


@dataclass(frozen=True)
class BadRow:
    """A row that was not read. row counts from 1; for JSONL it is the line."""

    file: str
    row: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}, {self.field}: {self.reason}"


@dataclass(frozen=True)
class ReadResult:
    """examples in file and row order; bad is empty unless bad rows were skipped; files in the order read."""

    examples: list[Example]
    bad: list[BadRow]
    files: list[str]


@dataclass(frozen=True)
class _Broken:
    """A row that could not even be decoded."""

    reason: str
    raw: str


def read_examples(
    source: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    skip_bad_rows: bool = False,
    set_aside: Path | None = None,
    needs: Needs = "answers",
) -> ReadResult:
    """Read a source whole, or its first `limit` good rows.

    A row without id gets "<file stem>-<row index>" (index from 0), one without benchmark its file's stem. In a folder
    whose file names carry splits (train-00000.parquet) only those of `split` are read. needs: what each row must have.
    set_aside: where skipped rows go, as JSONL of file, row, field, reason and the row; written anew.
    Raises ValueError for a source that is not there, and with one report for all bad rows unless they are skipped.
    """
    examples: list[Example] = []
    bad: list[BadRow] = []
    seen: dict[str, str] = {}
    tables = _open(source, split)
    with ExitStack() as stack:
        aside = None
        if skip_bad_rows and set_aside is not None:
            set_aside.parent.mkdir(parents=True, exist_ok=True)
            aside = stack.enter_context(set_aside.open("w", encoding="utf-8"))
        for file, label, rows in tables:
            for index, row in rows:
                if limit is not None and len(examples) >= limit:
                    break
                try:
                    example = _example(row, f"{label}-{index}", label, needs)
                    if example.id in seen:
                        raise RowError("id", f"{example.id!r} is already that of {seen[example.id]}")
                except RowError as error:
                    bad.append(BadRow(file, index + 1, error.column, error.reason))
                    if aside is not None:
                        aside.write(_aside_line(bad[-1], row))
                    continue
                seen[example.id] = f"{file}, row {index + 1}"
                examples.append(example)
    if bad and not skip_bad_rows:
        raise ValueError(_report(bad, len(examples)))
    if not examples:
        raise ValueError(f"{source}: no usable row ({len(bad)} bad ones); {bad[0] if bad else 'the source is empty'}")
    return ReadResult(examples, bad, [file for file, _, _ in tables])


def _example(row: object, default_id: str, benchmark: str, needs: Needs) -> Example:
    if isinstance(row, _Broken):
        raise RowError("row", row.reason)
    return parse_row(row, default_id=default_id, default_benchmark=benchmark, needs=needs)


def _aside_line(bad: BadRow, row: object) -> str:
    entry = {"file": bad.file, "row": bad.row, "field": bad.field, "reason": bad.reason}
    entry["content"] = row.raw if isinstance(row, _Broken) else row
    return json.dumps(entry, default=str) + "\n"


def _report(bad: list[BadRow], good: int) -> str:
    lines = [f"{len(bad)} bad rows ({good} good ones):", *(f"  {row}" for row in bad[:_SHOWN])]
    if len(bad) > _SHOWN:
        lines.append(f"  ... and {len(bad) - _SHOWN} more")
    return "\n".join([*lines, "Mend them, or pass --skip-bad-rows to write them aside and go on."])


_Rows = Iterator[tuple[int, object]]


def _open(source: str | Path, split: str) -> list[tuple[str, str, _Rows]]:
    """(file, label, rows) of each file of a source."""
    files = _files(Path(source).expanduser(), split)
    if files is None:
        return [(str(source), str(source).rpartition("/")[2], _dataset_rows(str(source), split))]
    stems = [file.stem for file in files]
    if len(set(stems)) < len(stems):
        # Files of one stem in several folders: the path tells their rows apart.
        root = os.path.commonpath([file.parent for file in files])
        stems = [file.relative_to(root).as_posix() for file in files]
    readers = {".parquet": _parquet_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
    return [(str(file), stem, readers[file.suffix](file)) for file, stem in zip(files, stems, strict=True)]


def _files(path: Path, split: str) -> list[Path] | None:
    """The files that a path means; None if it must be a `datasets` name."""
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(
                f"{path}: cannot read {path.suffix or 'a file without suffix'}; give {', '.join(_SUFFIXES)}"
            )
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"{path}: no {', '.join(_SUFFIXES)} file in this folder")
        named = [file for file in files if split in re.split(r"[-_.]", file.stem)]
        return named or files
    if glob.has_magic(str(path)):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).suffix in _SUFFIXES]
        if not files:
            raise ValueError(f"{path}: no file matches{_nearest(path)}")
        return files
    if path.suffix in _SUFFIXES or path.is_absolute() or len(path.parts) > 2 or str(path).startswith("."):
        raise ValueError(f"{path}: no such file{_nearest(path)}")
    return None


def _nearest(path: Path) -> str:
    """A hint: the existing file most like a missing one."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = {file.name: file for file in folder.iterdir() if file.suffix in _SUFFIXES or file.is_dir()}
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.3)
    return f"; the nearest there is is {names[close[0]]}" if close else f"; {folder} holds nothing like it"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _decode(raw: bytes) -> object:
    """The JSON value of some bytes, or what is wrong with them."""
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start})"
    except RecursionError:
        reason = "is not valid JSON: nested too deeply"
    except ValueError as error:
        reason = f"is not valid JSON: {error}"
    return _Broken(reason, raw.decode("utf-8", errors="backslashreplace"))


def _jsonl_rows(path: Path) -> _Rows:
    with path.open("rb") as file:
        for index, line in enumerate(file):
            line = line.removeprefix(b"\xef\xbb\xbf") if index == 0 else line
            if line.strip():
                yield index, _decode(line)


def _json_rows(path: Path) -> _Rows:
    """A JSON array of rows; a file that opens with an object is taken for JSON Lines."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _jsonl_rows(path)
        return
    rows = _decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    yield from enumerate(rows if isinstance(rows, list) else [rows])


def _parquet_rows(path: Path) -> _Rows:
    try:
        parquet = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    with parquet:
        index = 0
        for batch in parquet.iter_batches(batch_size=64):
            for offset in range(batch.num_rows):
                yield index, _parquet_row(batch.slice(offset, 1))
                index += 1


def _parquet_row(batch: pa.RecordBatch) -> object:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:  # a string column may hold any bytes
        return _Broken(f"is not UTF-8 (byte {error.start})", "")


def _dataset_rows(name: str, split: str) -> _Rows:
    import datasets  # slow to import, and needed for names alone

    try:
        table = datasets.load_dataset(name, split=split)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(f"{name}: no such file, and no data set of that name can be loaded: {error}") from error
    yield from enumerate(table)
