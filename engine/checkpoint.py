"""Checkpoints that survive a kill at any moment.

Written aside, synced to disk, sealed by a manifest of SHA-256 sums, then renamed: a folder with the final name is
complete, and one that was damaged later is recognised and passed over for the one before it. State is tensors in
safetensors plus JSON; nothing is pickled, so nothing from a run folder can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .tensor_file import write_tensors
from .whole import whole

MANIFEST = "COMPLETE.json"
_ASIDE = ".writing-"
UNFINISHED = ".unfinished"
"""Ending of a file that is being written: a kill can leave one, and no pattern for finished files matches it."""
_REPLACED = ".replaced"
Keys = tuple[Any, ...]
"""Where in a nested state a tensor stands: the keys and indices that lead to it."""


def save_checkpoint(root: Path, step: int, write: Callable[[Path], None], *, keep: int = 2) -> Path:
    """Calls `write(folder)` on a folder aside, seals it, names it `{step:08d}` and drops all but the newest `keep`.

    Raises:
        OSError: the disk is full or not writable. What was written aside is removed and older checkpoints stand.
    """
    assert keep >= 1 and 0 <= step < 10**8
    root.mkdir(parents=True, exist_ok=True)
    final, aside = root / f"{step:08d}", root / f"{_ASIDE}{step:08d}"
    replaced = final.with_suffix(_REPLACED)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        write(aside)
        _seal(aside)
        if final.exists():  # the same step again after a resume; at each moment one of the two has a name that counts
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        aside.rename(final)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in _folders(root)[:-keep]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint, or None; what is damaged is named through `say` and left where it is."""
    for folder in reversed(_folders(root)):
        damage = _damage(folder)
        if damage is None:
            return folder
        say(f"checkpoint {folder} is damaged ({damage}): falling back to the one before it")
    return None


def drop_newer(root: Path, step: int) -> None:
    """Removes checkpoints after `step` (damaged ones that were passed over) and what a kill left half-written."""
    for folder in _folders(root):
        if int(folder.stem) > step:
            shutil.rmtree(folder)
    for left in root.glob(f"{_ASIDE}*"):
        shutil.rmtree(left)


def _folders(root: Path) -> list[Path]:
    """By step; a replaced one that a kill left standing comes before the one that replaced it."""
    named = [*root.glob("[0-9]" * 8), *root.glob("[0-9]" * 8 + _REPLACED)]
    return sorted((path for path in named if path.is_dir()), key=lambda path: (path.stem, path.suffix != _REPLACED))


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): _digest(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync(path)


def _damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None. A file that can't be read is damage like any other."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is missing or unreadable: {error}"
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is not a manifest"
    for name, digest in manifest.items():
        try:
            if _digest(folder / name) != digest:
                return f"{name} has other contents"
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """A text file that is either the old one or the new one, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}{UNFINISHED}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync(path.parent)


def save_state(state: Any, folder: Path | None, name: str) -> None:
    """Nested dicts, lists, tuples, numbers, strings, None and tensors -> `name.json` and `name.safetensors`.

    With sharded tensors a collective call: one rank has a folder, the others pass None. Tensors are made whole and written
    one after the other, so that no rank ever holds two. Torch's distributed checkpoint would write all ranks' shards at
    once, but keeps its metadata in a pickle, and its safetensors form has no place for an optimizer's numbers.

    Raises:
        OSError: the disk is full. The other ranks are not left waiting.
    """
    leaves: list[Tensor] = []
    text = json.dumps(_encode(state, leaves))
    wholes = (whole(leaf.detach()) for leaf in leaves)
    try:
        if folder is not None:
            (folder / f"{name}.json").write_text(text)
            write_tensors(folder / f"{name}.safetensors", leaves, wholes)
    finally:
        for _ in wholes:  # what the others are waiting to gather
            pass


def load_state(folder: Path, name: str, place: Callable[[Keys, Tensor], Tensor] = lambda path, tensor: tensor) -> Any:
    """What `save_state` wrote; each tensor goes from the file through `place`, with the keys that lead to it."""
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        text = json.loads((folder / f"{name}.json").read_text())
        return _decode(text, (), lambda path, key: place(path, file.get_tensor(key)))


def _encode(value: Any, leaves: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        leaves.append(value)
        return {"tensor": str(len(leaves) - 1)}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, leaves), _encode(v, leaves)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, leaves) for v in value]}
    if isinstance(value, list):
        return {"list": [_encode(v, leaves) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint can't hold {type(value).__name__}")


def _decode(value: Any, path: Keys, tensor: Callable[[Keys, str], Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensor(path, inner)
    if kind == "dict":
        pairs = [(_decode(k, path, tensor), v) for k, v in inner]
        return {k: _decode(v, (*path, k), tensor) for k, v in pairs}
    items = [_decode(v, (*path, i), tensor) for i, v in enumerate(inner)]
    return tuple(items) if kind == "tuple" else items


def rng_state() -> dict[str, Any]:
    """Every random number generator that training could touch: Python, numpy, torch on CPU and on each GPU."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            str(kind),
            torch.from_numpy(np.array(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
