from __future__ import annotations

import errno
import json
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longreach.engine.checkpoint import (
    MANIFEST,
    drop_newer,
    latest_checkpoint,
    load_state,
    rng_state,
    save_checkpoint,
    save_state,
    set_rng_state,
    write_atomically,
)


class Killed(BaseException):
    """Stands for a kill: nothing in the product catches it."""


def writing(value: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_state({"value": value, "weights": torch.full((50,), float(value))}, folder, "state")
        (folder / "model").mkdir()
        (folder / "model" / "note.txt").write_text(f"value {value}")

    return write


def quiet(message: str) -> None:
    raise AssertionError(f"nothing is damaged, yet: {message}")


def value_of(folder: Path | None) -> int:
    assert folder is not None
    saved = load_state(folder, "state")
    assert (saved["weights"] == saved["value"]).all()
    return saved["value"]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_newest_is_found_and_older_ones_are_dropped(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert latest_checkpoint(root, quiet) is None
    for step in (2, 9, 10):
        folder = save_checkpoint(root, step, writing(step), keep=2)
        assert folder.name == f"{step:08d}"
        assert latest_checkpoint(root, quiet) == folder
    assert names(root) == ["00000009", "00000010"]
    assert value_of(latest_checkpoint(root, quiet)) == 10


@pytest.mark.parametrize("death", [Killed(), KeyboardInterrupt(), TypeError("a bug")])
def test_dying_while_writing_leaves_the_older_one(death: BaseException, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writing(1))

    def write(folder: Path) -> None:
        writing(2)(folder)
        raise death

    with pytest.raises(type(death)):
        save_checkpoint(tmp_path, 2, write)
    assert value_of(latest_checkpoint(tmp_path, quiet)) == 1
    assert names(tmp_path) == ["00000001"]


def test_what_a_real_kill_leaves_is_passed_over_and_cleared(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writing(1))
    left = tmp_path / ".writing-00000002"
    left.mkdir()
    writing(2)(left)  # all but sealed and renamed
    assert value_of(latest_checkpoint(tmp_path, quiet)) == 1
    assert value_of(save_checkpoint(tmp_path, 2, writing(3))) == 3
    left.mkdir()
    drop_newer(tmp_path, 2)
    assert names(tmp_path) == ["00000001", "00000002"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for step, value in ((3, 0), (4, 1), (4, 2)):
        save_checkpoint(tmp_path, step, writing(value), keep=2)
    assert names(tmp_path) == ["00000003", "00000004"]  # the older one isn't pushed out by a second copy
    assert value_of(latest_checkpoint(tmp_path, quiet)) == 2


def test_of_a_step_and_the_one_it_replaced_the_new_one_counts(tmp_path: Path) -> None:
    """A kill after both renames, before the old folder is gone."""
    save_checkpoint(tmp_path, 4, writing(1)).rename(tmp_path / "00000004.replaced")
    newest, said = save_checkpoint(tmp_path / "aside", 4, writing(2)).rename(tmp_path / "00000004"), []
    assert latest_checkpoint(tmp_path, quiet) == newest
    flip(newest / "state.json")
    assert value_of(latest_checkpoint(tmp_path, said.append)) == 1 and said


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_replacing_a_step_can_die_at_any_rename(renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 4, writing(1), keep=1)
    rename, done = Path.rename, []

    def dying(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise Killed
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        if renames < 2:
            with pytest.raises(Killed):
                save_checkpoint(tmp_path, 4, writing(2), keep=1)
        else:
            save_checkpoint(tmp_path, 4, writing(2), keep=1)
    assert value_of(latest_checkpoint(tmp_path, quiet)) == (2 if renames == 2 else 1)
    drop_newer(tmp_path, 4)
    assert value_of(latest_checkpoint(tmp_path, quiet)) == (2 if renames == 2 else 1)
    save_checkpoint(tmp_path, 4, writing(3), keep=1)
    assert value_of(latest_checkpoint(tmp_path, quiet)) == 3
    assert names(tmp_path) == ["00000004"]


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated weights": lambda folder: truncate(folder / "state.safetensors"),
    "flipped weights": lambda folder: flip(folder / "state.safetensors"),
    "missing weights": lambda folder: (folder / "state.safetensors").unlink(),
    "flipped note": lambda folder: flip(folder / "model" / "note.txt"),
    "missing folder": lambda folder: ((folder / "model" / "note.txt").unlink(), (folder / "model").rmdir()),
    "unreadable note": lambda folder: replace_by_folder(folder / "model" / "note.txt"),
    "missing manifest": lambda folder: (folder / MANIFEST).unlink(),
    "truncated manifest": lambda folder: truncate(folder / MANIFEST),
    "empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "another manifest": lambda folder: (folder / MANIFEST).write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_falls_back_and_says_so(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writing(1))
    newest, said = save_checkpoint(tmp_path, 2, writing(2)), []
    damage(newest)
    assert value_of(latest_checkpoint(tmp_path, said.append)) == 1
    assert len(said) == 1 and str(newest) in said[0] and "falling back" in said[0]
    assert newest.is_dir()  # evidence, until the run goes on from the older one
    drop_newer(tmp_path, 1)
    assert names(tmp_path) == ["00000001"]


def test_any_flipped_byte_of_the_manifest_is_noticed_or_harmless(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writing(1))
    newest = save_checkpoint(tmp_path, 2, writing(2))
    manifest = newest / MANIFEST
    noticed = 0
    for at in range(0, len(manifest.read_bytes()), 5):
        flip(manifest, at)
        found = latest_checkpoint(tmp_path, lambda _: None)
        noticed += found != newest
        assert value_of(found) in (1, 2)
        flip(manifest, at)
    assert noticed > 64 / 5 * len(json.loads(manifest.read_text()))  # every digit of every sum


def test_nothing_intact_is_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    for step in (1, 2):
        flip(save_checkpoint(tmp_path, step, writing(step)) / "state.json")
    assert latest_checkpoint(tmp_path, said.append) is None
    assert len(said) == 2


@pytest.fixture
def files_up_to_64k() -> Iterator[None]:
    """A disk that is full: the kernel refuses to let any file of this process grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_oserror_and_leaves_older_ones(tmp_path: Path, files_up_to_64k: None) -> None:
    save_checkpoint(tmp_path, 1, writing(1))
    with pytest.raises(OSError, match="File too large"):  # raised by safetensors, as an error of its own kind
        save_checkpoint(tmp_path, 2, lambda folder: save_state(torch.zeros(1 << 16), folder, "state"))
    with pytest.raises(OSError, match="File too large"):
        save_checkpoint(tmp_path, 3, lambda folder: write_atomically(folder / "x", "x" * (1 << 17)))
    assert names(tmp_path) == ["00000001"]
    assert value_of(latest_checkpoint(tmp_path, quiet)) == 1
    assert value_of(save_checkpoint(tmp_path, 4, writing(4))) == 4  # there is room again


def test_a_full_disk_while_sealing_leaves_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, writing(1))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, writing(2))
    assert names(tmp_path) == ["00000001"]


def test_an_atomic_write_keeps_the_old_text_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "note.json"
    write_atomically(path, "old, ünïcode")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old, ünïcode"
    write_atomically(path, "new")
    assert path.read_text() == "new" and names(path.parent) == ["note.json"]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_nested_state_comes_back_as_it_was(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).view(3, 4)
    state = {
        "numbers": [1, -2.5, 1e-300, 2**70, True, None, "ü", float("inf")],
        "pair": (1, ("a", [])),
        7: {"int key": 1, (1, 2): "tuple key", None: "none key"},
        "dict": {"tensor": "a word the format uses itself", "list": {}},
        "tensors": [
            torch.randn(3, 2).bfloat16(), torch.tensor(3), torch.tensor(0.5, dtype=torch.float64), torch.empty(0, 4),
            torch.tensor([True, False]), base.t(), base[1], base, torch.tensor([2**62]),
        ],
    }  # fmt: skip
    save_state(state, tmp_path, "state")
    assert same(load_state(tmp_path, "state"), state)
    assert names(tmp_path) == ["state.json", "state.safetensors"]  # nothing that has to be unpickled


def test_a_state_without_tensors(tmp_path: Path) -> None:
    for state in (None, {}, [1]):
        save_state(state, tmp_path, "state")
        assert same(load_state(tmp_path, "state"), state)


def test_saved_tensors_are_copies(tmp_path: Path) -> None:
    tensor = torch.zeros(3, requires_grad=True)
    save_state([tensor, tensor], tmp_path, "state")
    (first, second) = load_state(tmp_path, "state")
    assert torch.equal(first, second) and not first.requires_grad


def test_what_cannot_be_held_is_an_error_and_not_pickled(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="can't hold set"):
        save_state({"x": {1, 2}}, tmp_path, "state")


def test_an_optimizer_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
        return model, torch.optim.AdamW(groups, lr=0.1, fused=True)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        model(torch.randn(5, 4, generator=draw)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = begin()
    for seed in range(3):
        step(model, optimizer, seed)
    save_state({"optimizer": optimizer.state_dict(), "model": dict(model.state_dict())}, tmp_path, "state")
    step(model, optimizer, 3)

    again, resumed = begin()
    saved = load_state(tmp_path, "state")
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    step(again, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert same(resumed.state_dict(), optimizer.state_dict())


def test_random_generators_go_on_where_they_stood(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return (
            random.random(), random.gauss(0, 1), float(np.random.random()), float(np.random.standard_normal()),
            torch.rand(3).tolist(),
        )  # fmt: skip

    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()  # gauss and standard_normal now hold a second number each
    save_state(rng_state(), tmp_path, "rng")
    wanted = [draw(), draw()]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    assert draw() != wanted[0]
    set_rng_state(load_state(tmp_path, "rng"))
    assert [draw(), draw()] == wanted
