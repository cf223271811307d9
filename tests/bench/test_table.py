"""Tables and the picture are made from rows and nothing else; README's is current."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import plot, results, table

MakeRow = Callable[..., dict[str, Any]]


def test_readmes_table_is_current(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert table.updated(readme, table.committed()) == readme, "run `make bench-table`"


def test_readmes_table_holds_measurements(root: Path) -> None:
    measured = [row for row in table.committed() if row["status"] == "measured"]
    assert any(row["op"] == "linear_logprob" and row["contender"].startswith("longreach") for row in measured)


def test_markdown_of_rows(row: MakeRow) -> None:
    rows = [
        row(),
        row(**{"pass": "forward", "median_s": 0.03, "iqr_s": 0.0004}),
        row(contender="TRL, chunked", ours=False, package="trl", version="1.16.0", gradient_errors={"dweight": 0.02}),
        row(contender="QuACK", ours=False, status="gap", reason="needs a CUDA device"),
        row(op="policy_loss"),
    ]
    text = table.markdown(rows)
    assert text.startswith(table.BEGIN)
    assert text.endswith(table.END)
    assert "**linear_logprob, N=8 D=4 V=16, float32**" in text
    assert "| longreach, chunked | 30.00 ± 0.40 | 100 ± 2 | 50 % | 10.0 | 1.0e-06 | 3.0e-07 |" in text
    assert "| TRL, chunked |  | 100 ± 2 | 50 % | 10.0 | 1.0e-06 | 2.0e-02 |" in text
    assert "Not measured: QuACK: needs a CUDA device." in text
    assert "1 thread; torch 2.13.0, triton 3.7.1, trl 1.16.0; commit abc; 2026-01-02 03:04 UTC." in text
    assert "ceilings 0.1 TFLOP/s and 20 GB/s" in table.sections(rows)[0].notes[0]
    twice = table.markdown(
        [
            *rows,
            row(dtype="bfloat16"),
            row(dtype="bfloat16", contender="QuACK", status="gap", reason="needs a CUDA device"),
        ]
    )
    assert twice.count("CPU of a test") == twice.count("Not measured") == 1
    assert "backward ms" not in text  # an empty column
    assert "policy_loss, " not in text  # not one of README's


def test_every_file_of_rows_counts(tmp_path: Path, row: MakeRow) -> None:
    results.append(tmp_path / "b.json", row(contender="second"))
    results.append(tmp_path / "a.json", row(contender="first"))
    (tmp_path / table.CHECK).write_text('{"green": true}')
    assert [found["contender"] for found in table.committed(tmp_path)] == ["first", "second"]


def test_only_the_section_changes(row: MakeRow) -> None:
    readme = f"before\n{table.BEGIN}\nold\n{table.END}\nafter {{}} \\1\n"
    found = table.updated(readme, [row()])
    assert found.startswith("before\n" + table.BEGIN)
    assert found.endswith(table.END + "\nafter {} \\1\n")
    assert "old" not in found
    assert table.updated(found, [row()]) == found
    with pytest.raises(ValueError, match="lacks the lines"):
        table.updated("no markers", [row()])


def test_the_command_writes_and_tells(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{table.BEGIN}{table.END}")
    assert table.main([str(readme)]) == 1
    assert table.main([str(readme), "--write"]) == 0
    assert table.main([str(readme)]) == 0
    readme.write_text("none")
    assert table.main([str(readme), "--write"]) == 2


def test_published_figures_stand_apart(row: MakeRow) -> None:
    """Named as published, with their source, and only under their own conditions."""
    dims = {"N": 8192, "D": 4096, "V": 128256}
    there = row(dims=dims, dtype="bfloat16", device="NVIDIA H200", threads=None, driver="580")
    lines = [line for section in table.sections([there]) for line in section.lines]
    assert ["QuACK (published, Liger-Kernel #1356)", "", "", "35.5", "", "", "", ""] in lines
    for other in (row(dims=dims, dtype="bfloat16"), {**there, "dtype": "float32"}, {**there, "dims": {"N": 1}}):
        assert not [line for section in table.sections([other]) for line in section.lines if "published" in line[0]]


def test_the_picture(tmp_path: Path, row: MakeRow) -> None:
    rows = [
        row(**{"pass": "forward", "median_s": 9.0}),
        row(),
        row(**{"pass": "backward", "median_s": 8.0}),
        row(contender="fast", median_s=0.01),
        row(contender="gap", status="gap"),
        row(op="attention", bound="memory"),
    ]
    linear, attention = plot.panels(rows)
    assert [(item["contender"], item["pass"]) for item in linear] == [("fast", "both"), ("longreach, chunked", "both")]
    assert len(attention) == 1
    path = plot.draw(rows, tmp_path / "new" / "x.png")
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width > 1000 and height > 300
    assert "<svg" in plot.draw(rows, tmp_path / "x.svg").read_text()[:1000]
    with pytest.raises(ValueError, match="no measured row"):
        plot.draw([row(status="gap")], tmp_path / "y.png")


def test_the_plain_table_lines_up() -> None:
    said: list[str] = []
    table._plain("title", ["a", "b"], [["x", "10.0"], ["longer", "7"]], said.append)
    assert said == ["title", "a          b", "x       10.0", "longer     7"]


def test_committed_rows_are_whole() -> None:
    """Each says where, when and on what it was measured, or why it wasn't."""
    for row in table.committed():
        assert row["commit"] not in ("", "unknown"), row
        assert row["status"] == "measured" or row["reason"], row
        assert {"device", "torch", "sources", "date", "dims", "dtype", "pass"} <= row.keys()
        if row["status"] == "measured":
            assert row["rounds"] == len(row["samples_s"]) >= 5
            assert {"peak_mib", "memory_counted", "roofline_share", "ceiling_tflops"} <= row.keys()
    assert len({results.identity(row) for row in table.committed()}) == len(table.committed())
