"""Verdicts on disk, so that nothing is asked twice: JSON lines that several processes may append to at once.

A line is written whole under a lock of the file, so a kill tears at most the last one, and the next line starts afresh. What
can't be read, or doesn't carry its own checksum, is left out and told of: a flipped digit would be a wrong label.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from .judge_task import Chat

V = TypeVar("V")


def cache_key(version: int | str, model: str, messages: Chat) -> str:
    """Of everything that a verdict hangs on: the task's version, model, and the prompt with all that is asked about."""
    return hashlib.sha256(json.dumps([version, model, messages]).encode()).hexdigest()


def is_verdict(value: Any) -> bool:
    """What a cache of plain verdicts may hold."""
    return isinstance(value, float) and value in (0.0, 1.0)


class VerdictCache(Generic[V]):
    """Verdicts by key; in memory alone where `path` is None. ValueError: the file can't be opened.

    A verdict is whatever JSON gives back equal and `valid` accepts.
    """

    def __init__(
        self, path: Path | None, warn: Callable[[str], object], valid: Callable[[Any], bool] = is_verdict
    ) -> None:
        self.path, self._warn, self._valid = path, warn, valid
        self._verdicts: dict[str, V] = {}
        self._read = 0
        self._full = False
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                self.refresh()
            except OSError as error:
                raise ValueError(
                    f"judge cache {path} can't be used ({error}): name a file that can be written"
                ) from None

    def get(self, key: str) -> V | None:
        return self._verdicts.get(key)

    def put(self, key: str, verdict: V) -> None:
        """Kept in memory even where the disk is full: the run goes on, and is told once."""
        self._verdicts[key] = verdict
        if self.path is None:
            return
        line = json.dumps({"key": key, "verdict": verdict, "check": _check(key, verdict)}) + "\n"
        try:
            with self.path.open("a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, and by a kill
                file.write((b"" if _ends_whole(file) else b"\n") + line.encode())
        except OSError as error:
            if not self._full:
                self._warn(f"judge cache {self.path}: {error}; verdicts are kept in memory only")
            self._full = True

    def refresh(self) -> None:
        """Takes in what stands in the file by now: other processes may have written to it."""
        if self.path is None:
            return
        bad = 0
        with self.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_size < self._read:  # somebody emptied it
                self._read = 0
            file.seek(self._read)
            for line in file:
                entry = self._entry(line)
                if entry is not None:
                    self._verdicts[entry[0]] = entry[1]
                bad += entry is None and bool(line.strip())
            self._read = file.tell()
        if bad:
            self._warn(
                f"judge cache {self.path}: {bad} unreadable line(s) left out, their answers will be asked for anew"
            )

    def _entry(self, line: bytes) -> tuple[str, V] | None:
        try:
            found: Any = json.loads(line)
        except (ValueError, RecursionError):  # torn, cut within a character, or never JSON
            return None
        if not isinstance(found, dict):
            return None
        key = found.get("key")
        verdict: Any = found.get("verdict")
        if not isinstance(key, str) or not self._valid(verdict):
            return None
        return (key, verdict) if found.get("check") == _check(key, verdict) else None


def _check(key: str, verdict: Any) -> str:
    return hashlib.sha256(f"{key} {verdict}".encode()).hexdigest()[:8]


def _ends_whole(file: IO[bytes]) -> bool:
    end = file.seek(0, os.SEEK_END)
    if not end:
        return True
    file.seek(end - 1)
    return file.read(1) == b"\n"
