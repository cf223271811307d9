"""What attention's Triton kernels must do wherever they run; test_attention_triton.py starts this in the interpreter and
on a GPU. Their numbers at every edge are checked by `python -m longreach.kernels.check attention`, in the interpreter."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.kernels import attention, gpu
from longreach.kernels.attention_triton import HEAD_DIMS, backward, forward, unsuited
from longreach.kernels.gpu import AttentionTiles, Block

DEVICE = "cpu" if gpu.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# around the blocks of the device
LENGTHS = (3, 31, 34) if DEVICE == "cpu" else (3, 127, 128, 129, 700)
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def poisoned() -> Any:
    """Uninitialised memory holds NaN, so that a value which is read before it was written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def bounds(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def make(
    queries: int, keys: int, dtype: torch.dtype, *, width: int = 16, heads: tuple[int, int] = (2, 1)
) -> list[Tensor]:
    """q, k, v, dout"""
    generator = torch.Generator().manual_seed(queries + 7 * keys + width)
    shapes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]), (queries, heads[0]))
    return [torch.randn(*shape, width, generator=generator).to(DEVICE, dtype) for shape in shapes]


def ours(tensors: list[Tensor], queries: tuple[int, ...], keys: tuple[int, ...] | None = None) -> list[Tensor]:
    q, k, v, dout = tensors
    scale, causal = 1 / math.sqrt(q.shape[2]), keys is None
    assert unsuited(q, k, v, scale) is None
    at_q, at_k = bounds(queries), bounds(queries if keys is None else keys)
    out, lse = forward(q, k, v, at_q, at_k, causal, scale, q.dtype)
    return [out, lse, *backward(dout, q, k, v, out, lse, at_q, at_k, causal, scale, q.dtype, False)]


