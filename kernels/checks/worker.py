"""One part of a check in a process of its own: TRITON_INTERPRET counts when Triton is imported, and not afterwards.

`python -m longreach.kernels.checks.worker PART NAME --into FILE [--arch 90 ...]` appends one JSON object a row to FILE;
`Job` runs that with the environment that the part needs, whatever the caller's is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from . import load
from .compilation import Row, compile_cases
from .mutation import Fate, run_mutants
from .numerics import Outcome, run_cases

ROWS = {"numerics": Outcome, "compile": Row, "mutants": Fate}
INTERPRETED = frozenset({"numerics", "mutants"})


class Job:
    """One part in a process of its own."""

    def __init__(self, part: str, architectures: tuple[int, ...] = ()) -> None:
        self.part, self.architectures, self.into = part, architectures, Path()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, name: str, into: Path, environ: Mapping[str, str] = os.environ) -> None:
        """Writes rows to `into`. environ is what the process inherits; what it prints goes where ours goes."""
        # one thread: jobs run side by side, and on tiny tensors threads cost more than they bring
        env = {**environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if self.part in INTERPRETED else "0"}
        command = [sys.executable, "-m", __name__, self.part, name, "--into", str(into)]
        self.into = into
        self.process = subprocess.Popen([*command, "--arch", *map(str, self.architectures)], env=env)

    def wait(self) -> int:
        """Its exit code."""
        assert self.process is not None
        return self.process.wait()

    def stop(self) -> None:
        """Ends it if it is running."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def read(part: str, path: Path) -> list[Outcome] | list[Row] | list[Fate]:
    """The rows that a part has written so far."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [ROWS[part](**json.loads(line)) for line in lines]


def _rows(part: str, name: str, architectures: tuple[int, ...]) -> Iterator[Outcome | Row | Fate]:
    description = load(name)
    if part == "numerics":
        yield from run_cases(description)
    elif part == "mutants":
        yield from run_mutants(name, description)
    else:
        yield from compile_cases(description, architectures)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m longreach.kernels.checks.worker")
    parser.add_argument("part", choices=sorted(ROWS))
    parser.add_argument("name")
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--arch", type=int, nargs="*", default=[])
    given = parser.parse_args()
    with given.into.open("a", encoding="utf-8") as file:
        for row in _rows(given.part, given.name, tuple(given.arch)):
            print(json.dumps(asdict(row)), file=file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
