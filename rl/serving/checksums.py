"""A server's own checksums of its weights, around a push: that something changed when it should have, and nothing when nothing should.

vLLM sums the parameters that it holds by name. On a GPU these are all; its CPU build keeps the linear layers repacked and sums
empty tensors in their place, so there only embeddings and norms speak, and a head that was left behind doesn't.
"""

from __future__ import annotations

from .control import Control, SyncError


class Checksums:
    """What each server's weights summed up to after its last push, and of what weights (`handed`, None: not known)."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._before: dict[str, dict[str, str]] = {}
        self._after: dict[str, dict[str, str]] = {}
        self._handed: dict[str, str | None] = {}

    def forget(self, url: str) -> None:
        """It started again, or dropped its weights."""
        self._after.pop(url, None)
        self._handed.pop(url, None)

    def before(self) -> None:
        """Before a hand-over, with the servers stopped.

        Raises:
            SyncError: since the last push someone changed them.
        """
        self._before = dict(zip(self.control.urls, self.control.checksums(), strict=True))
        for url, found in self._before.items():
            changed = _changed(self._after.get(url, found), found)
            if changed:
                raise SyncError(
                    f"{url} still has its mark, but its weights have changed since the last push: {_named(changed)}. "
                    "Another run pushed to it, or it was reloaded by hand"
                )

    def after(self, version: int, handed: str | None) -> None:
        """After a hand-over of weights with the fingerprint `handed`.

        Raises:
            SyncError: no weight changed, though what was handed over did.
        """
        for url, now in zip(self.control.urls, self.control.checksums(), strict=True):
            last = self._handed.get(url)
            if None not in (handed, last) and handed != last and not _changed(self._before[url], now):
                raise SyncError(
                    f"{url} answered that it took version {version}, and none of its {len(now)} weights changed"
                )
            self._after[url], self._handed[url] = now, handed


def _changed(was: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
