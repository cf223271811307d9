"""A server's own checksums of its weights, around a push: those that it can be held to are exactly what was handed over.

vLLM sums the bytes of each parameter that it holds (SHA-256), by its own names. Some of them it holds as they were handed over:
norms, and embeddings where it didn't pad them. The first push finds out which, and from then on they must match to the bit,
which shows a push that did not arrive however small the step was. The rest can't be compared: projections that it fused,
and in the CPU build all linear layers, which it repacked and whose place an empty tensor has. Those are left to the probe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .control import Control, SyncError


class Checksums:
    """What each server's weights summed up to after its last push, and by which of them pushes are judged."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._after: dict[str, dict[str, str]] = {}
        self._telling: dict[str, set[str]] = {}

    def forget(self, url: str) -> None:
        """It started again, or dropped its weights: which of them tell stays known."""
        self._after.pop(url, None)

    def before(self) -> None:
        """Before a hand-over, with the servers stopped.

        Raises:
            SyncError: since the last push someone changed them.
        """
        for url, found in zip(self.control.urls, self.control.checksums(), strict=True):
            changed = _changed(self._after.get(url, found), found)
            if changed:
                raise SyncError(
                    f"{url} still has its mark, but its weights have changed since the last push: {_named(changed)}. "
                    "Another run pushed to it, or it was reloaded by hand"
                )

    def after(self, version: int, handed: dict[str, str]) -> None:
        """After a hand-over of weights whose sums, by their checkpoint's names, are `handed`.

        Raises:
            SyncError: weights that matched what was handed over in the first push do not.
        """
        for url, now in zip(self.control.urls, self.control.checksums(), strict=True):
            matching = {name for name, digest in now.items() if handed.get(_plain(name)) == digest}
            missing = self._telling.setdefault(url, matching) - matching
            if missing:
                raise SyncError(
                    f"{url} answered that it took version {version}, but of {len(self._telling[url])} weights that both sides "
                    f"can sum {len(missing)} are others: {_named(sorted(missing))}"
                )
            self._after[url] = now


def noted(pairs: Iterator[tuple[str, Tensor]], sums: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The pairs as they come; their sums go into `sums`."""
    for name, tensor in pairs:
        sums[name] = hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
        yield name, tensor


def _plain(name: str) -> str:
    """A server's name for a parameter ("dp0:pp0:pcp0:tp0:model.norm.weight") as the checkpoint has it."""
    return name.rpartition(":")[2].replace(".base_layer.", ".")


def _changed(was: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
