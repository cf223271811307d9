"""The run folder: recipe, metrics, every rollout, evaluations, pool and checkpoints; what is needed to resume or replay.

Files grow by whole lines. After a kill, whatever lies beyond the last good checkpoint is cut off and made again, and since
seeds are functions of the step it comes out the same.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..engine.checkpoint import UNFINISHED, write_atomically


@dataclass(frozen=True)
class RunConfig:
    """`save_every` steps a checkpoint is written (each stage's end writes one too); `threads` 0 leaves torch's own number."""

    seed: int = 0
    save_every: int = 25
    keep_checkpoints: int = 2
    threads: int = 0

    def __post_init__(self) -> None:
        if self.save_every < 1 or self.keep_checkpoints < 1:
            raise ValueError(
                f"run.save_every and run.keep_checkpoints must be at least 1, not {self.save_every} and {self.keep_checkpoints}"
            )
        if self.threads < 0:
            raise ValueError(f"run.threads must be 0 (torch's own number) or more, not {self.threads}")


def lock_folder(root: Path, work: str, option: str) -> IO[str]:
    """Makes the folder if need be and claims it until the file is closed; a kill frees it too.

    Raises:
        ValueError: another process has it, which is said in the words of `work` and of the `option` that names another.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = (root / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"another process is {work} in {root}: wait for it, or give another {option}") from None
    return lock


class RunFolder:
    """Paths and line files of one run. One run at a time: a second one is refused.

    Of a run's many ranks one writes: with `writes` False all that would change a file does nothing.
    """

    def __init__(self, root: Path, *, writes: bool = True) -> None:
        self.root, self.writes = root, writes
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def timeline_file(self) -> Path:
        return self.root / "timeline.jsonl"

    @property
    def unjudged_file(self) -> Path:
        """Completions of the step that the judge failed on."""
        return self.root / "unjudged.jsonl"

    def rollouts_file(self, stage: str, step: int) -> Path:
        return self.root / "rollouts" / stage / f"{step:06d}.jsonl"

    def eval_file(self, stage: str) -> Path:
        return self.root / "evals" / f"{stage}.json"

    def pool_file(self, stage: str) -> Path:
        return self.root / "pool" / f"{stage}.jsonl"

    def open(self, recipe_text: str) -> None:
        """Claims the folder for this recipe.

        Raises:
            ValueError: the folder belongs to another recipe, isn't a run folder, or another process is writing it.
        """
        if not self.writes:
            return
        kept = self.root / "recipe.toml"
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{self.root} is a file: give another --run-dir")
        ours = (".lock", f"{kept.name}{UNFINISHED}")  # a kill before the recipe was written leaves these
        if self.root.exists() and not kept.exists() and any(p.name not in ours for p in self.root.iterdir()):
            raise ValueError(f"{self.root} is not empty and not a run folder: give another --run-dir")
        self._lock = lock_folder(self.root, "training", "--run-dir")
        if kept.exists():
            before = kept.read_text(encoding="utf-8")
            if (difference := _difference(before, recipe_text)) is not None:
                raise ValueError(
                    f"{self.root} was begun with another recipe ({difference}): resume with that one, or give another --run-dir"
                )
            if before == recipe_text:
                return
        write_atomically(kept, recipe_text)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def rewind(self, step: int, unfinished: Collection[str]) -> None:
        """Cuts off metrics, time line, rollouts, evaluations and begun passes made after `step`, and the pools of `unfinished` phases."""
        if not self.writes:
            return
        for left in self.root.rglob(f"*{UNFINISHED}"):
            left.unlink()
        if self.metrics_file.exists():
            kept = [line for line in read_lines(self.metrics_file) if line["step"] <= step]
            write_atomically(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
        if self.timeline_file.exists():
            spans = [line for line in read_lines(self.timeline_file) if line["step"] <= step]
            write_atomically(self.timeline_file, "".join(json.dumps(line) + "\n" for line in spans))
        for path in (self.root / "rollouts").glob("phase*/*.jsonl"):
            if int(path.stem) > step:
                path.unlink()
        if self.unjudged_file.exists() and any(line["step"] != step + 1 for line in read_lines(self.unjudged_file)):
            self.unjudged_file.unlink()  # of other weights than those that the run goes on from
        for path in (self.root / "evals").glob("*.json"):
            if json.loads(path.read_text())["step"] > step:
                path.unlink()
        for path in (*self.root.glob("evals/*.batches.jsonl"), *self.root.glob("rollouts/difficulty-*.jsonl")):
            first = next(read_lines(path), None)
            if first is None or first["by"]["step"] > step:
                path.unlink()
        for name in unfinished:
            self.pool_file(name).unlink(missing_ok=True)

    def claim(self, what: str, value: str) -> None:
        """Raises ValueError if the run was begun with another `value` of `what`: its rollouts and pool would not fit."""
        if not self.writes:
            return
        kept = self.root / "data" / f"{what}.claim"
        if kept.exists() and kept.read_text(encoding="utf-8") != value:
            raise ValueError(
                f"the {what} is not what {self.root} was begun with: restore it, or give another --run-dir"
            )
        write_atomically(kept, value)

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
        }  # JSON has no NaN
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
            file.flush()
            os.fsync(file.fileno())  # not behind the checkpoint that may follow

    def add_timeline(self, kind: str, stage: str, step: int, watch: Stopwatch) -> None:
        """When each thing began and ended, in seconds after `at` (of the calendar's clock); a line lost to a kill is no harm."""
        if not self.writes:
            return
        spans = [[name, round(start - watch.start, 6), round(end - watch.start, 6)] for name, start, end in watch.spans]
        line = {"kind": kind, "stage": stage, "step": step, "at": watch.at, "spans": spans}
        with self.timeline_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write_lines(self, path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
        """A whole JSONL file or none."""
        self.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def write_text(self, path: Path, text: str) -> None:
        if self.writes:
            write_atomically(path, text)


class BatchLog:
    """Results of a long pass, batch by batch: finished batches are found again after a kill, a torn one is made anew.

    `made_by` says which weights made them (the step): batches of others are not taken. What is held is where each batch
    stands in the file, since completions of 10,000 tokens fill a memory soon.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        self.path = path
        self._made_by = dict(made_by)
        self._starts: dict[int, int] = {}
        self._torn = False
        if path.exists():
            self._scan()

    def _scan(self) -> None:
        start = 0
        with self.path.open("rb") as file:
            for raw in file:
                line = _parsed(raw)
                if line is not None and line["by"] == self._made_by:
                    self._starts[line["batch"]] = start
                start += len(raw)
                self._torn = not raw.endswith(b"\n")

    def get(self, batch: int) -> list[dict[str, Any]] | None:
        if batch not in self._starts:
            return None
        with self.path.open("rb") as file:
            file.seek(self._starts[batch])
            return json.loads(file.readline())["rows"]

    def add(self, batch: int, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"batch": batch, "by": self._made_by, "rows": rows}, ensure_ascii=False)
        with self.path.open("ab") as file:
            if self._torn:
                file.write(b"\n")
            self._starts[batch] = file.tell()
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self._torn = False


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a file that a kill may have torn: lines that don't parse are the torn ones."""
    with path.open("rb") as file:
        for raw in file:
            line = _parsed(raw)
            if line is not None:
                yield line


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(raw)
    except ValueError:  # also of bytes that are no UTF-8
        return None


_LAYOUT = ("[parallel]", "[generator]", "[generator.environment]")
"""Sections of a recipe that a run may be resumed without, or with others."""


def _difference(kept: str, text: str) -> str | None:
    """The first difference of two recipes; how a run is shared out over ranks and servers is none."""
    old, new = (set(_without_layout(recipe)) for recipe in (kept, text))
    there, here = sorted(old - new), sorted(new - old)
    return f"there: {there[0] if there else '-'}; here: {here[0] if here else '-'}" if there or here else None


def _without_layout(recipe: str) -> Iterator[str]:
    inside = False
    for line in recipe.splitlines():
        inside = line in _LAYOUT or (inside and not line.startswith("["))
        if line and not inside:
            yield line


class Span(NamedTuple):
    """When something began and ended, by `time.perf_counter`, which all threads share."""

    name: str
    start: float
    end: float


class Stopwatch:
    """Seconds by name, under verl's names: `timing_s/gen` and so on. `note` is told what has begun.

    `spans` say when; those that `timed` adds of other threads have no seconds of their own.
    """

    def __init__(self, note: Callable[[str], object] = lambda name: None) -> None:
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] = []
        self.note = note
        self.at, self.start = time.time(), time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.note(name)
        try:
            yield
        finally:
            end = time.perf_counter()
            self.add(f"timing_s/{name}", end - start)
            self.spans.append(Span(name, start, end))

    def timed(self, name: str, spans: Iterable[tuple[float, float]]) -> None:
        """What another thread has timed by `time.perf_counter`."""
        self.spans += [Span(name, start, end) for start, end in spans]

    def join(self, seconds: Mapping[str, float], spans: Iterable[Span]) -> None:
        """What another watch has counted."""
        for key, more in seconds.items():
            self.add(key, more)
        self.spans += spans

    def add(self, key: str, seconds: float) -> None:
        """To `key`, which is a metric's full name."""
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds
