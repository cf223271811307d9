"""Reading data sets: JSONL, JSON, parquet, folders, globs and zip archives of them, or a name on the hub (`hub.py`).

Every row becomes an `Example` (`rows.py`) or a `BadRow`; none vanishes. Bad rows end in one report of all of them, or,
on request, are written aside and counted. Files are streamed row by row, so that memory is the examples' own; a `.json`
array is the exception and is parsed whole. Ids must be unique in a source: difficulty, pool and rollouts go by them.
Other layouts than those of `rows.py` come as a `Parse` function, which may make several examples of one row.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .hub import HubName, download, hub_name, table_rows
from .rows import Example, LeftOut, Needs, RowError, WrongForm, parse_row

__all__ = ["BadRow", "DataConfig", "Example", "Parse", "ReadResult", "read_examples"]

_SUFFIXES = (".jsonl", ".json", ".parquet")
_SHOWN = 20

Parse = Callable[[object, str, str], Iterable[Example | RowError]]
"""(row, default id, default benchmark) -> its examples, and an error for each part of it that is none."""


@dataclass(frozen=True)
class DataConfig:
    """What to learn from. train, eval: files, folders, archives, globs or names on the hub (`hub.py`).

    split, eval_split: of a name on the hub that states none, and of a folder that names its files by split. limit: first rows of train.
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
    """examples in file and row order; bad is empty unless bad rows were skipped; files in the order read.

    left_out: rows that the data set's own rules exclude. warnings: sentences for whoever reads the results.
    """

    examples: list[Example]
    bad: list[BadRow]
    files: list[str]
    left_out: list[BadRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


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
    parse: Parse | None = None,
    stems: Sequence[str] = (),
) -> ReadResult:
    """Read a source whole, or its first `limit` good rows.

    A row without id gets "<file stem>-<row index>" (index from 0), one without benchmark its file's stem. In a folder
    whose file names carry splits (train-00000.parquet) only those of `split` are read. needs: what each row must have.
    set_aside: where skipped rows go, as JSONL of file, row, field, reason and the row; written anew.
    parse: how rows become examples, `rows.parse_row` unless given. stems: of a folder or archive with files for several
    data sets, the names of the one meant ("hotpotqa" takes hotpotqa.jsonl, else hotpotqa_dev.jsonl).
    Raises ValueError for a source that is not there or opens with a row in no known form, and with one report for all
    bad rows, unless they are skipped.
    """
    examples: list[Example] = []
    bad: list[BadRow] = []
    left_out: list[BadRow] = []
    seen: dict[str, str] = {}
    tables = _open(source, split, stems)
    parse = parse or _parse_one(needs)
    with ExitStack() as stack:
        aside = None
        if skip_bad_rows and set_aside is not None:
            set_aside.parent.mkdir(parents=True, exist_ok=True)
            aside = stack.enter_context(set_aside.open("w", encoding="utf-8"))
        for file, index, row, item in _items(tables, parse):
            if limit is not None and len(examples) >= limit:
                break
            if isinstance(item, Example) and item.id in seen:
                item = RowError("id", f"{item.id!r} is already that of {seen[item.id]}")
            if isinstance(item, Example):
                seen[item.id] = f"{file}, row {index + 1}"
                examples.append(item)
                continue
            entry = BadRow(file, index + 1, item.column, item.reason)
            if isinstance(item, WrongForm) and not (skip_bad_rows or examples or bad or left_out):
                raise ValueError(str(entry))
            (left_out if isinstance(item, LeftOut) else bad).append(entry)
            if aside is not None and not isinstance(item, LeftOut):
                aside.write(_aside_line(entry, row))
    if bad and not skip_bad_rows:
        raise ValueError(_report(bad, len(examples)))
    if not examples:
        why = (bad or left_out or ["the source is empty"])[0]
        raise ValueError(f"{source}: no usable row ({len(bad)} bad ones, {len(left_out)} left out); {why}")
    return ReadResult(examples, bad, [file for file, _, _ in tables], left_out)


def _parse_one(needs: Needs) -> Parse:
    def parse(row: object, default_id: str, benchmark: str) -> Iterator[Example]:
        yield parse_row(row, default_id=default_id, default_benchmark=benchmark, needs=needs)

    return parse


def _items(tables: list[_Table], parse: Parse) -> Iterator[tuple[str, int, object, Example | RowError]]:
    """(file, row index, row, example or error) of everything in the tables; a row that fails whole is one error."""
    for file, label, rows in tables:
        for index, row in rows:
            try:
                if isinstance(row, _Broken):
                    raise RowError("row", row.reason)
                for item in parse(row, f"{label}-{index}", label):
                    yield file, index, row, item
            except RowError as error:
                yield file, index, row, error


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
_Table = tuple[str, str, _Rows]
_File = Path | zipfile.Path


