"""`longreach doctor`: what this machine has, what of it works, what would run, and what to install next.

It crashes on nothing: each package is imported in a process of its own, so that a broken one costs a line, not the report.
Exit status 1 only if something that is needed can't be imported or is out of its range.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers.utils.versions import require_version

from ..engine.launch import Job
from ..engine.model import pick_device
from ..engine.planner_shape import KNOWN, model_shape
from ..kernels.attention_choice import BACKENDS, choose, unsuited
from ..kernels.linear_logprob import BACKENDS as LOSS_BACKENDS
from ..kernels.linear_logprob import choose as choose_loss
from .console import Console
from .doctor_links import link_lines
from .doctor_room import room_lines
from .serving.config import ServingConfig

NEEDED = (
    "torch",
    "transformers",
    "numpy",
    "tokenizers",
    "safetensors",
    "datasets",
    "pyarrow",
    "httpx",
    "rich",
    "matplotlib",
)
EXTRAS = {
    "peft": "adapters (LoRA): `longreach[lora]`",
    "torchao": "8-bit and offloaded optimizers: `longreach[torchao]`",
    "liger_kernel": "fused norms, rotations and gates: `longreach[liger]`",
    "ring_flash_attn": "another ring schedule: `longreach[ring]`",
    "flash_attn": "FlashAttention's own kernels, for the ring above",
    "tensorboard": "metrics there: `longreach[tensorboard]`",
    "trackio": "metrics there: `longreach[trackio]`",
    "wandb": "metrics there: `longreach[wandb]`",
}
DISTRIBUTIONS = {"liger_kernel": "liger-kernel", "ring_flash_attn": "ring-flash-attn", "flash_attn": "flash-attn"}
IMPORT_S = 120


@dataclass(frozen=True)
class Package:
    """What is known of one package: its version, and why it doesn't work."""

    name: str
    version: str | None
    problem: str | None = None

    @property
    def line(self) -> str:
        if self.version is None and self.problem is None:
            return f"{self.name}: not installed"
        return f"{self.name} {self.version or '?'}" + (f": BROKEN, {self.problem}" if self.problem else "")


def add_doctor(commands: Any) -> None:
    """Adds the command to the parser of `longreach`."""
    command = commands.add_parser(
        "doctor", help="what this machine has, what works, what to install next", allow_abbrev=False,
        epilog="Started by torchrun it also measures the links between ranks.",
    )  # fmt: skip
    command.add_argument("--model", default="Qwen/Qwen3-8B", help=f"whose longest prompt is asked for: a folder, a name on the hub, or {', '.join(KNOWN)}")  # fmt: skip
    command.set_defaults(run=run_doctor)


def run_doctor(known: argparse.Namespace, overrides: Sequence[tuple[str, str]], console: Console, job: Job) -> int:
    """Prints the report; 1 if something needed is broken."""
    if overrides:
        raise ValueError(f"doctor takes no recipe keys, but got --{overrides[0][0]}")
    shape = model_shape(known.model)  # a name that is wrong is told before anything else
    device = pick_device()
    links = link_lines(job, device)
    if not links:
        return 0  # another rank has the word
    needed = [look_at(name) for name in (*NEEDED, *(["triton"] if sys.platform == "linux" else []))]
    extras = [look_at(name) for name in EXTRAS]
    sections = {
        "machine": machine_lines(),
        "needed": [package.line for package in needed],
        "extras": [package.line for package in extras],
        "attention": attention_lines(device),
        "loss": loss_lines(device),
        "servers": server_lines(),
        "links": links,
        f"longest prompt of {known.model}": room_lines(shape),
        "next": [advice(needed, extras, device)],
    }
    for name, lines in sections.items():
        console.say("\n".join([f"{name}:", *(f"  {line}" for line in lines)]))
    return int(any(package.problem or package.version is None for package in needed))


def look_at(name: str, ranges: Sequence[str] | None = None) -> Package:
    """Imports a package in a process of its own; `ranges` are this project's requirements (default: its own metadata)."""
    distribution = DISTRIBUTIONS.get(name, name)
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        version = None
    try:
        found = find_spec(name) is not None
    except ValueError:  # a module that was put there by hand, without a spec
        found = True
    if not found:
        return Package(name, version, "its files are gone: install it again" if version else None)
    outside = _out_of_range(distribution, version, _requirements() if ranges is None else ranges)
    works = name in sys.modules  # imported by this very program
    return Package(name, version, (None if works else _import_error(name)) or outside)


