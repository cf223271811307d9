"""From a recipe to a plan: what each phase asks of the GPUs, which setting is cheapest, and whether it can run at all.

Memory and time are formulas of `engine.planner*`; nothing is loaded and no document is read, so a phase is planned at its
largest: every prompt and completion as long as it allows, every row as full as `rl.micro_batch_tokens` lets it be.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from ..engine.model import ModelConfig, pick_device
from ..engine.planner import Load
from ..engine.planner_hardware import GPUS, Gpu
from ..engine.planner_memory import Setting
from ..engine.planner_search import Proposal, Tried, propose, try_setting
from ..engine.planner_shape import ModelShape, Row, Unplannable, model_shape
from .console import Console
from .curriculum import Phase, phase_name
from .grpo_config import GrpoConfig
from .plan_servers import servers_of
from .policy import model_source
from .recipe import Recipe

ONE_PASS, TWO_PASSES = 6, 8
"""Products of N x D x V of a loss that needs one look at the vocabulary, or two."""


@dataclass(frozen=True)
class Plan:
    """A recipe on given GPUs: the model's shape, what each phase asks for, and the settings that were tried."""

    recipe: Recipe
    shape: ModelShape
    gpu: Gpu
    loads: tuple[Load, ...]
    proposal: Proposal

    @property
    def chosen(self) -> Tried:
        """The cheapest that fits, else the recipe's own."""
        return self.proposal.best or self.proposal.own


def make_plan(recipe: Recipe, gpu: Gpu, gpus: int, *, model_config: str | None = None, serve: int = 0) -> Plan:
    """The plan of a recipe on `gpus` GPUs.

    Args:
        model_config: a folder with the model's config.json, for a model that can't be reached.
        serve: GPUs that a serving engine spreads a generator over; 0: the trainer generates, or servers as [generator] says.

    Raises:
        ValueError: a number of GPUs that can't be, or a model that can't be read or planned.
    """
    if gpus < 1 or serve < 0:
        raise ValueError(f"--gpus must be at least 1 and --serve at least 0, not {gpus} and {serve}")
    shape = recipe_shape(recipe.model, model_config)
    loads = loads_of(recipe)
    own = laid_out(recipe, gpus, serve)
    return Plan(recipe, shape, gpu, loads, propose(shape, own, gpu, loads))


def laid_out(recipe: Recipe, gpus: int, serve: int = 0) -> Setting:
    """The recipe's own setting on `gpus` GPUs, of which its servers have theirs.

    Raises:
        ValueError: none is left for the trainer.
    """
    servers = servers_of(recipe, serve)
    if servers is None:
        return replace(setting_of(recipe, gpus), serve=serve)
    taken = servers.gpus if servers.apart else 0
    if taken >= gpus:
        raise ValueError(
            f"--gpus {gpus}: {servers.count} server(s) of {servers.gpus // servers.count} take {taken}, and none is left for the "
            "trainer: give more, or fewer to the servers (generator.servers, generator.args)"
        )
    return replace(setting_of(recipe, gpus - taken), servers=servers)


def recipe_shape(model: ModelConfig, folder: str | None = None) -> ModelShape:
    """The shape of a recipe's model, from `folder` where one is given."""
    return model_shape(folder or model_source(model), trust_remote_code=model.trust_remote_code)


def setting_of(recipe: Recipe, gpus: int) -> Setting:
    """The recipe's own setting on `gpus` GPUs."""
    model, parallel = recipe.model, recipe.parallel
    return Setting(
        gpus=gpus,
        ring=parallel.ring,
        ulysses=parallel.ulysses,
        schedule=parallel.schedule,
        shard=parallel.shard,
        dtype=model.dtype,
        autocast=model.autocast,
        lora=model.lora,
        gradient_checkpointing=model.gradient_checkpointing,
        offload_activations=model.offload_activations,
        tile_tokens=model.tile_tokens,
        liger=model.liger,
        optimizer=recipe.optimizer.kind,
        reference=recipe.rl.kl_weight > 0 and bool(recipe.phases),
    )


