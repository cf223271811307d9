"""Weights handed over as a safetensors file in a folder that trainer and servers both see: the way that any server takes, a CPU's too.

    FOLDER/00000012/   model.safetensors, config, tokenizer, sealed by checksums; a whole hand-over or none

Written aside, synced and renamed while the servers still generate; they then reload from it (vLLM's `reload_weights`, asked for
by /collective_rpc). A full disk leaves the hand-over before it standing, and the servers as they were. A server can be started
from a hand-over as from any checkpoint. It costs the disk's time twice, and a server that doesn't see the folder dies of it
(vLLM ends its engine when a reload fails): GPUs that reach each other have `sync_transfer`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ...engine.checkpoint import drop_newer, save_checkpoint
from ...engine.plain_weights import PlainWeights
from ...engine.tensor_file import write_tensors
from ..policy import Policy
from .control import SyncError
from .sync import WeightSync
from .sync_config import SyncConfig

WEIGHTS = "model.safetensors"


class FolderSync(WeightSync):
    """`folder` is an absolute path that the servers see under the same name."""

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        owner: str,
        config: SyncConfig,
        probe_ids: Sequence[int] = (),
        *,
        folder: Path,
    ) -> None:
        super().__init__(urls, model, owner, config, probe_ids)
        self.folder = folder.absolute()
        self._written: Path | None = None


class FileSync(FolderSync):
    """The whole weights."""

    how = "safetensors"

    def _prepare(self, policy: Policy, version: int) -> int:
        dtype = policy.ranks.first(lambda: self.facts()[0].dtype)
        weights = PlainWeights(policy.model, dtype)
        try:
            pairs = self._noted(weights.pairs(keep=policy.ranks.main))
            self._written = write_handover(self.folder, policy, weights, pairs, version, self.config.keep)
        except OSError as error:
            raise SyncError(self._not_written(weights.bytes, version, error)) from error
        return weights.bytes

    def _transfer(self, policy: Policy, version: int) -> int:
        def reload() -> None:
            self.control.post(
                "/collective_rpc",
                {
                    "method": "reload_weights",
                    "kwargs": {"weights_path": str(self._written)},
                    "timeout": self.config.deadline,
                },
            )

        self._lead(policy.ranks, reload)
        return 0

    def _left_behind(self) -> str:
        return (
            f"The servers are left paused, and what weights they have now is not known (do they see {self.folder}? vLLM's engine ends when a reload "
            f"fails); the hand-over itself stands in {self._written}."
        )

    def _not_written(self, size: int, version: int, error: OSError) -> str:
        try:
            free = f"{shutil.disk_usage(self.folder).free / 1e9:.2f} GB are free"
        except OSError as problem:
            free = f"the folder can't be looked at: {problem.strerror}"
        stands = "none was pushed before" if self.version is None else f"the servers still have version {self.version}"
        return (
            f"version {version} can't be written to {self.folder} ({error}): it takes {size / 1e9:.2f} GB, {free}; {stands}. "
            "Make room, or set generator.sync.folder to another disk that servers see too"
        )


def write_handover(
    root: Path, policy: Policy, weights: PlainWeights, pairs: Iterator[tuple[str, Tensor]], version: int, keep: int
) -> Path:
    """Folder `version` under `root`, complete or not there; all ranks call it. Older ones than the newest `keep` go.

    Args:
        pairs: the weights', begun on every rank.

    Raises:
        OSError: the disk is full or not writable; those before it stand. No rank is left waiting.
    """

    def write(folder: Path) -> None:
        entries = weights.entries
        tensors = (tensor for _, tensor in pairs)
        write_tensors(folder / WEIGHTS, [e.like for e in entries], tensors, [e.name for e in entries])
        policy.model.config.save_pretrained(folder)
        if policy.model.generation_config is not None:
            policy.model.generation_config.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)

    def lead() -> Path:
        try:
            drop_newer(
                root, version
            )  # of a run that went on from an older checkpoint; a version is never reused otherwise
            return save_checkpoint(root, version, write, keep=keep)
        finally:
            _drain(pairs)

    return policy.ranks.together(lead, lambda: _drain(pairs))


def _drain(pairs: Iterator[tuple[str, Tensor]]) -> None:
    """Gathers to the end what other ranks wait to gather."""
    for _ in pairs:
        pass
