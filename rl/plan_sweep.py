"""What if: the recipe's last phase at other lengths and on other numbers of GPUs, as a table and a picture.

Every point is the quickest of the cheapest settings that fit there, found anew; a gap says that nothing does. Tried are the
recipe's own generator, decoding as much at once as the recipe lets it or a group at a time, and a serving engine over SERVED
GPUs (marked).
Completions stay as they are, so the gain of sharing a prompt grows along the curve.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..engine.planner import Load
from ..engine.planner_memory import Setting
from ..engine.planner_search import Tried, cheapest
from .curriculum import phase_name
from .figures import DPI, FAINT, HEIGHT_INCHES, INK, WIDTH_INCHES
from .plan import Plan, fullest_row
from .plan_text import table

CONTEXTS = (16_000, 32_000, 64_000, 120_000, 250_000, 500_000, 1_000_000)
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SERVED = 8
COLOURS = ("#56b4e9", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#000000", "#9a9a9a")


@dataclass(frozen=True)
class Point:
    """One length on one number of GPUs; `best` is None where nothing fits."""

    context: int
    gpus: int
    best: Tried | None

    @property
    def seconds(self) -> float:
        """Of one step."""
        assert self.best is not None
        return self.best.plans[0].seconds

    @property
    def saved(self) -> float:
        """How many times more the update would compute without a shared prompt."""
        assert self.best is not None
        return self.best.plans[0].dense_flops / self.best.plans[0].flops


def sweep(plan: Plan, contexts: Sequence[int] = CONTEXTS, gpus: Sequence[int] = GPUS) -> list[Point]:
    """ValueError for a recipe without phases."""
    if not plan.recipe.phases:
        raise ValueError("--what-if sweeps the last of [[phases]], and the recipe has none")
    own = plan.proposal.own.setting
    found = []
    for context in contexts:
        full = load_at(plan, context)
        loads = dict.fromkeys((full, replace(full, batch_tokens=context + full.size * full.completion)))
        for count in gpus:
            ways = itertools.product(settings_on(own, count), loads)
            fitting = [cheapest(plan.shape, setting, plan.gpu, [load]) for setting, load in ways]
            points = [Point(context, count, tried) for tried in fitting if tried]
            found.append(min(points, key=lambda point: point.seconds, default=Point(context, count, None)))
    return found


def settings_on(own: Setting, count: int) -> list[Setting]:
    """The recipe's setting on `count` GPUs in all, and with an engine that serves; servers of the recipe's keep theirs."""
    if own.servers is not None:
        left = count - (own.all_gpus - own.gpus)
        return [replace(own, gpus=left, servers=replace(own.servers, window=0))] if left > 0 else []
    ways = [serve for serve in dict.fromkeys((own.serve, SERVED)) if serve <= count]
    return [replace(own, gpus=count, serve=serve) for serve in ways]


def load_at(plan: Plan, context: int) -> Load:
    """The last phase with prompts of `context` tokens; a row holds one whole group, and the generator's budget too."""
    recipe, last = plan.recipe, plan.loads[-1]
    group = context + last.size * last.completion
    row, pieces = fullest_row(group, context, last.size, last.completion, 1)
    assert pieces == 1
    factor = recipe.rl.batch_prompts / last.rows
    return replace(
        last, name=phase_name(len(recipe.phases) - 1), steps=1, row=row, rows=recipe.rl.batch_prompts,
        forward_rows=round(last.forward_rows * factor), prompt=context,
        batch_tokens=max(last.batch_tokens, group),
    )  # fmt: skip


def sweep_text(plan: Plan, points: Sequence[Point]) -> str:
    """Seconds of a step by length and number of GPUs."""
    gpus = sorted({point.gpus for point in points})
    rows = []
    for context in sorted({point.context for point in points}):
        here = {point.gpus: point for point in points if point.context == context}
        fitting = [point for point in here.values() if point.best is not None]
        cells = [_cell(here[n], plan.proposal.own.setting.serve) for n in gpus]
        least = f"{min(point.gpus for point in fitting)}" if fitting else "none"
        saved = f"{fitting[0].saved:.1f}x" if fitting else ""
        rows.append([f"{context // 1000}K", *cells, least, saved])
    mark = (
        f"; *: a generator served over {SERVED} GPUs" if any(cell.endswith("*") for row in rows for cell in row) else ""
    )
    head = f"what if: {plan.loads[-1].name}'s step in seconds, by length of the prompts and number of {plan.gpu.name} (-: doesn't fit{mark})"
    return f"{head}\n" + table(["prompt", *map(str, gpus), "least GPUs", "FLOPs saved by sharing"], rows)


def _cell(point: Point, serve: int) -> str:
    if point.best is None:
        return "-"
    return f"{point.seconds:,.0f}" + "*" * (point.best.setting.serve != serve)


def sweep_figure(plan: Plan, points: Sequence[Point], path: Path) -> Path:
    """Seconds of a step over the length of the prompts, a line for each number of GPUs, and what sharing saves."""
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    counts = sorted({point.gpus for point in points if point.best})
    for index, count in enumerate(counts):
        here = [point for point in points if point.gpus == count]
        line = [point for point in here if point.best]
        left.plot(  # a length that doesn't fit leaves a gap
            [point.context for point in here], [point.seconds if point.best else math.nan for point in here],
            marker="o", markersize=4,
            color=COLOURS[index % len(COLOURS)], linestyle="-" if index < len(COLOURS) else "--",
            label=f"{count:,} GPU{'s' * (count > 1)}",
        )  # fmt: skip
        served = [point for point in line if point.best and point.best.setting.serve != plan.proposal.own.setting.serve]
        left.plot(
            [point.context for point in served], [point.seconds for point in served], marker="o", markersize=4,
            linestyle="none", markerfacecolor="white", markeredgecolor=COLOURS[index % len(COLOURS)],
        )  # fmt: skip
    best = {point.context: point.saved for point in points if point.best}
    right.plot(list(best), list(best.values()), marker="o", markersize=4, color=COLOURS[1])
    right.set_ylim(bottom=0)
    _dress(left, f"seconds of a step, planned\n(hollow: served over {SERVED} GPUs)", logarithmic=True)
    _dress(right, "FLOPs of the update: dense / shared", logarithmic=False)
    if counts:
        left.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=2)
    figure.suptitle(
        f"{plan.recipe.name}: {plan.loads[-1].name} on {plan.gpu.name}, cheapest setting that fits",
        color=INK,
        fontsize=12,
    )
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _dress(axes: Axes, what: str, *, logarithmic: bool) -> None:
    axes.set_xscale("log")
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xticks(CONTEXTS, [f"{n // 1000}K" if n < 1_000_000 else "1M" for n in CONTEXTS], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tokens of a prompt", fontsize=10, color=INK)
    axes.set_ylabel(what, fontsize=10, color=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.tick_params(labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