def reference(
    tensors: list[Tensor], queries: tuple[int, ...], keys: tuple[int, ...] | None, dtype: torch.dtype
) -> list[Tensor]:
    q, k, v, dout = (x.to(dtype) for x in tensors)
    how: dict[str, Any] = {"causal": keys is None, "cu_seqlens_q": bounds(queries), "backend": "reference"}
    how["cu_seqlens_k"] = bounds(queries if keys is None else keys)
    out, lse = attention.forward(q, k, v, **how)
    return [out, lse, *attention.backward(dout, q, k, v, out, lse, **how)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", HEAD_DIMS)
def test_values_and_gradients(three_way: Any, width: int, causal: bool, dtype: torch.dtype) -> None:
    keys = None if causal else tuple(reversed(LENGTHS))
    tensors = make(sum(LENGTHS), sum(LENGTHS), dtype, width=width)
    plain, exact = (reference(tensors, LENGTHS, keys, kind) for kind in (dtype, torch.float64))
    for a, b, c in zip(ours(tensors, LENGTHS, keys), plain, exact, strict=True):
        three_way(a, b.to(a.dtype), c, terms=1.0)


SHAPES = [
    # rows and columns of every proportion that a GPU's blocks have
    (Block(64, 16, 16), Block(16, 64, 16), Block(64, 16, 16)),
    (Block(16, 64, 16), Block(64, 16, 16), Block(16, 64, 32)),
    (Block(32, 64, 32), Block(32, 32, 32), Block(64, 64, 16)),
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_any_proportion(
    three_way: Any, shapes: tuple[Block, Block, Block], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(_: tuple[int, int], dtype: torch.dtype, width: int) -> AttentionTiles:
        return AttentionTiles(width, dtype != torch.float32, *shapes)

    monkeypatch.setattr(AttentionTiles, "of", staticmethod(of))
    queries, keys = (5, 64, 71), None if causal else (70, 0, 63)
    for dtype in (torch.float32, torch.float16):
        tensors = make(140, 140 if causal else 133, dtype)
        plain, exact = (reference(tensors, queries, keys, kind) for kind in (dtype, torch.float64))
        for name, a, b, c in zip(NAMES, ours(tensors, queries, keys), plain, exact, strict=True):
            seen = torch.isfinite(c)
            assert torch.equal(torch.isfinite(a), seen), name
            three_way(a[seen], b.to(a.dtype)[seen], c[seen], terms=1.0)


# NumPy's, of the NaN that the interpreter computes with
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_not_even_a_nan_crosses_from_one_segment_to_the_next(causal: bool, dtype: torch.dtype) -> None:
    queries, keys = (20, 9, 37), None if causal else (18, 11, 40)
    clean = make(66, 66 if causal else 69, dtype)
    spoilt = [x.clone() for x in clean]
    of_k = queries if keys is None else keys
    for x, lengths in zip(spoilt, (queries, of_k, of_k, queries), strict=True):
        x[lengths[0] : lengths[0] + lengths[1]] = math.nan
    right, found = ours(clean, queries, keys), ours(spoilt, queries, keys)
    for name, a, b in zip(NAMES, right, found, strict=True):
        a, b = (x.t() if name == "lse" else x for x in (a, b))
        first, second = (of_k if name in ("dk", "dv") else queries)[:2]
        kept = torch.ones(len(a), dtype=torch.bool, device=DEVICE)
        kept[first : first + second] = False
        assert torch.equal(a[kept], b[kept]), name
        assert b[~kept].isnan().all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_segment_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    """And twice the same: nothing is added in an order that could change."""
    tensors = make(40, 40, dtype, heads=(4, 2))
    alone = ours(tensors, (40,))
    for a, b in zip(alone, ours(tensors, (40,)), strict=True):
        assert torch.equal(a, b)
    others = make(77, 77, dtype, heads=(4, 2))
    joined = [torch.cat([y[:13], x, y[13:]]) for x, y in zip(tensors, others, strict=True)]
    for name, a, b in zip(NAMES, alone, ours(joined, (13, 40, 64)), strict=True):
        assert torch.equal(a, b[:, 13:53] if name == "lse" else b[13:53]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_any_layout(dtype: torch.dtype) -> None:
    """Slices of one projection, heads first, an odd address, every second token, an expanded gradient."""
    tensors = make(37, 37, dtype, heads=(2, 2))
    expected = ours(tensors, (37,))
    fused = torch.cat(tensors[:3], 1)
    flat = torch.cat([torch.zeros(3, dtype=dtype, device=DEVICE), tensors[1].flatten()])
    views = {
        "one projection": [fused[:, :2], fused[:, 2:4], fused[:, 4:]],
        "heads first": [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors[:3]],
        "odd address": [tensors[0], flat[3:].view_as(tensors[1]), tensors[2]],
        "every second token": [torch.stack([x, x * 0], 1).flatten(0, 1)[::2] for x in tensors[:3]],
        "last dimension not dense": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:3]],
    }
    for label, view in views.items():
        for name, a, b in zip(NAMES, ours([*view, tensors[3]], (37,)), expected, strict=True):
            assert torch.equal(a, b), (label, name)
    one = torch.ones(1, 1, 1, dtype=dtype, device=DEVICE).expand(37, 2, 16)
    for a, b in zip(ours([*tensors[:3], one], (37,)), ours([*tensors[:3], one.contiguous()], (37,)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_partial_results_are_not_rounded(dtype: torch.dtype) -> None:
    q, k, v, dout = make(37, 37, dtype)
    where = ((0, 37), (0, 37), True, 0.25)
    wide, lse = forward(q, k, v, *where, torch.float32)
    assert wide.dtype == lse.dtype == torch.float32
    assert torch.equal(wide.to(dtype), forward(q, k, v, *where, dtype)[0])
    assert not torch.equal(wide.to(dtype).float(), wide)
    full = backward(dout, q, k, v, wide, lse, *where, torch.float32, True)
    for a, b in zip(full, backward(dout, q, k, v, wide, lse, *where, dtype, True), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a.to(dtype), b)
        assert not torch.equal(a.to(dtype).float(), a)


def test_nothing_to_do() -> None:
    """No tokens at all, and keys that no query sees."""
    assert [x.shape[0] for x in ours(make(0, 0, torch.float32), (0,))] == [0, 2, 0, 0, 0]
    _, _, _, dk, dv = ours(make(4, 9, torch.float32), (4, 0), (0, 9))
    assert torch.equal(dk, torch.zeros_like(dk)) and torch.equal(dv, dk)
