"""The cheapest setting that fits, and why others don't.

Everything that changes no number may be tried: how ranks share a row, checkpointing, offloading, tiling. An 8-bit or
offloaded optimizer is tried only where plain AdamW fits nowhere, and adapters in place of full weights, which change what is
learned, only where nothing else is left. Servers that generate stay as they are given. Among those that fit the one with the fewest GPU-seconds wins: the least time,
since all GPUs are paid for. Ties go to the plainer setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .model import LoraConfig
from .planner import Load, StepPlan, plan_step
from .planner_hardware import Gpu
from .planner_memory import OPTIMIZER_BYTES, Setting
from .planner_shape import ModelShape

TILES = (0, 8192)
"""Pieces of the sequence that are tried: smaller ones save little more and start more kernels."""
TIE = 1.01
"""A plainer setting within a percent is as cheap."""


@dataclass(frozen=True)
class Tried:
    """One setting, and its plans of all loads."""

    setting: Setting
    plans: tuple[StepPlan, ...]

    @property
    def fits(self) -> bool:
        return all(plan.fits for plan in self.plans)

    @property
    def seconds(self) -> float:
        """Of the whole job."""
        return sum(plan.load.steps * plan.seconds for plan in self.plans)

    @property
    def problem(self) -> str:
        """The first thing that doesn't fit."""
        return next((f"{plan.load.name}: {plan.problems[0]}" for plan in self.plans if plan.problems), "")


@dataclass(frozen=True)
class Proposal:
    """`best` is None where nothing fits; `others` are the best one (or the recipe's) with one thing changed."""

    own: Tried
    best: Tried | None
    others: tuple[tuple[str, Tried], ...]

    @property
    def changes(self) -> tuple[str, ...]:
        """What differs from the recipe's own setting, as command-line keys."""
        return changes(self.own.setting, self.best.setting) if self.best else ()


def try_setting(shape: ModelShape, setting: Setting, gpu: Gpu, loads: Sequence[Load]) -> Tried:
    return Tried(setting, tuple(plan_step(shape, setting, gpu, load) for load in loads))


def propose(shape: ModelShape, own: Setting, gpu: Gpu, loads: Sequence[Load]) -> Proposal:
    """The recipe's own setting, the cheapest that fits, and what each of its features is for."""
    as_written = try_setting(shape, own, gpu, loads)
    best = cheapest(shape, own, gpu, loads)
    around = best.setting if best else heaviest(shape, own)
    others = [(name, try_setting(shape, changed, gpu, loads)) for name, changed in neighbours(shape, around)]
    return Proposal(as_written, best, tuple(others))


def cheapest(shape: ModelShape, own: Setting, gpu: Gpu, loads: Sequence[Load]) -> Tried | None:
    for start in [own] if own.lora else [own, replace(own, lora=LoraConfig(), dtype="bfloat16", autocast=False)]:
        for kind in dict.fromkeys((own.optimizer, *OPTIMIZER_BYTES)):
            best: Tried | None = None
            for setting in candidates(shape, replace(start, optimizer=kind)):
                tried = try_setting(shape, setting, gpu, loads)
                if tried.fits and (best is None or TIE * tried.seconds < best.seconds):
                    best = tried
            if best is not None:
                return best
    return None


def candidates(shape: ModelShape, start: Setting) -> Iterator[Setting]:
    """Plainest first."""
    for ring, ulysses in layouts(shape, start.gpus):
        for shard in (True, False) if start.gpus > 1 else (start.shard,):
            for checkpointing, offload, tile in _MEMORY:
                yield replace(
                    start, ring=ring, ulysses=ulysses, shard=shard, gradient_checkpointing=checkpointing,
                    offload_activations=offload, tile_tokens=tile,
                )  # fmt: skip


_MEMORY = [
    (checkpointing, offload, tile)
    for checkpointing, offload in ((False, False), (True, False), (True, True))
    for tile in TILES
]


def layouts(shape: ModelShape, gpus: int) -> list[tuple[int, int]]:
    """(ring, ulysses) that share out the GPUs, fewest ranks a row first; Ulysses as wide as key heads allow, then a ring."""
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    found = [
        (sp // u, u) for sp in divisors for u in divisors if sp % u == 0 and shape.heads % u == 0 and u <= shape.heads
    ]
    return sorted(found, key=lambda pair: (pair[0] * pair[1], pair[0]))


def heaviest(shape: ModelShape, own: Setting) -> Setting:
    """All that saves memory at once: what even that needs is the reason nothing fits."""
    ring, ulysses = max(layouts(shape, own.gpus), key=lambda pair: (pair[0] * pair[1], pair[1]))
    return replace(
        own, ring=ring, ulysses=ulysses, shard=True, gradient_checkpointing=True, offload_activations=True,
        tile_tokens=TILES[-1], optimizer="adamw-offload",
    )  # fmt: skip


def neighbours(shape: ModelShape, best: Setting) -> Iterator[tuple[str, Setting]]:
    """Settings with one thing changed, and what that is."""
    if best.offload_activations:
        yield "activations kept on the GPU", replace(best, offload_activations=False)
    if best.tile_tokens:
        yield "MLPs of all tokens at once", replace(best, tile_tokens=0)
    if best.gradient_checkpointing:
        yield "nothing computed again", replace(best, gradient_checkpointing=False, offload_activations=False)
    if best.optimizer != "adamw":
        yield "plain AdamW", replace(best, optimizer="adamw")
    if best.sp > 1:
        fewer = max(
            (pair for pair in layouts(shape, best.gpus) if pair[0] * pair[1] < best.sp), key=lambda p: p[0] * p[1]
        )
        yield f"{fewer[0] * fewer[1]} ranks a row", replace(best, ring=fewer[0], ulysses=fewer[1])
    if best.sharded:
        yield "weights whole on every GPU", replace(best, shard=False)
    if best.lora is None:
        yield "adapters (LoRA)", replace(best, lora=LoraConfig(), dtype="bfloat16", autocast=False)
    elif best.dtype == "bfloat16":
        yield "all weights trained", replace(best, lora=None, dtype="float32", autocast=True)


def changes(own: Setting, best: Setting) -> tuple[str, ...]:
    """What to add to the command line to get from one setting to the other."""
    keys = {
        "ring": "parallel.ring", "ulysses": "parallel.ulysses", "shard": "parallel.shard", "dtype": "model.dtype",
        "autocast": "model.autocast", "gradient_checkpointing": "model.gradient-checkpointing",
        "offload_activations": "model.offload-activations", "tile_tokens": "model.tile-tokens", "liger": "model.liger",
        "optimizer": "optimizer.kind",
    }  # fmt: skip
    found = []
    for name, key in keys.items():
        before, after = getattr(own, name), getattr(best, name)
        if before != after:
            found.append(f"--{key} {str(after).lower() if isinstance(after, bool) else after}")
    if best.lora is not None and own.lora is None:
        found.append(f"--model.lora.rank {best.lora.rank}")
    return tuple(found)
