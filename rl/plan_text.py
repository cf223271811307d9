"""A plan as text: tables of memory and time by phase, the setting proposed, and why others don't fit."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.planner import StepPlan
from ..engine.planner_memory import Memory, Setting
from .plan import Plan

MEMORY_PARTS = (
    "weights", "gradients", "optimizer", "saved activations", "peak in a layer", "loss workspace", "generator weights",
    "generator keys and values",
)  # fmt: skip
PROMPTS_COUNTED = 1000


def plan_text(plan: Plan) -> str:
    """Everything that `longreach plan` says."""
    chosen, gpus = plan.chosen, plan.proposal.own.setting.all_gpus
    parts = [
        f"{plan.recipe.name} ({plan.shape.parameters / 1e9:.1f}B parameters) on {gpus} x {plan.gpu.name} "
        f"({plan.gpu.usable / 1e9:.1f} GB usable each)",
        layout(plan.proposal.own.setting),
        verdict(plan),
        "memory of one GPU in GB, at the moment that needs most\n" + memory_table(chosen.plans),
        "seconds of one step, and what bounds each part\n" + time_table(chosen.plans) + side_by_side(chosen.plans),
        "what a step costs and what sharing prompts saves\n" + cost_table(plan),
        why_not(plan),
        "Lengths are the largest that each phase allows, so times and costs are upper bounds. Memory and operations are held "
        "against a trace of the real step; seconds rest on assumed rates and are not measured.",
    ]
    return "\n\n".join(part for part in parts if part)


def layout(setting: Setting) -> str:
    """Who has which GPUs, where servers generate."""
    servers = setting.servers
    if servers is None:
        return ""
    each = servers.gpus // servers.count
    spread = f"{each} GPU{'s' * (each > 1)}"
    if servers.replicas > 1:
        spread += f" ({servers.replicas} copies of the model)"
    if not servers.apart:
        awake = "asleep while it trains" if servers.sleep else "awake while it trains"
        return f"{setting.gpus} GPU(s) train; {servers.count} vLLM server(s) of {spread} generate on the same ones, {awake}"
    return f"{setting.gpus} GPU(s) train; {servers.count} vLLM server(s) of {spread} generate on {servers.gpus} others"


def side_by_side(plans: Sequence[StepPlan]) -> str:
    """Which of the two a step waits for, where they overlap."""
    lines = [
        f"{plan.load.name}: the next step is generated while this one trains: a step takes as long as "
        f"{'generation' if plan.generation > plan.training else 'training'} ({seconds(max(plan.generation, plan.training))} s, the "
        f"other {seconds(min(plan.generation, plan.training))}) and the weights' way"
        for plan in plans
        if plan.overlaps
    ]
    return "\n".join(["", *lines]) if lines else ""


def verdict(plan: Plan) -> str:
    own, best = plan.proposal.own, plan.proposal.best
    lines = ["the recipe as it is: " + ("fits" if own.fits else f"doesn't fit: {own.problem}")]
    if best is None:
        lines.append("nothing fits; shown is the recipe's own setting")
    elif plan.proposal.changes:
        hours = (
            f"{best.seconds / 3600:.1f} h instead of {own.seconds / 3600:.1f} h"
            if own.fits
            else f"{best.seconds / 3600:.1f} h"
        )
        lines.append(f"cheapest that fits ({hours}): {' '.join(plan.proposal.changes)}")
        if plan.proposal.own.setting.lora is None and best.setting.lora is not None:
            lines.append("adapters in place of all weights change what is learned: more GPUs are the other way")
    else:
        lines.append("and nothing that fits is cheaper")
    return "\n".join(lines)


def memory_table(plans: Sequence[StepPlan]) -> str:
    rows = []
    for plan in plans:
        for what, memory in plan.memory.items():
            rows.append([plan.load.name, what, *(_gb(memory, part) for part in MEMORY_PARTS), gigabytes(memory.total),
                         f"{memory.host / 1e9:.0f}" if memory.host else "-", memory.moment])  # fmt: skip
    return table(["phase", "while", *MEMORY_PARTS, "total", "host", "moment"], rows)


def time_table(plans: Sequence[StepPlan]) -> str:
    rows = []
    for plan in plans:
        for what, time in plan.times.items():
            rows.append([plan.load.name, what, seconds(time.seconds), seconds(time.communication), seconds(time.total),
                         "communication" if time.shown else time.bound])  # fmt: skip
    return table(["phase", "part", "computing", "communicating", "seconds", "bound by"], rows)


def cost_table(plan: Plan) -> str:
    rows = []
    gpus = plan.chosen.setting.all_gpus
    for step in plan.chosen.plans:
        load = step.load
        hours = step.seconds * gpus / 3600
        epoch = f"{hours * PROMPTS_COUNTED / load.prompts:,.1f}" if load.prompts else "-"
        rows.append([
            load.name, f"{step.seconds:,.0f}" if step.seconds >= 10 else seconds(step.seconds), f"{step.tokens_per_second:,.0f}", f"{step.utilisation:.0%}", f"{hours:,.2f}", epoch,
            f"{load.steps * step.seconds / 3600:,.1f}", f"{load.steps * hours:,.1f}",
            f"{step.dense_flops / step.flops:.1f}x",
        ])  # fmt: skip
    names = ["phase", "s a step", "tokens/s", "update MFU", "GPU-hours a step", f"GPU-hours a {PROMPTS_COUNTED:,} prompts",
             "hours, all steps", "GPU-hours, all steps", "FLOPs saved by sharing"]  # fmt: skip
    return table(names, rows) + epoch_line(plan)


def epoch_line(plan: Plan) -> str:
    """An epoch is known where the recipe says how many prompts it takes."""
    limit, last = plan.recipe.data.limit, plan.chosen.plans[-1]
    if not limit or not last.load.prompts:
        return ""
    steps = -(-limit // last.load.prompts)
    hours = steps * last.seconds / 3600
    gpus = plan.chosen.setting.all_gpus
    return (
        f"\nan epoch over data.limit = {limit:,} prompts, all as long as {last.load.name} allows: {steps} steps, "
        f"{hours:,.1f} h, {hours * gpus:,.1f} GPU-hours"
    )


def why_not(plan: Plan) -> str:
    """What each thing that the proposal turns on is for, or what is missing even with all of them."""
    best = plan.proposal.best
    if best is None and all(tried.problem == plan.proposal.own.problem for _, tried in plan.proposal.others):
        return ""  # nothing here changes what is wrong
    lines = []
    for name, tried in plan.proposal.others:
        if not tried.fits:
            lines.append(f"  {name}: {tried.problem}")
        elif best is not None:
            lines.append(f"  {name}: fits, {tried.seconds / best.seconds - 1:+.0%} time")
        else:
            lines.append(f"  {name}: fits")
    head = "the proposal with one thing changed:" if best else "with everything that saves memory, one thing changed:"
    return "\n".join([head, *lines]) if lines else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; numbers to the right. A column that says nothing in any row is left out."""
    kept = [i for i in range(len(header)) if not rows or any(row[i] not in ("", "-") for row in rows)]
    lines = [[header[i] for i in kept], *([row[i] for i in kept] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    right = [bool(rows) and all(not row[i] or row[i][0] in "0123456789-+" for row in rows) for i in kept]
    return "\n".join(
        "  " + "  ".join(x.rjust(w) if r else x.ljust(w) for x, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def _gb(memory: Memory, part: str) -> str:
    size = memory.parts.get(part, 0.0)
    return gigabytes(size) if size else "-"


def gigabytes(size: float) -> str:
    """Two digits of what is less than one."""
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"


def seconds(time: float) -> str:
    return f"{time:.1f}" if time >= 1 or not time else f"{time:.2g}"
