"""Time and peak memory of one update against the length of its prompt: shared and dense, from the headline's rows.

Dense times are one completion's, multiplied by their number, and dense memory is one completion's; the picture says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plot import DPI, FAINT, INK, OURS
from .results import Row

DENSE_COLOUR = "#d55e00"
SIZE_INCHES = (11.0, 4.2)
GB = 1e9
Pairs = Sequence[tuple[Row, Row | None]]


def gigabytes(row: Row) -> float:
    """Peak of everything allocated; on a CPU without the weights, which nothing counts there."""
    return (row["peak_mib"] + (row["held_mib"] or 0.0)) * (1 << 20) / GB


def draw(found: Mapping[str, Pairs], path: Path) -> Path:
    """One row of two panels for each device; ValueError without a measured row, or without matplotlib."""
    if not found:
        raise ValueError("no measured row of the headline to draw: run bench/gpu.sh headline first")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: install it, and draw it from the rows") from error
    width, height = SIZE_INCHES
    figure = Figure(figsize=(width, height * len(found)), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), (device, pairs) in zip(axes, found.items(), strict=True):
        dims = pairs[0][0]["dims"]
        about = " ".join(f"{name}={value}" for name, value in dims.items() if name != "P")
        left.set_title(f"One GRPO update, {device}\n{about}", loc="left", fontsize=9, color=INK)
        _lines(left, pairs, lambda row: row["median_s"], "seconds", f"dense: one completion, times {dims['G']}")
        _lines(right, pairs, gigabytes, "peak GB", "dense: one completion")
        for shared, dense in pairs:
            if dense is not None:
                ratio = f"{dense['median_s'] / shared['median_s']:.1f}x"
                place = (shared["dims"]["P"], dense["median_s"])
                left.annotate(ratio, place, (0, 6), textcoords="offset points", ha="center", fontsize=8.5, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    return path


def _lines(axes: Any, pairs: Pairs, value: Any, unit: str, dense_label: str) -> None:
    shared_rows, dense_rows = [s for s, _ in pairs], [d for _, d in pairs if d is not None]
    for rows, colour, label in ((dense_rows, DENSE_COLOUR, dense_label), (shared_rows, OURS, "shared prefix")):
        lengths = [row["dims"]["P"] for row in rows]
        axes.plot(lengths, [value(row) for row in rows], color=colour, marker="o", markersize=4, label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["dims"]["P"] for row in shared_rows})
    axes.set_xticks(ticks, [f"{tick // 1024}K" if tick % 1024 == 0 else str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompt tokens P", fontsize=8.5, color=INK)
    axes.set_ylabel(unit, fontsize=8.5, color=INK)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.08, y=0.15)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
