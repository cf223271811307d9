"""The picture of a file of rows: for each case, throughput against its roofline on the left, peak memory on the right.

matplotlib's object interface without a display. A case is drawn by its `both` rows, or by the only pass it has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .results import Row

# Okabe and Ito's palette: told apart with every common colour blindness.
OURS, PEER, INK, FAINT = "#0072b2", "#b8bec4", "#24292f", "#d8dce0"
WIDTH_INCHES, ROW_INCHES, DPI = 11.0, 0.34, 150


def panels(rows: Iterable[Row]) -> list[list[Row]]:
    """Measured rows by case, slowest last, each contender once."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["status"] != "measured":
            continue
        label = json.dumps([row[name] for name in ("device", "threads", "op", "dims", "dtype")])
        known = cases.setdefault(label, {})
        if row["contender"] not in known or row["pass"] == "both":
            known[row["contender"]] = row
    return [sorted(found.values(), key=lambda row: row["median_s"]) for found in cases.values()]


def draw(rows: Iterable[Row], path: Path) -> Path:
    """Draws and gives the path; ValueError without a measured row, or without matplotlib."""
    found = panels(rows)
    if not found:
        raise ValueError("no measured row to draw: run the bench first")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the plot needs matplotlib: install it, or leave --plot out") from error
    heights = [len(case) + 2.2 for case in found]
    figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES * sum(heights)), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(found), 2, squeeze=False, height_ratios=heights, width_ratios=(3, 2))
    for (left, right), case in zip(axes, found, strict=True):
        _speed(left, case)
        _memory(right, case)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    return path


def _speed(axes: Any, case: Sequence[Row]) -> None:
    """Work of the formula over time, and the line that no method can pass."""
    first = case[0]
    compute = first["bound"] == "compute"
    field, unit = ("tflops", "TFLOP/s") if compute else ("gbs", "GB/s")
    ceiling = first["ceiling_tflops"] if compute else first["ceiling_gbs"]
    speeds = [row[field] for row in case]
    if compute and ceiling < 1:
        unit, ceiling, speeds = "GFLOP/s", 1e3 * ceiling, [1e3 * speed for speed in speeds]
    _bars(axes, case, speeds, [_label(row) for row in case])
    axes.axvline(ceiling, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0.8)
    axes.set_xlim(0, 1.3 * max(ceiling, *speeds))
    dims = " ".join(f"{name}={value}" for name, value in first["dims"].items())
    where = first["device"] + (
        f", {first['threads']} thread{'s' * (first['threads'] != 1)}" if first["threads"] else ""
    )
    axes.set_title(
        f"{first['op']} ({first['pass']}), {first['dtype']}, {dims}\n{where}; dashed: ceiling measured in the run",
        loc="left", fontsize=9, color=INK,
    )  # fmt: skip
    axes.set_xlabel(unit, fontsize=8.5, color=INK)


def _label(row: Row) -> str:
    """Share of the roofline, and the error: a fast wrong contender must be seen."""
    errors = row.get("gradient_errors")
    wrong = f", gradient error {max(errors.values()):.0e}" if errors else ""
    return f"{100 * row['roofline_share']:.0f} %{wrong}"


def _memory(axes: Any, case: Sequence[Row]) -> None:
    sizes = [row["peak_mib"] for row in case]
    _bars(axes, case, sizes, [f"{size:,.1f}" for size in sizes])
    axes.set_xlim(0, 1.18 * max(*sizes, 1e-3))
    axes.set_yticklabels([])
    axes.set_xlabel("peak MiB beyond inputs", fontsize=8.5, color=INK)


def _bars(axes: Any, case: Sequence[Mapping[str, Any]], values: Sequence[float], labels: Sequence[str]) -> None:
    places = range(len(case))
    axes.barh(places, values, color=[OURS if row["ours"] else PEER for row in case], height=0.72)
    for place, value, label in zip(places, values, labels, strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # the ceiling must not cross a figure
        axes.text(value, place, f" {label}", va="center", fontsize=8, color=INK, bbox=box, zorder=3)
    axes.set_yticks(places, [row["contender"] for row in case], fontsize=8.5, color=INK)
    axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
