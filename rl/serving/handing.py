"""What the generator calls when servers lack the policy's weights: they are pushed, by the way that the first push chooses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..policy import Policy, model_source
from .sync import SyncReport, WeightSync
from .sync_config import SyncConfig
from .sync_kinds import weight_sync


class Handing:
    """A `HandOver`; all ranks call it. `owner`, `folder` and `probe_ids` as `weight_sync` has them."""

    def __init__(self, config: SyncConfig, owner: str, folder: Path, probe_ids: Sequence[int] = ()) -> None:
        self.config, self.owner, self.folder, self.probe_ids = config, owner, folder, probe_ids
        self.sync: WeightSync | None = None
        self._reports: list[SyncReport] = []

    def __call__(self, policy: Policy, urls: Sequence[str]) -> None:
        """Raises SyncError, ServerError or ValueError as `WeightSync.push`."""
        if self.sync is None:
            name = model_source(policy.config)
            self.sync = weight_sync(policy, urls, name, self.owner, self.config, self.folder, self.probe_ids)
        self._reports.append(self.sync.push(policy, policy.version, urls))

    def rest(self) -> None:
        """Rank 0: servers that share a GPU with the trainer sleep until the next push. One was made."""
        assert self.sync is not None
        if self.sync.gate.awake:
            self.sync.sleep()

    def close(self) -> None:
        """Rank 0: another run may have the servers. Raises SyncError or ServerError."""
        if self.sync is not None:
            self.sync.close()

    @property
    def model(self) -> str | None:
        """What requests must name: None for the model that the server was started with."""
        if self.sync is None or self.sync.served_model == self.sync.base_model:
            return None
        return self.sync.served_model

    def metrics(self) -> dict[str, float]:
        """Of the pushes since they were last taken: seconds and bytes of all, the rest of the last."""
        if not self._reports:
            return {}
        made = self._reports[-1].metrics()
        for name in ("sync/seconds", "sync/bytes"):
            made[name] = sum(report.metrics()[name] for report in self._reports)
        self._reports.clear()
        return made
