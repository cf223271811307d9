"""A safetensors file written tensor by tensor: safetensors' own writer wants all of them in memory at once.

The format: the header's length (8 bytes, little-endian), a JSON header that names dtype, shape and place of each tensor,
then their bytes without gaps. Tensors of wide dtypes come first, as in safetensors' own files, so that each is aligned.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(
    path: Path, shapes: Sequence[Tensor], tensors: Iterable[Tensor], names: Sequence[str] | None = None
) -> None:
    """Writes `tensors` under their `names`, or else "0", "1", ...

    Args:
        shapes: what has the shape and dtype of each of them, known before they are.
    """
    named = [str(i) for i in range(len(shapes))] if names is None else names
    assert len(set(named)) == len(shapes)
    order = sorted(range(len(shapes)), key=lambda i: -shapes[i].dtype.itemsize)  # stable
    header: dict[str, Any] = {} if names is None else {"__metadata__": {"format": "pt"}}  # transformers looks for it
    starts, at = {}, 0
    for i in order:
        size = shapes[i].numel() * shapes[i].dtype.itemsize
        header[named[i]] = {
            "dtype": _NAMES[shapes[i].dtype],
            "shape": list(shapes[i].shape),
            "data_offsets": [at, at + size],
        }
        starts[i], at = at, at + size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        for i, tensor in enumerate(tensors):
            assert tensor.shape == shapes[i].shape and tensor.dtype == shapes[i].dtype
            file.seek(begin + starts[i])
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        file.truncate(begin + at)
