"""What the generator calls when servers lack the policy's weights: they are pushed, by the way that the first push chooses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..policy import Policy, model_source
from .sync import SyncReport, WeightSync
from .sync_config import SyncConfig
from .sync_kinds import weight_sync


class Handing:
    """A `HandOver`; all ranks call it. `owner` and `folder` as `weight_sync` has them."""

    def __init__(self, config: SyncConfig, owner: str, folder: Path) -> None:
        self.config, self.owner, self.folder = config, owner, folder
        self.sync: WeightSync | None = None
        self._reports: list[SyncReport] = []

    def __call__(self, policy: Policy, urls: Sequence[str]) -> None:
        """Raises SyncError, ServerError or ValueError as `WeightSync.push`."""
        if self.sync is None:
            name = model_source(policy.config)
            self.sync = weight_sync(policy, urls, name, self.owner, self.config, self.folder)
        self._reports.append(self.sync.push(policy, policy.version, urls))

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
        for name in ("timing_s/sync_weights", "sync/bytes"):
            made[name] = sum(report.metrics()[name] for report in self._reports)
        self._reports.clear()
        return made
