"""`longreach plan`: its options, its trace, and its exit status (3: nothing fits)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..engine.launch import Job
from ..engine.model import read_config
from ..engine.planner_cut import shares
from ..engine.planner_hardware import GPUS, gpu_named
from ..engine.planner_memory import Setting, training_memory
from ..engine.planner_shape import KNOWN, config_of, shape_of
from ..engine.planner_time import rank_work, update_work
from .console import Console
from .plan import ONE_PASS, Plan, make_plan
from .plan_sweep import sweep, sweep_figure, sweep_text
from .plan_text import plan_text, table
from .policy import model_source
from .recipe import Recipe, load_recipe, shipped

NOTHING_FITS = 3


def add_plan(commands: Any) -> None:
    """Adds the command to the parser of `longreach`."""
    command = commands.add_parser(
        "plan", help="memory, time and cost of a recipe on given GPUs, without one", allow_abbrev=False,
        epilog="Any recipe key can be given as --section.key VALUE. Exit status 3: no setting fits.",
    )  # fmt: skip
    command.add_argument("recipe", help=f"a .toml file or one of: {', '.join(shipped())}")
    command.add_argument("--gpus", type=int, default=1, metavar="N", help="how many (default: 1)")
    command.add_argument("--gpu", default="h100-80", help=f"{', '.join(GPUS)} or custom (default: h100-80)")
    for name, what in (
        ("memory-gb", "its memory in GB"),
        ("tflops", "its bf16 peak in TFLOP/s"),
        ("bandwidth-gbs", "its memory's GB/s"),
        ("link-gbs", "GB/s to another GPU of the node"),
    ):
        command.add_argument(f"--gpu-{name}", type=float, metavar="X", help=f"with --gpu custom: {what}")
    command.add_argument("--model-config", metavar="DIR", help="a folder with the model's config.json, where no hub is")
    command.add_argument("--serve", type=int, default=0, metavar="N", help="a serving engine over N GPUs generates (default: as [generator] says)")  # fmt: skip
    command.add_argument(
        "--trace", action="store_true", help="run the real step at full shape without memory beside the formulas"
    )
    command.add_argument(
        "--what-if", action="store_true", help="sweep prompts to 1M tokens and GPUs to 1,024, and draw it"
    )
    command.add_argument("--out", type=Path, metavar="PNG", help="where --what-if draws (default: plan-NAME-GPU.png)")
    command.set_defaults(run=run_plan)


def run_plan(known: argparse.Namespace, overrides: Sequence[tuple[str, str]], console: Console, _: Job) -> int:
    """Prints the plan; the exit status."""
    recipe = load_recipe(known.recipe, overrides)
    gpu = gpu_named(
        known.gpu, memory_gb=known.gpu_memory_gb, tflops=known.gpu_tflops, bandwidth_gbs=known.gpu_bandwidth_gbs,
        link_gbs=known.gpu_link_gbs,
    )  # fmt: skip
    plan = make_plan(recipe, gpu, known.gpus, model_config=known.model_config, serve=known.serve)
    console.say(plan_text(plan))
    if known.trace:
        console.say("\n" + trace_text(plan, known.model_config))
    if known.what_if:
        points = sweep(plan)
        console.say("\n" + sweep_text(plan, points))
        picture = sweep_figure(plan, points, known.out or Path(f"plan-{recipe.name}-{gpu.name}.png"))
        console.say(str(picture))
    return 0 if plan.proposal.best else NOTHING_FITS


def trace_text(plan: Plan, folder: str | None = None) -> str:
    """Each phase's fullest row through the real step of one rank without memory, beside the formulas."""
    from ..engine.planner_trace import trace_step  # needs Triton, which plans don't

    config = _config(plan.recipe, folder)
    shape, setting = shape_of(config), traceable(plan.chosen.setting)
    rows = []
    for load in plan.loads:
        start = time.perf_counter()
        made = trace_step(config, setting, load.row, capability=plan.gpu.capability, rank=setting.ulysses - 1)
        took = time.perf_counter() - start
        memory = training_memory(shape, setting, load.row)
        formula = memory.total - memory.parts["optimizer"]
        work = update_work(shape, setting, load.row, ONE_PASS)
        flops = max(rank_work(load.row, work, share).flops for share in shares(shape, setting, load.row))
        rows.append([
            load.name, f"{load.row.tokens:,}", f"{made.peak / 1e9:.2f}", f"{formula / 1e9:.2f}", f"{formula / made.peak - 1:+.1%}",
            f"{made.flops / 1e12:,.1f}", f"{flops / 1e12:,.1f}", f"{flops / made.flops - 1:+.2%}", f"{took:.0f}",
        ])  # fmt: skip
    names = [
        "phase",
        "tokens",
        "traced GB",
        "formula GB",
        "off by",
        "traced TFLOP",
        "formula TFLOP",
        "off by",
        "seconds",
    ]
    head = "one micro-batch by the real step of the fullest rank, traced without memory (no optimizer, no reference)"
    return f"{head}\n" + table(names, rows)


def traceable(setting: Setting) -> Setting:
    """The part of a setting that a trace can have: one model's update, and nobody who generates."""
    return replace(setting, serve=0, servers=None, reference=False)


def _config(recipe: Recipe, folder: str | None) -> Any:
    path = folder or model_source(recipe.model)
    if path in KNOWN:
        return config_of(KNOWN[path])
    return read_config(path, trust_remote_code=recipe.model.trust_remote_code)
