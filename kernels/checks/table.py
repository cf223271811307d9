"""The tables that a check prints: plain text, one line a row, problems below their row."""

from __future__ import annotations

from collections.abc import Sequence

from .compilation import Row
from .floor import Floor
from .mutation import Fate
from .numerics import Outcome

Cells = Sequence[str]


def align(header: Cells, rows: Sequence[Cells]) -> list[str]:
    """The lines of a table: a column is flush right if what it holds are numbers."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    right = [all(row[i].replace(".", "").isdigit() for row in rows if row[i]) for i in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in (header, *rows)
    ]


def _with_problems(header: Cells, rows: Sequence[Outcome] | Sequence[Row] | Sequence[Fate], cells: list[Cells]) -> str:
    first, *lines = align(
        (*header, ""), [(*line, "" if row.ok else "FAILED") for row, line in zip(rows, cells, strict=True)]
    )
    printed = [first]
    for row, line in zip(rows, lines, strict=True):
        printed += [line, *(f"    {problem}" for problem in row.problems)]
    return "\n".join(printed)


def numerics(rows: Sequence[Outcome]) -> str:
    """share: the largest part of its allowed error that any element uses."""
    header = ("case", "dtype", "tensors", "share of allowed error", "worst in", "s")
    cells: list[Cells] = [
        (row.label, row.dtype, str(row.tensors), f"{row.share:.2f}", row.worst, f"{row.seconds:.1f}") for row in rows
    ]
    return _with_problems(header, rows, cells)


def compilation(rows: Sequence[Row]) -> str:
    """Sizes in bytes; the counts are static instructions."""
    header = "sm case triton warps regs stack shared limit mma wgmma tcgen05 tma s".split()
    cells: list[Cells] = [
        (
            *(str(row.arch), row.label, row.triton, str(row.warps), str(row.registers), str(row.stack)),
            *(str(row.shared), str(row.shared_limit), str(row.mma), str(row.wgmma), str(row.tcgen05), str(row.tma)),
            "cached" if row.cached else f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    return _with_problems(header, rows, cells)


def mutants(rows: Sequence[Fate]) -> str:
    """error: the largest of the case that caught it, in units of the allowed one."""
    header = ("mutant", "caught by", "error", "s")
    cells: list[Cells] = [
        (row.label, row.by, f"{row.share:.3g}" if row.ok else "", f"{row.seconds:.1f}") for row in rows
    ]
    return _with_problems(header, rows, cells)


def floors(rows: Sequence[Floor]) -> str:
    """One line a pass."""
    cells = [
        (row.label, f"{row.tflop:.4g}", f"{row.gigabytes:.4g}", f"{row.milliseconds:.4g}", row.bound) for row in rows
    ]
    return "\n".join(align(("pass", "TFLOP", "GB", "ms at least", "bound by"), cells))
