"""Pictures drawn from a run: accuracy by length bucket, stage by stage.

matplotlib's object interface on the Agg canvas: no display, no global state, the same bytes from the same summary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every common colour blindness. Grey is for the untrained model.
STAGE_COLOURS = {"base": "#9a9a9a", "sft": "#56b4e9", "phase1": "#0072b2", "phase2": "#d55e00", "phase3": "#009e73"}
SPARE_COLOURS = ("#cc79a7", "#e69f00", "#000000")
STAGE_LABELS = {"base": "base model", "sft": "after SFT"}
INK, FAINT = "#24292f", "#d8dce0"
# Shown 900 pixels wide an inch is 100 pixels, so 11 points read as 15 pixels; drawn at twice that for dense screens.
WIDTH_INCHES, HEIGHT_INCHES, DPI = 9.0, 4.6, 200

Bucket = Mapping[str, Any]


def stage_label(name: str) -> str:
    """`phase1` -> `after phase 1`: what stands in the legend."""
    if name.startswith("phase") and name[5:].isdigit():
        return f"after phase {name[5:]}"
    return STAGE_LABELS.get(name, name)


def bucket_labels(uppers: Sequence[int | None]) -> list[str]:
    """Bounds in tokens as ranges: `1-256`, `257-512`, `> 512`."""
    bounds = [0, *(upper for upper in uppers if upper is not None)]
    ranges = [f"{low + 1:,}–{high:,}" for low, high in pairwise(bounds)]
    return ranges + [f"> {bounds[-1]:,}"] * (None in uppers)


def accuracy_figure(summary: Mapping[str, Any], path: Path) -> Path:
    """Draw `summary` (the content of summary.json) as a PNG at `path`: 1800 x 920 pixels, made to be shown 900 wide.

    One bar per stage in each length bucket with a whisker of +-1 standard error, the number of questions under each
    bucket, and the chance line where one is given. A bucket without a measurement stays empty. ValueError when no
    stage is given.
    """
    stages: list[Mapping[str, Any]] = list(summary.get("stages") or [])
    uppers = _uppers(stages)
    if not uppers:
        raise ValueError("the summary holds no stage with a length bucket, so there is nothing to draw: evaluate first")
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    spare = iter(SPARE_COLOURS * (1 + len(stages)))
    for index, stage in enumerate(stages):
        colour = STAGE_COLOURS.get(str(stage["name"])) or next(spare)
        _draw_stage(axes, stage, uppers, index, len(stages), colour)
    chance = summary.get("chance")
    if chance is not None:
        axes.axhline(chance, color=INK, linewidth=1.3, linestyle=(0, (4, 3)), label=f"chance {chance:.2f}", zorder=4)
    _dress(axes, stages, uppers)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _uppers(stages: Sequence[Mapping[str, Any]]) -> list[int | None]:
    found = {bucket["upper"] for stage in stages for bucket in stage["buckets"]}
    return [*sorted(upper for upper in found if upper is not None), *([None] if None in found else [])]


def _draw_stage(
    axes: Axes, stage: Mapping[str, Any], uppers: list[int | None], index: int, count: int, colour: str
) -> None:
    width = 0.82 / count
    drawn: dict[int | None, Bucket] = {b["upper"]: b for b in stage["buckets"] if b["accuracy"] is not None}
    places = [uppers.index(upper) + (index - (count - 1) / 2) * width for upper in drawn]
    heights = [float(bucket["accuracy"]) for bucket in drawn.values()]
    axes.bar(places, heights, 0.9 * width, color=colour, label=stage_label(str(stage["name"])), zorder=2)
    for x, height, bucket in zip(places, heights, drawn.values(), strict=True):
        stderr = float(bucket.get("stderr") or 0.0)
        if stderr:
            axes.errorbar(x, height, stderr, color=INK, linewidth=1.2, capsize=3, zorder=3)
        top = min(height + stderr, 1.0) + 0.012
        axes.text(x, top, f"{height:.2f}", ha="center", va="bottom", fontsize=9.5, color=INK, zorder=5)


def _dress(axes: Axes, stages: Sequence[Mapping[str, Any]], uppers: list[int | None]) -> None:
    counts: list[str] = []
    for upper in uppers:
        sizes = sorted({int(b["n"]) for stage in stages for b in stage["buckets"] if b["upper"] == upper})
        counts.append(f"n = {sizes[0]:,}" if len(sizes) == 1 else f"n = {sizes[0]:,}–{sizes[-1]:,}")
    ticks = [f"{label}\n{count}" for label, count in zip(bucket_labels(uppers), counts, strict=True)]
    axes.set_xticks(range(len(uppers)), ticks, fontsize=11.5, color=INK)
    axes.set_xlabel("prompt length in tokens  (n: questions;  whiskers: ± 1 standard error)", fontsize=11, color=INK)
    axes.set_ylabel("accuracy", fontsize=12, color=INK)
    # The whole scale, with room above 1.0 for a value label, so that no difference looks larger than it is.
    axes.set_ylim(0.0, 1.08)
    axes.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_xlim(-0.55, len(uppers) - 0.45)
    axes.tick_params(length=0, labelsize=11, labelcolor=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i].startswith("chance"))
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(labels),
        frameon=False,
        fontsize=11,
        labelcolor=INK,
        handlelength=1.4,
        columnspacing=1.6,
    )
