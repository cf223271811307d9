"""The picture of `longest.py`: a bar for each line of the ladder, what is modelled hatched.

matplotlib's object interface without a display; the axis is logarithmic, since each line multiplies the one before.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .plot import FAINT, INK, OURS, PEER
from .results import Row

WIDTH_INCHES, ROW_INCHES, DPI = 9.0, 0.42, 200


def draw(rows: Iterable[Row], path: Path) -> Path:
    """Draws the rows of `longest` and gives the path; ValueError without one."""
    found = [row for row in rows if row["op"] == "longest" and row["status"] != "gap"]
    if not found:
        raise ValueError("no row of `longest` to draw: run `python -m bench.longest` first")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = ROW_INCHES * (len(found) + 3.2)
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(found):
        modelled = row["status"] == "modelled"
        axes.barh(
            place, row["longest"], height=0.7, color="white" if modelled else OURS if row["ours"] else PEER,
            edgecolor=OURS if modelled else "none", hatch="////" if modelled else None,
        )  # fmt: skip
        gain = row["longest"] / max(1, found[0]["longest"])
        label = (
            f" {row['longest']:,}"
            + (f"  ({gain:,.{0 if gain >= 10 else 1}f}×)" if place else "")
            + ("  modelled" if modelled else "")
        )
        axes.text(row["longest"], place, label, va="center", fontsize=9.5, color=INK)
    labels = [row["contender"] if i == 0 else f"+ {row['contender']}" for i, row in enumerate(found)]
    axes.set_yticks(range(len(found)), labels, fontsize=10, color=INK)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.5 * min(row["longest"] for row in found), 8 * max(row["longest"] for row in found))
    first = found[0]
    dims = first["dims"]
    axes.set_title(
        f"Longest prompt of an update in {first['budget_mib']:,} MiB (a rank), each line with all above it\n"
        f"{dims['layers']} layers of width {dims['D']}, vocabulary {dims['V']:,}, {dims['G']} completions of {dims['R']} tokens, "
        f"{first['dtype']};\nread off lines fitted to peaks of short prompts ({first['lengths'][0]:,} to "
        f"{max(max(row['lengths'], default=0) for row in found):,} tokens) measured on {'a CPU' if first['threads'] else first['device']}",
        loc="left", fontsize=9.5, color=INK,
    )  # fmt: skip
    axes.set_xlabel("tokens", fontsize=9.5, color=INK)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    return path
