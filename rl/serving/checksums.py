"""A server's own checksums of its weights, around a push: that something changed when it should have, and nothing when nothing should.

vLLM sums the parameters that it holds by name. On a GPU these are all; its CPU build keeps the linear layers repacked and sums
empty tensors in their place, so there only embeddings and norms speak, and a head that was left behind doesn't.
"""

from __future__ import annotations

from .control import Control, SyncError


class Checksums:
    """What the servers' weights summed up to after the last push, and of what weights (`handed`, None: not known)."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._before: list[dict[str, str]] | None = None
        self._after: list[dict[str, str]] | None = None
        self._handed: str | None = None

    def before(self, version: int | None, *, kept: bool = True) -> None:
        """Before a hand-over, with the servers stopped. `kept` False: they dropped their weights since.

        Raises:
            SyncError: since the last push, of `version`, someone changed them.
        """
        self._before = self.control.checksums()
        if self._after is None or not kept:
            return
        for url, was, found in zip(self.control.urls, self._after, self._before, strict=True):
            changed = _changed(was, found)
            if changed:
                raise SyncError(
                    f"{url} says that it has version {version}, but its weights have changed since: {_named(changed)}. "
                    "Another run pushed to it, or it was reloaded by hand"
                )

    def after(self, version: int, handed: str | None) -> None:
        """After a hand-over of weights with the fingerprint `handed`.

        Raises:
            SyncError: no weight changed though the policy's did, or one did though they are the same.
        """
        assert self._before is not None
        found = self.control.checksums()
        if handed is not None and self._handed is not None:
            for url, was, now in zip(self.control.urls, self._before, found, strict=True):
                changed = _changed(was, now)
                if handed != self._handed and not changed:
                    raise SyncError(
                        f"{url} answered that it took version {version}, and none of its {len(now)} weights changed"
                    )
        self._after, self._handed = found, handed


def _changed(was: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