def _open(source: str | Path, split: str, stems: Sequence[str]) -> list[_Table]:
    """(file, label, rows) of each file of a source."""
    path, name = Path(source).expanduser(), _hub_name(source)
    if name is not None and name.file is None:
        return [(str(source), name.repository.rpartition("/")[2], table_rows(name, split))]
    if name is not None:
        path = download(name, _SUFFIXES)
    files = _files(path, split, stems)
    labels = [file.stem for file in files]
    if len(set(labels)) < len(labels):
        # Files of one stem in several folders: the path tells their rows apart.
        root = os.path.commonpath([str(file.parent) for file in files])
        labels = [os.path.relpath(str(file), root) for file in files]
    readers = {".parquet": _parquet_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
    return [(str(file), label, readers[file.suffix](file)) for file, label in zip(files, labels, strict=True)]


def _hub_name(source: str | Path) -> HubName | None:
    """The name on the hub that a source is; None if it is a path, there or missing."""
    path, name = Path(source).expanduser(), hub_name(str(source))
    if name is None or path.exists():
        return None
    if name.config or name.file or name.split:
        return name
    local = path.suffix in (*_SUFFIXES, ".zip") or len(path.parts) > 2
    return None if local else name


def _files(path: Path, split: str, stems: Sequence[str]) -> list[_File]:
    """The files that a path means."""
    if path.suffix == ".zip" and path.is_file():
        return _among(path, _members(path), split, stems)
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(
                f"{path}: cannot read {path.suffix or 'a file without suffix'}; give {', '.join(_SUFFIXES)} or .zip"
            )
        return [path]
    if path.is_dir():
        files: list[_File] = [*sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())]
        return _among(path, files, split, stems)
    if glob.has_magic(str(path)):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).suffix in _SUFFIXES]
        if not found:
            raise ValueError(f"{path}: no file matches{_nearest(path)}")
        return [*found]
    raise ValueError(f"{path}: no such file{_nearest(path)}")


def _members(archive: Path) -> list[_File]:
    try:
        names = sorted(zipfile.ZipFile(archive).namelist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive}: not a zip archive ({error})") from error
    members = [zipfile.Path(archive, name) for name in names if not name.startswith(("__MACOSX", "."))]
    return [member for member in members if member.suffix in _SUFFIXES]


def _among(path: Path, files: list[_File], split: str, stems: Sequence[str]) -> list[_File]:
    """Of the files of a folder or archive those that are meant."""
    if not files:
        raise ValueError(f"{path}: no {', '.join(_SUFFIXES)} file in it")
    own = [file for file in files if file.stem in stems]
    own = own or [
        file for file in files if file.stem.startswith(tuple(stem + mark for stem in stems for mark in "-_."))
    ]
    named = [file for file in own or files if split in re.split(r"[-_.]", file.stem)]
    if stems and not own and not named and len(files) > 1:
        has = ", ".join(sorted({file.stem for file in files})[:_SHOWN])
        raise ValueError(f"{path}: no file of the name {' or '.join(stems)} among {has}; give the file itself")
    return named or own or files


def _nearest(path: Path) -> str:
    """A hint: the existing file most like a missing one."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = {file.name: file for file in folder.iterdir() if file.suffix in _SUFFIXES or file.is_dir()}
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.3)
    return f"; the nearest name there is {names[close[0]]!r}" if close else f"; {folder} holds nothing like it"


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


def _jsonl_rows(path: _File) -> _Rows:
    with path.open("rb") as file:
        for index, line in enumerate(file):
            line = line.removeprefix(b"\xef\xbb\xbf") if index == 0 else line
            if line.strip():
                yield index, _decode(line)


def _json_rows(path: _File) -> _Rows:
    """A JSON array of rows. A file that opens with an object is JSON Lines, or one object: a row by itself."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"[") and not _one_object(path):
        yield from _jsonl_rows(path)
        return
    rows = _decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    yield from enumerate(rows if isinstance(rows, list) else [rows])


def _one_object(path: _File) -> bool:
    """Whether the first line opens an object and doesn't end it, so that the object is spread over lines."""
    with path.open("rb") as file:
        line = next((line for line in file if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").strip()
    return line.startswith(b"{") and (line == b"{" or line.endswith((b"{", b"[", b",")))


def _parquet_rows(path: _File) -> _Rows:
    try:
        parquet = pq.ParquetFile(path if isinstance(path, Path) else path.open("rb"))
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
