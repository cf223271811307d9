"""Rows as tables: on the terminal (rich where it is installed), and as Markdown between two markers of README.md.

`python -m bench.table README.md --write` brings README's section up to date with bench/results/; without `--write` it
fails where the section isn't current.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import published, results
from .results import Row

BEGIN, END = "<!-- bench: made by `make bench-table` -->", "<!-- end of bench -->"
README_OPS = ("linear_logprob", "linear_policy_loss", "step")
HEADER = ("contender", "forward ms", "backward ms", "both ms", "roofline", "MiB", "value err", "grad err")
EXPLAINED = (
    "Median ± interquartile range. Share of the roofline and peak memory beyond inputs are of `both`, forward and backward "
    "(of the only pass where there is one). Value err: largest error of a log-prob or output, of the loss where a peer gives "
    "no more. Grad err: relative error (Frobenius) of the worst gradient. Both against fp64."
)
CHECK = "gpu-check.json"
WIDE = 130
"""Columns where nobody says how wide the output is."""


@dataclass(frozen=True)
class Section:
    """One case: a line per contender, and what must be said beneath it."""

    title: str
    lines: list[list[str]]
    notes: list[str]


def sections(rows: Iterable[Row]) -> list[Section]:
    """One per device, op, dims and dtype, in the order of the rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        about = [row[name] for name in ("device", "threads", "op", "dims", "dtype")]
        groups.setdefault(json.dumps(about, sort_keys=True), []).append(row)
    return [_section(group) for group in groups.values()]


def _section(rows: Sequence[Row]) -> Section:
    first = rows[0]
    dims = " ".join(f"{name}={value}" for name, value in first["dims"].items())
    by_contender: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_contender.setdefault(row["contender"], {})[row["pass"]] = row
    done = {name: {p: r for p, r in passes.items() if r["status"] == "measured"} for name, passes in by_contender.items()}  # fmt: skip
    lines = [_line(name, passes) for name, passes in done.items() if passes]
    lines += [
        [f"{figure.peer} (published, {figure.source})", "", "", f"{figure.ms:.1f}", "", "", "", ""]
        for figure in published.beside(first)
    ]
    return Section(f"{first['op']}, {dims}, {first['dtype']}", lines, _notes(rows))


def _line(name: str, passes: Mapping[str, Row]) -> list[str]:
    whole = passes.get("both") or next(iter(passes.values()))
    return [
        name,
        *(_time(passes.get(step)) for step in ("forward", "backward", "both")),
        f"{100 * whole['roofline_share']:.0f} %",
        f"{whole['peak_mib']:.1f}",
        _value_error(passes.values()),
        _gradient_error(whole),
    ]


def _time(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    median, iqr = 1e3 * row["median_s"], 1e3 * row["iqr_s"]
    digits = 3 if median < 1 else 2 if median < 100 else 0
    return f"{median:.{digits}f} ± {iqr:.{digits}f}"


def _value_error(passes: Iterable[Mapping[str, Any]]) -> str:
    return next((f"{row['value_error']:.1e}" for row in passes if "value_error" in row), "")


def _gradient_error(row: Mapping[str, Any]) -> str:
    found = row.get("gradient_errors")
    return f"{max(found.values()):.1e}" if found else ""


def _notes(rows: Sequence[Row]) -> list[str]:
    return [*_conditions(rows), *_gaps(rows)]


def _conditions(rows: Sequence[Row], ceilings: bool = True) -> list[str]:
    """Where, with what and when the rows of one device were measured; nothing where none was."""
    measured = [row for row in rows if row["status"] == "measured"]
    if not measured:
        return []
    row = measured[-1]
    threads = f", {row['threads']} thread{'s' * (row['threads'] != 1)}" if row["threads"] else ""
    where = row["device"] + (threads or f", driver {row['driver']}")
    own = {f"torch {r['torch']}": None for r in measured} | {f"triton {r['triton']}": None for r in measured}
    peers = sorted({f"{r['package']} {r['version']}" for r in measured if r.get("version")})
    told = [where, ", ".join([*own, *peers])]
    if ceilings:
        told.append(
            f"ceilings {row['ceiling_tflops']:.3g} TFLOP/s and {row['ceiling_gbs']:.3g} GB/s, measured in the run"
        )
    told += ["commit " + ", ".join(sorted({str(r["commit"]) for r in measured})), f"{row['date']} UTC"]
    return ["; ".join(told) + "."]


def _gaps(rows: Sequence[Row]) -> list[str]:
    """Contenders by the reason why they weren't measured."""
    gaps: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["status"] == "gap":
            gaps.setdefault(row["reason"], {})[f"{row['contender']}"] = None
    return [f"Not measured: {'; '.join(names)}: {reason.rstrip('.')}." for reason, names in gaps.items()]


def show(rows: Iterable[Row]) -> None:
    """Prints every section."""
    for section in sections(rows):
        print_table(section.title, HEADER, section.lines)
        for note in section.notes:
            print(note)
        print()
    print(EXPLAINED)


def print_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """With rich where it is installed, else as aligned columns."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _plain(title, header, lines, print)
        return
    drawn = Table(title=title, title_justify="left")
    for i, column in enumerate(header):
        drawn.add_column(column, justify="right" if i else "left", no_wrap=bool(i))
    for line in lines:
        drawn.add_row(*line)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    console.print(drawn)


def _plain(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], say: Callable[[str], None]) -> None:
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    say(title)
    for line in [header, *lines]:
        say("  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))))  # fmt: skip


def markdown(rows: Iterable[Row]) -> str:
    """README's section, markers included: a table per case without its empty columns, conditions once per device."""
    shown = [row for row in rows if row["op"] in README_OPS]
    parts = [BEGIN, EXPLAINED]
    for section in sections(shown):
        kept = [i for i in range(len(HEADER)) if any(line[i] for line in section.lines)]
        table = [[HEADER[i] for i in kept], ["---", *["---:"] * (len(kept) - 1)]]
        table += [[line[i] for i in kept] for line in section.lines]
        body = "\n".join(f"| {' | '.join(line)} |" for line in table) if section.lines else "Nothing measured yet."
        parts += [f"**{section.title}**", body]
    for place in dict.fromkeys((row["device"], row["threads"]) for row in shown):
        there = [row for row in shown if (row["device"], row["threads"]) == place]
        parts += [*_conditions(there, ceilings=False), *_gaps(there)]
    return "\n\n".join([*parts, END])


def updated(readme: str, rows: Iterable[Row]) -> str:
    """README's text with the section as it should be now; ValueError without the markers."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md lacks the lines {BEGIN} and {END}: put them where the table belongs")
    head, _, rest = readme.partition(BEGIN)
    return head + markdown(rows) + rest.partition(END)[2]


def committed(folder: Path = results.FOLDER) -> list[Row]:
    """Rows of every file in bench/results/, by name of the file; the record of the GPU tests is no file of rows, the rows
    of `longest` have no times, and those of `ring` and `rollout` no roofline."""
    others = (CHECK, results.MEMORY, "ring-", "rollout-")
    files = sorted(p for p in folder.glob("*.json") if not p.name.startswith(others))
    return [row for path in files for row in results.load(path)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description="README's table of bench results")
    parser.add_argument("readme", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    text = options.readme.read_text(encoding="utf-8")
    try:
        wanted = updated(text, committed())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.write:
        options.readme.write_text(wanted, encoding="utf-8")
        return 0
    if wanted != text:
        print("README.md's table is not that of bench/results/: run `make bench-table`", file=sys.stderr)
    return int(wanted != text)


if __name__ == "__main__":
    sys.exit(main())
