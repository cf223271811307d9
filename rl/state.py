"""What a checkpoint of a run holds beside the weights, and how it is written and read back.

Weights stand in the transformers layout (or as adapter tensors), so a checkpoint's `model/` loads anywhere; optimizer
averages, random states, sampler position with its returned prompts, curriculum and pool are JSON and safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..engine.checkpoint import (
    drop_newer,
    latest_checkpoint,
    load_state,
    rng_state,
    save_checkpoint,
    save_state,
    set_rng_state,
)
from ..engine.model import save_model, trainable
from ..engine.whole import shard_like, whole
from .policy import Policy


@dataclass
class Progress:
    """Where a run stands. `stage` indexes the run's list of stages; `stage_step` steps of it are done, `step` of all.

    `entropy` is what the entropy rules remember; it goes on from phase to phase, since the policy does.
    """

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    sampler: dict[str, Any] | None = None
    entropy: dict[str, Any] | None = None
    members: list[int] = field(default_factory=list)


def save(policy: Policy, optimizer: torch.optim.Optimizer | None, progress: Progress, root: Path, keep: int) -> Path:
    """One complete checkpoint named by the global step; all ranks call it. OSError leaves the older ones standing."""
    begun = []

    def write(folder: Path | None) -> None:
        """Each part gathers, then writes where there is a folder; ranks that wait to gather are not left alone."""
        begun.append(folder)
        problem = None
        for part in (
            lambda at: save_weights(policy, at),
            lambda at: save_state(optimizer.state_dict() if optimizer else None, at, "optimizer"),
            lambda at: save_state({**vars(progress), "rng": rng_state()}, at, "progress"),
        ):
            try:
                part(folder)
            except OSError as error:
                problem, folder = error, None
        if problem is not None:
            raise problem

    def lead() -> Path:
        try:
            return save_checkpoint(root, progress.step, write, keep=keep)
        finally:
            if not begun:
                write(None)

    return policy.ranks.together(lead, lambda: write(None))


def save_weights(policy: Policy, folder: Path | None) -> None:
    """What a checkpoint needs of the model: all of it, or its adapters."""
    if policy.config.lora is None:
        _save_model(policy, folder and folder / "model")
        return
    adapters = {name: whole(p.detach()).cpu().contiguous() for name, p in trainable(policy.model).items()}
    with _full_disk_as_oserror():  # the base model is on disk already
        if folder is not None:
            save_file(adapters, folder / "adapters.safetensors")


def save_plain(policy: Policy, folder: Path) -> None:
    """The whole model, adapters merged, in the transformers layout; all ranks call it. Raises OSError."""
    policy.ranks.together(lambda: _save_model(policy, folder), lambda: _save_model(policy, None))


def _save_model(policy: Policy, folder: Path | None) -> None:
    with _full_disk_as_oserror():
        save_model(policy.model, policy.tokenizer, folder)


@contextmanager
def _full_disk_as_oserror() -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:  # safetensors has an exception of its own for it
        raise OSError(str(error)) from error


def load_adapters(policy: Policy, folder: Path) -> None:
    parameters = trainable(policy.model)
    saved = load_file(folder / "adapters.safetensors")
    if saved.keys() != parameters.keys():
        raise ValueError(f"{folder}: its adapters belong to another [model.lora] section")
    for name, tensor in saved.items():
        with torch.no_grad():
            parameters[name].copy_(shard_like(tensor, parameters[name]))
    policy.version += 1


def newest(root: Path, say: Callable[[str], None]) -> tuple[Path, Progress] | None:
    """The newest intact checkpoint and its progress; later leftovers are removed."""
    folder = latest_checkpoint(root, say)
    if folder is None:
        if any(root.glob("[0-9]*")):
            say(f"no checkpoint in {root} is intact: starting from the beginning")
        drop_newer(root, -1)
        return None
    saved = load_state(folder, "progress")
    saved.pop("rng")
    progress = Progress(**saved)
    drop_newer(root, progress.step)
    return folder, progress


def restore_random_states(folder: Path) -> None:
    """Python's, numpy's and torch's generators as they were; called last, since loading a model may draw from them."""
    set_rng_state(load_state(folder, "progress")["rng"])


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Averages as they were, each rank its own shard of them, whatever number of ranks wrote them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def place(path: tuple[Any, ...], tensor: torch.Tensor) -> torch.Tensor:
        like = parameters[path[1]] if path[0] == "state" else tensor
        return shard_like(tensor, like) if tensor.shape == like.shape else tensor

    saved = load_state(folder, "optimizer", place)
    assert saved is not None, "a checkpoint within a training stage holds its optimizer"
    optimizer.load_state_dict(saved)
