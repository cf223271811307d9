"""The folder of one evaluation: its conditions, every response as it ended, and what came of them.

    conditions.json    what was asked of which model, and how it is scored: written first, and compared on each return
    responses.jsonl    one line a response, appended and synced as it ends; a line that a kill tore is asked for again
    verdicts.jsonl     the judge's verdicts (rl/judge_cache.py)
    results.json, report.md, report.html    made anew from the lines at the end

A response that failed in a way that may pass (timeouts, lost connections, 5xx) is asked for again by the same command;
one that the server refuses is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ...engine.checkpoint import UNFINISHED, write_atomically
from ..run import lock_folder, read_lines
from .questions import Key

SCORED = "scored"
"""The part of the conditions that rescoring may change: no response hangs on it."""


@dataclass(frozen=True)
class Response:
    """Sample number `sample` of a question. `failed`: why there is none, and then `again` says whether that may pass."""

    benchmark: str
    id: str
    sample: int
    text: str = ""
    finish_reason: str = ""
    tokens: int | None = None
    failed: str | None = None
    again: bool = False

    @property
    def key(self) -> Key:
        return self.benchmark, self.id

    @staticmethod
    def load(line: Mapping[str, Any]) -> Response | None:
        """None for a line of another shape."""
        try:
            made = Response(**line)
        except TypeError:
            return None
        kinds = {"benchmark": str, "id": str, "sample": int, "text": str, "finish_reason": str, "again": bool}
        told = made.failed is None or isinstance(made.failed, str)
        return made if told and all(isinstance(getattr(made, k), kind) for k, kind in kinds.items()) else None


class ResultsFolder:
    """One evaluation at a time: a second process is refused."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: IO[str] | None = None
        self._file: IO[bytes] | None = None

    @property
    def conditions_file(self) -> Path:
        return self.root / "conditions.json"

    @property
    def responses_file(self) -> Path:
        return self.root / "responses.jsonl"

    @property
    def results_file(self) -> Path:
        return self.root / "results.json"

    def open(self, conditions: Mapping[str, Any], *, rescore: bool = False) -> None:
        """Claims the folder for these conditions; with `rescore` those of scoring may differ from the ones there.

        Raises:
            ValueError: other conditions, not a results folder, or another process is writing it.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{self.root} is a file: give another --out")
        ours = (".lock", f"{self.conditions_file.name}{UNFINISHED}", "verdicts.jsonl")
        if self.root.exists() and not self.conditions_file.exists():
            strange = sorted(path.name for path in self.root.iterdir() if path.name not in ours)
            if strange:
                raise ValueError(f"{self.root} holds {strange[0]} and is no results folder: give another --out")
        self._lock = lock_folder(self.root, "evaluating", "--out")
        given = json.loads(json.dumps(conditions))
        if self.conditions_file.exists():
            _refuse_other(self.root, json.loads(self.conditions_file.read_text(encoding="utf-8")), given, rescore)
        write_atomically(self.conditions_file, json.dumps(given, indent=1) + "\n")

    def close(self) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()
        self._file = self._lock = None

    def add(self, response: Response) -> None:
        """On disk when this returns."""
        if self._file is None:
            self._file = self.responses_file.open("ab+")
            end = self._file.seek(0, os.SEEK_END)
            if end:
                self._file.seek(end - 1)
                if self._file.read(1) != b"\n":  # torn by a kill
                    self._file.write(b"\n")
        line = json.dumps(dict(vars(response)), ensure_ascii=False)
        self._file.write(f"{line}\n".encode(errors="backslashreplace"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def responses(self) -> dict[tuple[str, str, int], Response]:
        """By benchmark, id and sample: the answer where there is one, else the last failure."""
        found: dict[tuple[str, str, int], Response] = {}
        for line in read_lines(self.responses_file) if self.responses_file.exists() else ():
            made = Response.load(line) if isinstance(line, dict) else None
            if made is not None:
                place = (made.benchmark, made.id, made.sample)
                if place not in found or found[place].failed is not None:
                    found[place] = made
        return found

    def write(self, name: str, text: str) -> Path:
        write_atomically(self.root / name, text)
        return self.root / name


def read_results(root: Path) -> dict[str, Any]:
    """The results.json of a finished evaluation. ValueError: there is none that can be read."""
    path = root / "results.json"
    if not path.is_file():
        raise ValueError(
            f"{root} holds no results.json: give the --out folder of a finished `longreach eval --model ...`"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"conditions", "benchmarks", "questions"} <= set(found):
        raise ValueError(f"{path} is no results file of this program: evaluate again")
    return found


def differences(there: Any, here: Any, where: str = "") -> Iterator[str]:
    """What differs between two nested conditions, as `asked.samples: there 1, here 4`."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in dict.fromkeys((*there, *here)):
            yield from differences(there.get(name), here.get(name), f"{where}.{name}" if where else str(name))
    elif there != here:
        yield f"{where}: there {_shown(there)}, here {_shown(here)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_other(root: Path, there: Mapping[str, Any], here: Mapping[str, Any], rescore: bool) -> None:
    found: Iterable[str] = differences(there, here)
    if rescore:
        found = (text for text in found if not text.startswith(f"{SCORED}."))
    told = list(found)
    if not told:
        return
    way = "give another --out, or the conditions that it was begun with"
    if all(text.startswith(f"{SCORED}.") for text in told):
        way = "add --rescore to count its responses anew under these, or give another --out"
    raise ValueError(f"{root} was begun under other conditions ({'; '.join(told[:5])}): {way}")
