"""Faults put into a kernel on purpose: each must turn its numeric cases red, or those prove less than they seem to.

A mutant is a copy of the whole kernels package in a temporary folder, one text of one file changed (Triton reads the
source of its functions from files), imported under a name of its own. The original is never touched.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from .case import Description, Mutant
from .numerics import run_cases

KERNELS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fate:
    """What became of one mutant. by: the case that caught it; share: its error in units of the allowed one."""

    label: str
    by: str
    share: float
    seconds: float
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems


def write(mutant: Mutant, package: Path) -> None:
    """Copies the kernels package to a folder, with the mutant's fault in it.

    Raises ValueError unless the text to replace stands exactly once in its file, and differs from its replacement.
    """
    text = (KERNELS / mutant.file).read_text(encoding="utf-8")
    count = text.count(mutant.old)
    if count != 1 or mutant.old == mutant.new:
        raise ValueError(
            f"mutant {mutant.label!r}: its text must stand once in {mutant.file} and be changed, but stands there "
            f"{count} times: {mutant.old!r}. Bring it up to date with the kernel"
        )
    shutil.copytree(KERNELS, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / mutant.file).write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def _run(name: str, mutant: Mutant, package: Path) -> Fate:
    start = time.perf_counter()
    write(mutant, package)
    importlib.invalidate_caches()
    description = cast(Description, importlib.import_module(f"{package.name}.{Path(__file__).parent.name}.{name}"))
    for outcome in run_cases(description):
        if not outcome.ok:
            case = f"{outcome.label} {outcome.dtype} {outcome.worst}"
            return Fate(mutant.label, case, outcome.share, time.perf_counter() - start, [])
    return Fate(mutant.label, "", 0.0, time.perf_counter() - start, ["no numeric case caught it"])


def run_mutants(name: str, description: Description) -> Iterator[Fate]:
    """Every mutant of an op, until its first red case each. An error other than a wrong number is raised, not caught."""
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        try:
            for index, mutant in enumerate(description.MUTANTS):
                yield _run(name, mutant, Path(folder) / f"longreach_mutant_{index}")
        finally:
            sys.path.remove(folder)
