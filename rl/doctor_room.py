"""The longest prompt that fits on this machine, feature by feature: what the planner says of a named model."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from ..engine.model import LoraConfig
from ..engine.planner_hardware import GPUS, Gpu
from ..engine.planner_memory import Setting, generation_memory, training_memory
from ..engine.planner_shape import ModelShape, Row

GROUP, COMPLETION = 8, 4000
LONGEST = 4_000_000
ADAPTERS = Setting(dtype="bfloat16", lora=LoraConfig())
STEPS = (
    ("adapters on bf16 weights", ADAPTERS),
    ("and checkpointing", replace(ADAPTERS, gradient_checkpointing=True)),
    ("and MLPs in pieces", replace(ADAPTERS, gradient_checkpointing=True, tile_tokens=8192)),
    ("and offloading", replace(ADAPTERS, gradient_checkpointing=True, tile_tokens=8192, offload_activations=True)),
)


def room_lines(shape: ModelShape) -> list[str]:
    """For this machine's first GPU, or its memory."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if torch.cuda.is_available():
        seen = torch.cuda.get_device_properties(0)
        gpu = replace(GPUS["h100-80"], name=seen.name, memory=float(seen.total_memory), host_memory=memory)
        on = f"on one {seen.name}"
    else:
        gpu = replace(GPUS["h100-80"], name="CPU", memory=memory, host_memory=memory)
        on = "in this machine's memory (an estimate: the plan knows GPUs, and a CPU would take days)"
    head = f"groups of {GROUP} completions of {COMPLETION:,} tokens, generation included, {on}"
    return [head, *(f"{name}: {_said(longest_prompt(shape, setting, gpu))}" for name, setting in STEPS)]


def longest_prompt(
    shape: ModelShape, setting: Setting, gpu: Gpu, *, group: int = GROUP, completion: int = COMPLETION
) -> int:
    """Tokens of the longest prompt whose group fits in one row and in the generator; 0 if none does."""

    def fits(prompt: int) -> bool:
        row = Row(1, prompt, group, completion)
        update = training_memory(shape, setting, row)
        generation = generation_memory(shape, setting, row.tokens, prompt)
        return max(update.total, generation.total) <= gpu.usable and update.host <= gpu.host_memory

    low, high = 0, LONGEST
    if not fits(1):
        return 0
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _said(tokens: int) -> str:
    return f"{tokens:,} tokens" if tokens else "doesn't fit at all"
