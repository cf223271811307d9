"""Is B slower than A? Paired ratios of two files of rows, with bootstrap intervals, and a verdict.

Rows pair by what was measured: op, dims, dtype, pass, contender. Contenders took turns, so each round of ours is first
divided by the geometric mean of the same round of the peers that both files have in the same version: what moved them
too was the machine. On a shared one that is most of it (all contenders 0.3 or 1.7 times as slow an hour later was seen).

    ratio = median of B's relative rounds / median of A's;  95 % interval: percentile bootstrap over rounds

A regression is a row of ours whose whole interval lies above 1 + threshold, or whose peak memory grew by more than the
threshold, or whose error against fp64 more than doubled, or that was measured in A and is a gap in B. Peers are shown and
never judged. Rows that only one file has are named. Where other work shares the machine, two runs of the same sources
differed by up to 15 %: take a threshold to match there, and the default of 5 % on a GPU of one's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import results, table
from .results import Row

THRESHOLD = 0.05
DRAWS = 2000
PAIRED_BY = ("op", "dims", "dtype", "pass", "contender")
ERROR_FACTOR, ERROR_FLOOR = 2.0, 1e-12


@dataclass(frozen=True)
class Pair:
    """One thing measured in both files; `faults` is empty unless it is a regression."""

    a: Row
    b: Row
    ratio: float
    low: float
    high: float
    machine: float | None
    """B / A of the peers that time was measured against; None: there was none, and the ratio is of plain times."""
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Pairs, and the names of rows that only one file has."""

    pairs: list[Pair]
    only_a: list[str]
    only_b: list[str]
    lost: list[str]
    """Ours, measured in A, a gap in B."""

    @property
    def regressed(self) -> bool:
        return bool(self.lost) or any(pair.faults for pair in self.pairs)


def name(row: Mapping[str, Any]) -> str:
    dims = " ".join(f"{key}={value}" for key, value in row["dims"].items())
    return f"{row['op']} {dims} {row['dtype']} {row['pass']}: {row['contender']}"


def key(row: Mapping[str, Any]) -> str:
    return json.dumps([row[part] for part in PAIRED_BY], sort_keys=True)


def interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap of median(b) / median(a); the draws are seeded, so a verdict is repeatable."""
    draw = np.random.default_rng(0)
    medians = [np.median(draw.choice(x, (DRAWS, len(x))), axis=1) for x in (a, b)]
    low, high = np.quantile(medians[1] / medians[0], (0.025, 0.975))
    return float(low), float(high)


def anchor(row: Row, other: Row, peers: Sequence[tuple[Row, Row]]) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Seconds of each round, in either file, of the peers that stood beside this row there: their geometric mean."""
    beside = [
        (p, q)
        for p, q in peers
        if _case(p) == _case(row)
        and all(p.get(name) == q.get(name) for name in ("torch", "version"))
        and len(p["samples_s"]) == len(row["samples_s"])
        and len(q["samples_s"]) == len(other["samples_s"])
    ]
    if not row["ours"] or not beside:
        return None, None
    first, second = (np.exp(np.log([pair[side]["samples_s"] for pair in beside]).mean(0)) for side in (0, 1))
    return first, second


def _case(row: Mapping[str, Any]) -> str:
    return json.dumps([row[part] for part in PAIRED_BY if part != "contender"], sort_keys=True)


def compare(a: Sequence[Row], b: Sequence[Row], threshold: float = THRESHOLD) -> Comparison:
    """Pairs and verdicts; ValueError where nothing pairs."""
    rows_a, rows_b = ({key(row): row for row in rows} for rows in (a, b))
    both = [(row, rows_b[label]) for label, row in rows_a.items() if label in rows_b]
    peers = [(p, q) for p, q in both if not p["ours"] and p["status"] == q["status"] == "measured"]
    pairs, only_a, lost = [], [], []
    for label, row in rows_a.items():
        other = rows_b.get(label)
        if row["status"] == "gap":
            continue
        if other is None:
            only_a.append(name(row))
        elif other["status"] == "measured":
            pairs.append(pair(row, other, peers, threshold))
        elif row["ours"]:
            lost.append(f"{name(row)} ({other['reason']})")
        else:
            only_a.append(name(row))
    held = {label for label, row in rows_a.items() if row["status"] == "measured"}
    only_b = [name(row) for label, row in rows_b.items() if row["status"] == "measured" and label not in held]
    if not pairs and not lost:
        raise ValueError("the two files have no measured row in common: nothing can be compared")
    return Comparison(pairs, only_a, only_b, lost)


def pair(a: Row, b: Row, peers: Sequence[tuple[Row, Row]], threshold: float) -> Pair:
    times_a, times_b = np.asarray(a["samples_s"]), np.asarray(b["samples_s"])
    machine, (anchor_a, anchor_b) = None, anchor(a, b, peers)
    if anchor_a is not None and anchor_b is not None:
        machine = float(np.median(anchor_b) / np.median(anchor_a))
        times_a, times_b = times_a / anchor_a, times_b / anchor_b
    ratio = float(np.median(times_b) / np.median(times_a))
    low, high = interval(times_a, times_b)
    faults = []
    if a["ours"]:
        if low > 1 + threshold:
            faults.append("slower")
        if b["peak_mib"] > (1 + threshold) * a["peak_mib"]:
            faults.append(f"memory {a['peak_mib']:.1f} -> {b['peak_mib']:.1f} MiB")
        for label, before, after in errors(a, b):
            if after > ERROR_FACTOR * before + ERROR_FLOOR or after != after:
                faults.append(f"{label} {before:.1e} -> {after:.1e}")
    return Pair(a, b, ratio, low, high, machine, tuple(faults))


def errors(a: Row, b: Row) -> list[tuple[str, float, float]]:
    """(name, before, after) of the errors that both rows tell."""
    found = [("value error", a["value_error"], b["value_error"])] if {"value_error"} <= a.keys() & b.keys() else []
    before, after = a.get("gradient_errors", {}), b.get("gradient_errors", {})
    return found + [(f"{label} error", before[label], after[label]) for label in before if label in after]


def main(path_a: Path, path_b: Path, *, threshold: float) -> int:
    """Prints the comparison; 1 on a regression."""
    for path in (path_a, path_b):
        if not path.exists():
            raise ValueError(f"there is no file {path}")
    found = compare(results.load(path_a), results.load(path_b), threshold)
    header = ["what", "B / A", "95 %", "peers' B / A", "verdict"]
    lines = [
        [name(p.a), f"{p.ratio:.3f}", f"{p.low:.3f} to {p.high:.3f}", "" if p.machine is None else f"{p.machine:.3f}",
         "; ".join(p.faults) or ("" if p.a["ours"] else "peer, not judged")]
        for p in found.pairs
    ]  # fmt: skip
    table.print_table(f"B = {path_b} against A = {path_a}, threshold {threshold:.0%}", header, lines)
    for title, names in (("only in A", found.only_a), ("only in B", found.only_b), ("lost: a gap in B", found.lost)):
        for item in names:
            print(f"{title}: {item}")
    devices = {str(p.a["device"]) for p in found.pairs} ^ {str(p.b["device"]) for p in found.pairs}
    if devices:
        print(f"the files come from different devices: {', '.join(sorted(devices))}")
    count = sum(bool(p.faults) for p in found.pairs) + len(found.lost)
    print(f"{count} regressions" if found.regressed else "no regression")
    return int(found.regressed)
