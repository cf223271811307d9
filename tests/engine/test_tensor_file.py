"""A file written tensor by tensor is one that safetensors reads, and nothing waits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longreach.engine.tensor_file import write_tensors

TENSORS = [
    torch.tensor(True), torch.arange(3, dtype=torch.uint8), torch.randn(3, 5).t(), torch.tensor(2.5, dtype=torch.float64),
    torch.randn(2, 3).bfloat16(), torch.empty(0, 4), torch.arange(5), torch.tensor([], dtype=torch.int32), torch.ones(3).half(),
]  # fmt: skip


def test_safetensors_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    write_tensors(tmp_path / "made", TENSORS, iter(TENSORS))
    read = load_file(tmp_path / "made")
    assert sorted(read, key=int) == [str(i) for i in range(len(TENSORS))]
    for i, tensor in enumerate(TENSORS):
        assert read[str(i)].dtype == tensor.dtype and torch.equal(read[str(i)], tensor)


def test_the_file_is_no_longer_than_safetensors_own(tmp_path: Path) -> None:
    write_tensors(tmp_path / "ours", TENSORS, TENSORS)
    save_file({str(i): t.contiguous() for i, t in enumerate(TENSORS)}, tmp_path / "theirs")
    assert (tmp_path / "ours").stat().st_size <= (tmp_path / "theirs").stat().st_size


def test_nothing_is_a_file_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "made", [], [])
    assert load_file(tmp_path / "made") == {}


def test_tensors_are_taken_one_by_one(tmp_path: Path) -> None:
    sizes: list[int] = []

    def one_by_one() -> Iterator[Tensor]:
        for _ in range(3):
            sizes.append((tmp_path / "made").stat().st_size)
            yield torch.ones(1 << 16)

    write_tensors(tmp_path / "made", [torch.empty(1 << 16, device="meta")] * 3, one_by_one())
    assert sizes == sorted(set(sizes)), "the one before is in the file"


def test_another_shape_than_was_promised_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "made", [torch.empty(2)], [torch.empty(3)])
