"""The behaviours over training steps as a picture: one panel each, counts on the left axis, the score on the right one.

As in the paper's figure 7: the average count per response; bands and whiskers are one standard error. Filled lines are the
rollouts that were trained on, hollow marks the evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..figures import DPI, FAINT, INK, WIDTH_INCHES
from .responses import EVALUATION, TRAINING

TITLES = {
    "grounding": "Grounding",
    "subgoal_setting": "Subgoal setting",
    "backtracking": "Backtracking",
    "verification": "Verification",
}
LEXICAL, JUDGE, SCORE = "#0072b2", "#d55e00", "#9a9a9a"
HEIGHT_INCHES = 6.0

Row = Mapping[str, Any]


def behaviours_figure(made: Mapping[str, Any], path: Path) -> Path:
    """Draws the content of behaviours.json as a PNG at `path`, 1800 x 1200 pixels."""
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(2, 2, sharex=True).flat)
    scores: list[Axes] = []
    for axes, name in zip(panels, made["behaviours"], strict=True):
        right = axes.twinx()
        scores.append(right)
        _line(right, made["points"], lambda row: row["score"], SCORE, "score (right axis)")
        for colour, counter, label in (
            (LEXICAL, "lexical", "counted by words"),
            (JUDGE, "judge", "counted by the judge"),
        ):
            if any(row[counter] for row in made["points"]):
                _line(axes, made["points"], lambda row, c=counter, n=name: (row[c] or {}).get(n), colour, label)
        axes.set_title(TITLES[name], fontsize=12, color=INK)
        axes.set_ylim(bottom=0.0, top=max(axes.get_ylim()[1], 0.1))
        axes.set_zorder(right.get_zorder() + 1)
        axes.patch.set_visible(False)
        _dress(axes, right)
    for left in panels[::2]:
        left.set_ylabel("instances per response", fontsize=11, color=INK)
    for right in scores[1::2]:
        right.set_ylabel("mean score", fontsize=11, color=INK)
    for below in panels[2:]:
        below.set_xlabel("training step  (bands, whiskers: ± 1 standard error)", fontsize=11, color=INK)
    found = {
        label: handle
        for axes in (panels[0], scores[0])
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if any(row["kind"] == EVALUATION for row in made["points"]):
        found["evaluations"] = Line2D(
            [], [], marker="o", markersize=6, markerfacecolor="white", color=INK, linestyle=""
        )
    figure.legend(
        list(found.values()), list(found), loc="outside upper center", ncols=len(found), frameon=False, fontsize=11
    )
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _line(axes: Axes, rows: Sequence[Row], read: Any, colour: str, label: str) -> None:
    """Rollouts as a line with a band, evaluations as hollow marks with whiskers; what has no mean is left out."""
    axes.plot([], [], color=colour, linewidth=1.8, label=label)  # the legend's, whichever of the two there are
    for kind in (TRAINING, EVALUATION):
        found = [(row["step"], read(row)) for row in rows if row["kind"] == kind]
        known = [(step, one["mean"], one["stderr"] or 0.0) for step, one in found if one and one["mean"] is not None]
        if not known:
            continue
        steps, means, errors = zip(*known, strict=True)
        if kind == EVALUATION:
            axes.errorbar(
                steps, means, errors, fmt="o", markersize=6, markerfacecolor="white", color=colour, elinewidth=1.0, zorder=4,
                clip_on=False,
            )  # fmt: skip
            continue
        axes.plot(
            steps, means, color=colour, linewidth=1.8, marker="." if len(steps) <= 60 else None, zorder=3, clip_on=False
        )
        low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)


def _dress(axes: Axes, right: Axes) -> None:
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for one in (axes, right):
        one.tick_params(length=0, labelsize=10, labelcolor=INK)
        for side in ("top", "right", "left"):
            one.spines[side].set_visible(False)
        one.spines["bottom"].set_color(FAINT)
    right.tick_params(labelcolor="#6a6a6a")