def _import_error(name: str) -> str | None:
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=IMPORT_S
        )
    except subprocess.TimeoutExpired:
        return f"its import takes more than {IMPORT_S} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"its import ends with status {done.returncode}"


def _requirements() -> Sequence[str]:
    try:
        return metadata.requires("longreach") or ()
    except metadata.PackageNotFoundError:
        return ()


def _out_of_range(distribution: str, version: str | None, requirements: Sequence[str]) -> str | None:
    """Whether an installed version lies outside the range of the requirement of that name."""
    for text in requirements:
        wanted = text.partition(";")[0].strip()
        if (
            version is None
            or not wanted.startswith(distribution)
            or wanted.removeprefix(distribution)[:1] not in tuple("<>=!")
        ):
            continue
        try:
            require_version(wanted)
        except ImportError:
            return f"outside the range that was tried ({wanted.removeprefix(distribution)})"
    return None


def machine_lines() -> list[str]:
    """System, memory, GPUs, driver, CUDA."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines = [
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores, {memory:.0f} GB"
    ]
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return [*lines, f"no GPU ({built})"]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        lines.append(f"GPU {i}: {gpu.name}, {gpu.total_memory / 1e9:.1f} GB, capability {gpu.major}.{gpu.minor}")
    return [*lines, f"CUDA {torch.version.cuda}, driver {_driver()}"]


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown (there is no nvidia-smi)"
    done = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return (
        done.stdout.split("\n")[0].strip()
        if done.returncode == 0
        else f"unknown (nvidia-smi ends with {done.returncode})"
    )


def server_lines() -> list[str]:
    """vLLM, which has an environment of its own and is never imported here."""
    try:
        home = ServingConfig().interpreter().parents[1]
    except ValueError:
        return ["vLLM: not installed (make vllm)"]
    found = sorted(path.name for path in home.glob("lib/python*/site-packages/vllm*.dist-info"))
    return [f"{name.removesuffix('.dist-info').replace('-', ' ')} in {home}" for name in found] or [
        f"vLLM: not in {home}, its install was cut off (make vllm)"
    ]


def attention_lines(device: torch.device) -> list[str]:
    """Which backends can take a bf16 call with heads of 128 here, and which `auto` takes."""
    q = torch.zeros(4, 1, 128, dtype=torch.bfloat16, device=device)
    lines = [f"{name}: {unsuited(name, q) or 'can run'}" for name in BACKENDS if name != "auto"]
    picks = ", ".join(f"{stage} {choose('auto', stage, q, 16)}" for stage in ("forward", "backward"))
    return [*lines, f"auto takes: {picks}"]


def loss_lines(device: torch.device) -> list[str]:
    x = torch.zeros(4, 16, dtype=torch.bfloat16, device=device)
    lines = []
    for name in LOSS_BACKENDS:
        if name != "auto":
            lines.append(f"{name}: {_loss_problem(name, x) or 'can run'}")
    return [*lines, f"auto takes: {choose_loss('auto', x, x)}"]


def _loss_problem(name: str, x: Tensor) -> str | None:
    try:
        choose_loss(name, x, x)
    except ValueError as error:
        return str(error).partition("can't run here: ")[2].partition(";")[0] or str(error)
    return None


def advice(needed: Sequence[Package], extras: Sequence[Package], device: torch.device) -> str:
    """The one thing worth doing next."""
    broken = [package for package in needed if package.problem or package.version is None]
    if broken:
        return f"repair {broken[0].name}: pip install --force-reinstall {DISTRIBUTIONS.get(broken[0].name, broken[0].name)}"
    absent = {package.name for package in extras if package.version is None}
    for package in extras:
        if package.problem and not any(f"No module named '{name}'" in package.problem for name in absent):
            return f"repair or remove {package.name} ({package.problem})"
    worth = ["peft"] if device.type == "cpu" else ["peft", "torchao", "liger_kernel"]
    for package in extras:
        if package.name in worth and package.version is None:
            return f"{package.name} would bring {EXTRAS[package.name]}"
    return "nothing is missing" + ("" if device.type == "cuda" else " (a GPU aside)")
