"""One stage on one GPU (bench/gpu.sh calls it): `check` runs the GPU tests, the others measure, and refuse on red.

`python -m bench.stage check | kernels | attention | step | headline --out FOLDER`. Each stage writes FOLDER/gpu-STAGE.json, a row
as soon as it is measured, and ends within its time; started again it goes on. A fresh FOLDER is seeded from
bench/results/, so that a machine that keeps nothing goes on too.

Exit status: 0 done, 1 red or one of ours failed, 2 refused, 3 time ran out (run the same stage again).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __main__ as bench
from . import results
from .table import CHECK

STAGES = {
    "kernels": ("linear_logprob", "linear_policy_loss", "policy_loss"),
    "attention": ("attention",),
    "step": ("step",),
    "headline": ("headline",),
}
REFUSED = 2
LIMIT_S = 540
BUDGET_S = 420
"""No case begins after this: the longest one, with its compilations, fits into what remains (the headline's longest, which
would not, comes first)."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="One stage on one GPU.", allow_abbrev=False)
    parser.add_argument("stage", choices=("check", *STAGES))
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--shapes", default="default")
    options = parser.parse_args(arguments)
    for name in ("check", *STAGES):
        seed(options.out / f"gpu-{name}.json")
    refusal = "" if options.stage == "check" else red(load_check(options.out), checked())
    if not refusal and not torch.cuda.is_available():
        refusal = "there is no CUDA device here"
    if refusal:
        print(f"bench/gpu.sh {options.stage}: refused: {refusal}", file=sys.stderr)
        return REFUSED
    if options.stage == "check":
        return check(options.out, results.conditions("cuda", options.commit))
    return run_ops(options)


def run_ops(options: argparse.Namespace) -> int:
    """The ops of a stage through the one runner."""
    path = options.out / f"gpu-{options.stage}.json"
    command = [*STAGES[options.stage], "--device", "cuda", "--out", str(path), "--budget", str(BUDGET_S)]
    command += ["--shapes", options.shapes, *(["--commit", options.commit] if options.commit else [])]
    return bench.main(command)


def seed(path: Path) -> None:
    """A file that isn't there begins as the one in bench/results/, if that has one."""
    known = results.FOLDER / path.name
    if known.exists() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(known, path)


def load_check(folder: Path) -> dict[str, Any] | None:
    path = folder / CHECK
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def checked() -> dict[str, Any]:
    """What a check is good for: these sources and tests, on this device with these packages."""
    now = results.conditions("cuda" if torch.cuda.is_available() else "cpu")
    tests = results.fingerprint(folders=("tests/kernels", "tests/engine"))
    return {**{name: now[name] for name in ("sources", "device", "torch", "triton")}, "tests": tests}


def red(record: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Why nothing may be measured, or ""."""
    if record is None:
        return "the GPU tests have not been run: bench/gpu.sh check"
    other = [f"{name} ({record.get(name)}, now {value})" for name, value in now.items() if record.get(name) != value]
    if other:
        return f"the GPU tests were run with other {', '.join(other)}: bench/gpu.sh check"
    if not record["green"]:
        return f"the GPU tests are red ({record['summary']}): a fast wrong kernel is not worth measuring"
    return ""


def check(folder: Path, conditions: Mapping[str, Any]) -> int:
    """Runs the tests marked gpu of kernels/, engine/ and this bench, and records green or red with the sources."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.xml"
        try:
            code = run_group(pytest_command(report), LIMIT_S - 30)
        except subprocess.TimeoutExpired:
            code = 124
        counts = count(report)
    record = verdict(code, counts) | {"seconds": round(time.monotonic() - started), **conditions, **checked()}
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{CHECK}.unfinished"
    aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, folder / CHECK)
    print(f"{'green' if record['green'] else 'red'}: {record['summary']}")
    return int(not record["green"])


def run_group(command: Sequence[str], seconds: float) -> int:
    """Exit status; past its time the command is killed with all it started, which would keep the GPU."""
    process = subprocess.Popen(command, cwd=results.ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def pytest_command(report: Path) -> list[str]:
    """Only files that hold a GPU test are collected, so that no other test's optional package is needed; markers are
    not strict, since they come from plugins that may be missing."""
    folders = (results.ROOT / "tests" / name for name in ("kernels", "engine", "bench"))
    found = (path for folder in folders for path in sorted(folder.rglob("test_*.py")))
    files = [str(path) for path in found if "mark.gpu" in path.read_text(encoding="utf-8")]
    options = ["-o", "addopts=-q -ra --import-mode=importlib", "-o", "minversion=8.0", "-p", "no:cacheprovider"]
    return [sys.executable, "-P", "-m", "pytest", *options, "-m", "gpu", f"--junit-xml={report}", *files]


def count(report: Path) -> dict[str, int]:
    """Passed, failed and skipped tests of a JUnit file; none if it was never written."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    if report.exists():
        for test in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in test}
            counts["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def verdict(code: int, counts: Mapping[str, int]) -> dict[str, Any]:
    """Green: pytest is content, and some test did run; a skipped one proves nothing."""
    green = code == 0 and counts["passed"] > 0 and counts["failed"] == 0
    told = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    return {"green": green, "summary": f"{told}, pytest's status {code}"}


if __name__ == "__main__":
    sys.exit(main())
