"""Rows of results: one JSON file, a row a line, each written as it is measured.

A row is identified by what was measured (op, dims, dtype, pass, contender), where (device, threads) and on which sources:
a hash of kernels/ and engine/, since a commit alone would call an edited kernel measured. A row of the same thing from
other sources is replaced; git keeps the old one. Two programs must not write into one file at a time.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .peers import version

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench" / "results"
PLACE = ("op", "dims", "dtype", "pass", "contender", "device", "threads")

MEMORY = "memory-"
"""Begins the names of `longest`'s files."""

CRASHED = "failed: AcceleratorError"

Row = dict[str, Any]


def identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row is about, whatever sources it was measured on."""
    return tuple(json.dumps(row[name], sort_keys=True) for name in PLACE)


def load(path: Path) -> list[Row]:
    """Rows of a file, none if it isn't there; ValueError if it is something else."""
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of bench rows ({error}): name another, or remove it") from error


def append(path: Path, row: Row) -> None:
    """Adds a row in place of an older one of the same thing; the file is whole at any moment."""
    kept = [old for old in load(path) if identity(old) != identity(row)]
    lines = ",\n".join(json.dumps(item) for item in [*kept, row])
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.unfinished")
    aside.write_text(f'{{"rows": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(aside, path)


def measured(rows: Iterable[Row], sources: str) -> set[tuple[str, ...]]:
    """Identities that need no second run on these sources. Gaps are tried again, but for those that took the device down:
    the run that follows must get past them."""
    same = (row for row in rows if row["sources"] == sources)
    return {identity(row) for row in same if row["status"] == "measured" or row["reason"].startswith(CRASHED)}


def fingerprint(root: Path = ROOT, folders: Sequence[str] = ("kernels", "engine")) -> str:
    """Of every Python file in the folders: 12 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit(root: Path = ROOT) -> str:
    """HEAD, with "+" where the tree differs from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "kernels", "engine"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    if head.returncode != 0:
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def device_name(device: str) -> str:
    """`NVIDIA H200`, or the processor with its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def driver(device: str) -> str | None:
    """Version of the NVIDIA driver, as nvidia-smi says it."""
    if device != "cuda":
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def conditions(device: str, given_commit: str | None = None) -> Row:
    """What every row says about its run."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "driver": driver(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": given_commit or commit(),
        "sources": fingerprint(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
    }
