"""Prints the sizes of files and functions per folder; fails where the product outgrows its limits.

Usage: `python tests/checks/size_table.py ROOT`. A function or file past its limit is a sign that a noun is missing; the
limits bind kernels/, engine/ and rl/, while tests/ and bench/ are shown only. A function is counted from `def` to its
last line, docstring and inner functions included.
"""

from __future__ import annotations

import ast
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

PRODUCT = ("kernels", "engine", "rl")
SHOWN = (*PRODUCT, "tests", "bench")
FUNCTION_LIMIT = 60
FILE_LIMIT = 500


@dataclass(frozen=True)
class Size:
    """Lines of one file or function, and its name for the table."""

    lines: int
    name: str

    def __str__(self) -> str:
        return f"{self.lines} {self.name}"


def measure(path: Path, root: Path) -> tuple[Size, list[Size]]:
    """The size of a file and of each function in it."""
    text = path.read_text(encoding="utf-8")
    where = path.relative_to(root)
    functions = [
        Size((node.end_lineno or node.lineno) - node.lineno + 1, f"{where}:{node.lineno} {node.name}")
        for node in ast.walk(ast.parse(text, filename=str(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return Size(len(text.splitlines()), str(where)), functions


def table(root: Path) -> list[str]:
    """Prints one row per folder; returns one line per file or function past its limit."""
    over: list[str] = []
    print(f"{'folder':<9}{'files':>6}{'lines':>8}{'median':>8}   {'longest file':<44}longest function")
    for folder in SHOWN:
        measured = [measure(path, root) for path in sorted((root / folder).rglob("*.py"))]
        if not measured:
            continue
        files = [file for file, _ in measured]
        functions = [function for _, inside in measured for function in inside]
        file = max(files, key=lambda size: size.lines)
        function = max(functions, key=lambda size: size.lines, default=Size(0, "-"))
        total, median = sum(size.lines for size in files), statistics.median(size.lines for size in files)
        print(f"{folder + '/':<9}{len(files):>6}{total:>8}{median:>8.0f}   {f'{file}':<44}{function}")
        if folder in PRODUCT:
            for limit, sizes in ((FUNCTION_LIMIT, functions), (FILE_LIMIT, files)):
                over += [f"{size.name}: {size.lines} lines, limit {limit}" for size in sizes if size.lines > limit]
    return over


def main() -> int:
    try:
        over = table(Path(sys.argv[1]))
    except SyntaxError as error:
        print(f"{error.filename}:{error.lineno}: {error.msg}")
        return 1
    for line in over:
        print(f"too long: {line} (a noun is missing: give part of it a name of its own)")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
