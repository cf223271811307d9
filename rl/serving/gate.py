"""Servers stopped for new weights and set going again, in the one order that works.

A server of its own pauses, takes the weights, drops its prefix cache and resumes. One that shares its GPU with the trainer
sleeps while that trains; its weights' memory comes back first, then the weights, and only then the cache's memory, so that
the peak is that of one of them: sleep, (train), wake the weights, (hand over), wake the cache, drop what it knew. Each step
is taken from one state only, so no other order can be asked for.

Not run on a GPU: the CPU server goes through the same states but keeps its memory.
"""

from __future__ import annotations

from .control import Control, SyncError
from .http import ServerError
from .sync_config import SyncConfig

AWAKE, ASLEEP, OPEN = "awake", "asleep", "open for weights"


class Gate:
    """`state` is what all servers are in; after an error they may not be, and nothing is asked of them any more."""

    def __init__(self, control: Control, config: SyncConfig) -> None:
        self.control, self.config = control, config
        self.state = AWAKE

    @property
    def awake(self) -> bool:
        return self.state == AWAKE

    def check(self) -> None:
        """SyncError unless requests would be served."""
        if not self.awake:
            raise SyncError(f"the servers are {self.state}: push weights before anything is generated")

    def sleep(self) -> None:
        """AWAKE -> ASLEEP: running requests end first."""
        if not self.config.sleep:
            raise ValueError("generator.sync.sleep is 0, so these servers don't share a GPU with the trainer")
        self.check()
        self.control.post("/sleep", level=self.config.sleep, mode=self.config.pause)
        self.state = ASLEEP

    def close(self) -> None:
        """AWAKE or ASLEEP -> OPEN: nothing is generated, and weights have their memory."""
        if self.state == OPEN:
            raise SyncError(
                "a hand-over failed before this one: what the servers have is not known, so they must be restarted"
            )
        if not self.config.sleep:
            self.control.post("/pause", mode=self.config.pause)
        else:
            if self.awake:
                self.sleep()
            self._wake("weights", still_asleep=True)
        self.state = OPEN

    def open(self) -> None:
        """OPEN -> AWAKE, with an empty prefix cache."""
        assert self.state == OPEN
        if self.config.sleep:
            self._wake("kv_cache", still_asleep=False)
        self._drop_cache()
        if not self.config.sleep:
            self.control.post("/resume")
        self.state = AWAKE

    def _wake(self, part: str, *, still_asleep: bool) -> None:
        due = "sleeping" if still_asleep else "awake"
        for url, answer in zip(self.control.urls, self.control.post("/wake_up", tags=part), strict=True):
            if not isinstance(answer, dict) or answer.get("status") != due:
                raise ServerError(url, f"after waking its {part} it should be {due}, and says {answer!r}")

    def _drop_cache(self) -> None:
        # Requests that were kept hold blocks: they are computed again, with the new weights.
        kept = {"reset_running_requests": "true"} if self.config.pause == "keep" else {}
        for url, answer in zip(self.control.urls, self.control.post("/reset_prefix_cache", **kept), strict=True):
            if not isinstance(answer, dict) or answer.get("success") is not True:
                raise ServerError(
                    url, f"its prefix cache was not reset ({answer!r}): it would go on with old keys and values"
                )