def loads_of(recipe: Recipe) -> tuple[Load, ...]:
    """What one step of each training stage asks for, in order."""
    found = []
    if recipe.sft:
        # how long responses are is known only from the data: half of an example is more than any
        sft, groups = recipe.sft, max(1, min(recipe.sft.micro_batch_tokens // recipe.sft.upper, recipe.sft.batch_size))
        row = Row(groups, sft.upper - sft.upper // 2, 1, sft.upper // 2)
        found.append(Load("sft", 1, row, -(-sft.batch_size // groups)))
    return (*found, *(phase_load(recipe, i, phase) for i, phase in enumerate(recipe.phases)))


def phase_load(recipe: Recipe, index: int, phase: Phase) -> Load:
    """One RL step of a phase."""
    rl, budget = recipe.rl, recipe.rl.micro_batch_tokens
    row, pieces = fullest_row(budget, phase.upper, rl.group_size, phase.max_completion, rl.batch_prompts // rl.updates)
    rows = -(-rl.batch_prompts // row.groups) * pieces
    again = rows if rl.masks else rows * (rl.updates - 1) // rl.updates
    return Load(
        phase_name(index), phase.steps, row, rows,
        forward_rows=again + (rows if rl.kl_weight else 0),
        prompts=rl.batch_prompts, size=rl.group_size, prompt=phase.upper, completion=phase.max_completion,
        batch_tokens=recipe.generator.batch_tokens, passes=loss_passes(rl),
    )  # fmt: skip


def fullest_row(budget: int, prompt: int, size: int, completion: int, groups: int) -> tuple[Row, int]:
    """A row of at most `budget` tokens, and how many such rows a group is split into (its prompt then in each)."""
    group = prompt + size * completion
    if group <= budget:
        return Row(max(1, min(budget // group, groups)), prompt, size, completion), 1
    at_once = max(1, (budget - prompt) // completion)
    return Row(1, prompt, at_once, completion), -(-size // at_once)


def loss_passes(rl: GrpoConfig) -> int:
    """Losses over whole sequences look twice, unless every update is on-policy."""
    return TWO_PASSES if rl.loss.reduces and rl.updates > 1 else ONE_PASS


def this_device(recipe: Recipe) -> tuple[Gpu, str]:
    """The device that `train` would run on, as a GPU of the planner, and how to say it.

    A CPU is one with the machine's memory: its speeds are not its own, so nothing about time is to be read from it.
    """
    device = pick_device(recipe.model.device)
    if device.type == "cuda":
        seen = torch.cuda.get_device_properties(device)
        near = next(
            (gpu for gpu in GPUS.values() if gpu.name.split("-")[0].upper() in seen.name.upper()), GPUS["h100-80"]
        )
        return replace(near, name=seen.name, memory=float(seen.total_memory)), seen.name
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    gpu = replace(GPUS["h100-80"], name="this machine's memory", memory=memory, host_memory=memory)
    return gpu, "the CPU (its memory is the machine's; the plan knows GPUs, so this is an estimate)"


def check_fits(recipe: Recipe, console: Console, *, force: bool, gpus: int = 1) -> None:
    """What `train` asks before it begins: raises ValueError for a recipe that can't fit on this device.

    `force` makes a warning of it. A model that can't be planned is let through with a warning, too.
    """
    try:
        shape = recipe_shape(recipe.model)
    except Unplannable as error:
        console.warn(f"no plan: {error}")
        return
    gpu, name = this_device(recipe)
    setting, loads = setting_of(recipe, gpus), loads_of(recipe)
    servers = servers_of(recipe)
    if servers is not None and not servers.apart and recipe.model.device != "cpu" and torch.cuda.is_available():
        setting = replace(setting, servers=servers)
    elif servers is not None:  # not on this device, or on a CPU, where the machine's memory is for both
        loads = tuple(replace(load, prompts=0) for load in loads)
    tried = try_setting(shape, setting, gpu, loads)
    what, memory = max((plan.peak for plan in tried.plans), key=lambda peak: peak[1].total)
    if tried.fits:
        console.say(f"plan: {memory.total / 1e9:.1f} GB of {gpu.usable / 1e9:.1f} at most ({what}) on {name}")
        return
    problem = f"this can't fit on {name}: {tried.problem}"
    if force:
        console.warn(f"{problem}; going on, as --force says")
        return
    better = propose(shape, setting, gpu, loads)
    way_out = (
        f"{' '.join(better.changes)} would"
        if better.best
        else "nothing that the planner knows would: see longreach plan"
    )
    raise ValueError(f"{problem}. {way_out}; --force goes on nevertheless")
