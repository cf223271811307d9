"""Which way weights go: as told, or what model and servers are set up for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..policy import Policy
from .control import Control
from .sync import WeightSync
from .sync_config import SyncConfig
from .sync_files import FileSync
from .sync_lora import LoraSync
from .sync_transfer import IpcSync, NcclSync


def weight_sync(
    policy: Policy,
    urls: Sequence[str],
    model: str,
    owner: str,
    config: SyncConfig,
    folder: Path,
    probe_ids: Sequence[int] = (),
) -> WeightSync:
    """For the servers at `urls`, which serve the policy as `model` and must be up; all ranks call it.

    Args:
        owner: this run, for messages to it and to others: its host and folder, say. A run that is resumed has the same.
        folder: where hand-overs go unless `config.folder` names another.
        probe_ids: the probe's prompt; random tokens where it is empty or short.
    """
    kind = policy.ranks.together(lambda: _kind(policy, urls, config), lambda: None)
    config, folder = replace(config, kind=kind), Path(config.folder) if config.folder else folder
    if kind == "safetensors":
        return FileSync(urls, model, owner, config, probe_ids, folder=folder)
    if kind == "lora":
        return LoraSync(urls, model, owner, config, probe_ids, folder=folder)
    return (NcclSync if kind == "nccl" else IpcSync)(urls, model, owner, config, probe_ids)


def _kind(policy: Policy, urls: Sequence[str], config: SyncConfig) -> str:
    """Adapters if all servers take them, else what all were started for, else files, which all take."""
    if config.kind != "auto":
        return config.kind
    facts, lora = Control(urls, config.deadline).facts(), policy.config.lora
    if lora is not None and config.sleep < 2 and all(fact.lora_rank >= lora.rank for fact in facts):
        return "lora"
    ways = {fact.transfer for fact in facts}
    if len(ways) == 1 and ways <= {"nccl", "ipc"} and policy.model.device.type == "cuda":
        return str(ways.pop())
    return "safetensors"
