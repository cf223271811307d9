"""The planner against this device: the measured peak of a real micro-batch beside its trace and, on a GPU, the formulas.

    python -m bench.plan [--out FILE]                        the CPU: the trace alone has a CPU to be held against
    bench/gpu.sh with python -m bench.plan --out FILE        a GPU

A model of real widths and few layers, random weights, gradients already there, one packed row forward and backward; the
peak includes weights and gradients. Prints a row for each case and writes them with the conditions they were measured in.
Exit status 1 if one is off by more than it may be.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from longreach.engine import Group, completion_policy_loss
from longreach.engine import attention as engine_attention
from longreach.engine.planner_memory import Setting, training_memory
from longreach.engine.planner_shape import KNOWN, ModelShape, Row, config_of
from longreach.engine.planner_trace import trace_step

from . import results
from .memory import peak_bytes

BOUND = 0.10
PLAIN = Setting(dtype="bfloat16")
AUTOCAST = Setting(autocast=True)
SMALL = ModelShape(2, 256, 768, 4, 2, 64, 8192, qk_norm=True)


@dataclass(frozen=True)
class Measured:
    """Bytes: what the device counted, the trace, and the formulas (None on a CPU, whose buffers they don't describe)."""

    what: str
    measured: int
    traced: int
    formula: float | None

    @property
    def off(self) -> float:
        """The larger of the two errors, relative to what was measured."""
        guesses = [self.traced, *([] if self.formula is None else [self.formula])]
        return max(abs(guess / self.measured - 1) for guess in guesses)

    def row(self) -> Mapping[str, Any]:
        return {"what": self.what, "measured": self.measured, "traced": self.traced, "formula": self.formula}


def cases(device: str) -> list[tuple[str, ModelShape, Setting, Row]]:
    """What is measured on a device."""
    if device == "cpu":
        row = Row(1, 1024, 4, 128)
        settings = {"fp32": replace(PLAIN, dtype="float32"), "bf16": PLAIN, "bf16 checkpointed": _checkpointed(PLAIN)}
        return [(name, SMALL, setting, row) for name, setting in settings.items()]
    found = []
    for model in ("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B"):
        shape = replace(KNOWN[model], layers=2)
        for name, setting in {
            "bf16 checkpointed": _checkpointed(PLAIN), "bf16": PLAIN, "autocast checkpointed": _checkpointed(AUTOCAST),
        }.items():  # fmt: skip
            found.append((f"{model}, {name}", shape, setting, Row(1, 16_000, 8, 1000)))
    return found


def _checkpointed(setting: Setting) -> Setting:
    return replace(setting, gradient_checkpointing=True)


def measure(what: str, shape: ModelShape, setting: Setting, row: Row, device: str) -> Measured:
    """One case for real, traced, and by formula."""
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    formula = None
    if device == "cuda":
        memory = training_memory(shape, setting, row)
        formula = memory.total - memory.parts["optimizer"]
    traced = trace_step(config_of(shape), setting, row, capability=capability).peak
    return Measured(what, real_peak(shape, setting, row, device), traced, formula)


def real_peak(shape: ModelShape, setting: Setting, row: Row, device: str) -> int:
    """The peak of the second micro-batch of an update, weights and gradients counted."""
    torch.manual_seed(0)
    dtype = torch.float32 if setting.dtype == "float32" else torch.bfloat16
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            config_of(shape), dtype=dtype, attn_implementation=engine_attention.NAME
        )
    model.train()
    if setting.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ids = [torch.randint(shape.vocab, (n,)) for n in (row.prompt, row.completion)]
    groups = [Group(ids[0], [ids[1]] * row.size) for _ in range(row.groups)]
    advantages = torch.ones(row.loss_rows, device=device)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16) if setting.autocast else nullcontext():
            made = completion_policy_loss(
                model, groups, None, advantages, kind="grpo", normalizer=1.0, shared_prefix=row.shared
            )
        made.loss.backward()

    step()
    held = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    held += sum(b.numel() * b.element_size() for b in model.buffers())
    return held + peak_bytes(step, device)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = []
    for case in cases(device):
        made.append(measure(*case, device))
        one = made[-1]
        formula = "" if one.formula is None else f", formula {one.formula / 1e9:.3f}"
        print(f"{one.what}: measured {one.measured / 1e9:.3f} GB, traced {one.traced / 1e9:.3f}{formula}", flush=True)
        if options.out:
            conditions = results.conditions(device, options.commit)
            options.out.write_text(
                json.dumps({"conditions": conditions, "rows": [x.row() for x in made]}, indent=1) + "\n"
            )
    wrong = [one.what for one in made if one.off > BOUND]
    if wrong:
        print(f"off by more than {BOUND:.0%}: {'; '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
