"""The attention contract against a dense masked softmax in fp64, alone and composed into a shared prefix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.kernels import attention, attention_dense
from longreach.kernels.attention_dense import BLOCK_K, BLOCK_Q

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
BACKENDS = ("reference", "blockwise", "cpu")


def bounds(lengths: Sequence[int]) -> list[int]:
    return [0, *torch.tensor(list(lengths), dtype=torch.long).cumsum(0).tolist()]


def make(queries: int, keys: int, heads: tuple[int, int], width: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(queries * 31 + keys + width)
    shapes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]), (queries, heads[0]))
    q, k, v, dout = (torch.randn(*shape, width, generator=generator).to(dtype) for shape in shapes)
    return q, k, v, dout


def dense(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dq, dk, dv by autograd through one masked softmax over everything, in `dtype`."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("the,she->hts", q, keys) / math.sqrt(q.shape[2])
    scores = scores.masked_fill(~mask, -math.inf)
    alive = mask.any(-1)
    p = torch.where(alive[:, None], scores, 0.0).softmax(-1) * alive[:, None]
    out = torch.einsum("hts,she->the", p, values)
    out.backward(dout.to(dtype))
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (q, k, v)]
    return [out.detach(), scores.detach().logsumexp(-1), *grads]


def segment_mask(queries: Sequence[int], keys: Sequence[int], causal: bool) -> Tensor:
    mask = torch.zeros(sum(queries), sum(keys), dtype=torch.bool)
    at_q, at_k = bounds(queries), bounds(keys)
    for i, (n, m) in enumerate(zip(queries, keys, strict=True)):
        block = torch.ones(n, m, dtype=torch.bool)
        mask[at_q[i] : at_q[i + 1], at_k[i] : at_k[i + 1]] = block.tril() if causal else block
    return mask


def ours(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **how: Any) -> list[Tensor]:
    out, lse = attention.forward(q, k, v, **how)
    return [out, lse, *attention.backward(dout, q, k, v, out, lse, **how)]


# why each row: one token; one head group; ragged short ones around an empty one; the tile's edges; a long one beside
# short ones; full with empty sides on both; full, equal keys and ragged queries (one padded rectangle)
CASES = {
    "one token": ([1], [1], True),
    "odd": ([37], [37], True),
    "ragged with empty": ([3, 0, 17, 1, 24, 0], [3, 0, 17, 1, 24, 0], True),
    "tile - 1, tile, tile + 1": ([BLOCK_Q - 1, BLOCK_Q, BLOCK_Q + 1], [BLOCK_Q - 1, BLOCK_Q, BLOCK_Q + 1], True),
    "long beside short": ([5, 300, 9], [5, 300, 9], True),
    "full, empty sides": ([4, 0, 6, 2], [7, 3, 0, 9], False),
    "full, ragged queries": ([1, 5, 3], [19, 19, 19], False),
    "full, one key": ([33], [1], False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(three_way, case: str, backend: str, dtype: torch.dtype) -> None:
    queries, keys, causal = CASES[case]
    tensors = make(sum(queries), sum(keys), (4, 2), 32, dtype)
    mask = segment_mask(queries, keys, causal)
    how = {"causal": causal, "cu_seqlens_q": bounds(queries), "cu_seqlens_k": bounds(keys), "backend": backend}
    got, plain, exact = ours(*tensors, **how), dense(*tensors, mask, dtype), dense(*tensors, mask, torch.float64)
    seen = exact[1] > -math.inf
    # one key alone has p = 1: dp = dout v and delta = dout out cancel exactly, and leave the rounding of their size
    q, k, v, dout = (x.float() for x in tensors)
    group = q.shape[1] // k.shape[1]
    dp = torch.einsum("the,she->hts", dout, v.repeat_interleave(group, 1))[:, mask]
    cancelling = float(dp.abs().max() * k.abs().max()) / math.sqrt(32) if 1 in keys else 0.0
    assert torch.equal(got[1] > -math.inf, seen)
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), got, plain, exact, strict=True):
        if name == "lse":
            three_way(a[seen], b[seen], c[seen], terms=1.0)
        else:
            assert a.dtype == dtype
            three_way(a, b, c, terms=cancelling if name in ("dq", "dk") else 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_head_dims_and_groups(three_way, backend: str, width: int, heads: tuple[int, int]) -> None:
    tensors = make(45, 45, heads, width, torch.float32)
    mask = segment_mask([13, 32], [13, 32], True)
    got = ours(*tensors, causal=True, cu_seqlens_q=torch.tensor([0, 13, 45], dtype=torch.int32), backend=backend)
    for a, b, c in zip(got, dense(*tensors, mask, torch.float32), dense(*tensors, mask, torch.float64), strict=True):
        three_way(a, b, c)


@pytest.mark.parametrize("span", [BLOCK_K - 1, BLOCK_K, BLOCK_K + 1])
@pytest.mark.parametrize("causal", [True, False])
def test_blockwise_across_key_tiles(three_way, span: int, causal: bool) -> None:
    tensors = make(span if causal else 7, span, (2, 1), 16, torch.float32)
    mask = segment_mask([tensors[0].shape[0]], [span], causal)
    got = ours(*tensors, causal=causal, backend="blockwise")
    for a, b, c in zip(got, dense(*tensors, mask, torch.float32), dense(*tensors, mask, torch.float64), strict=True):
        three_way(a, b, c)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_q", [8, 24])
def test_blockwise_while_the_maximum_keeps_rising(
    three_way, monkeypatch: pytest.MonkeyPatch, causal: bool, block_q: int
) -> None:
    """Later keys outweigh earlier ones by e^10 and more, so every block rescales what came before."""
    monkeypatch.setattr(attention_dense, "BLOCK_Q", block_q)
    monkeypatch.setattr(attention_dense, "BLOCK_K", 16)
    q, k, v, dout = make(70, 70, (4, 2), 16, torch.float32)
    k *= torch.linspace(0.05, 6, 70)[:, None, None]
    mask = segment_mask([70], [70], causal)
    got = ours(q, k, v, dout, causal=causal, backend="blockwise")
    plain, exact = (dense(q, k, v, dout, mask, dtype) for dtype in (torch.float32, torch.float64))
    for a, b, c in zip(got, plain, exact, strict=True):
        three_way(a, b, c)


def shared_prefix(tensors: Inputs, prompts: list[int], groups: list[list[int]], **how: Any) -> list[Tensor]:
    """[prompts | completions] in three calls, merged, and the backward of each with the merged out and lse."""
    q, k, v, dout = tensors
    total = sum(prompts)
    head, tail = slice(0, total), slice(total, len(q))
    at_p, at_c = bounds(prompts), bounds([n for group in groups for n in group])
    crossing: dict[str, Any] = {
        "causal": False,
        "cu_seqlens_q": bounds([sum(group) for group in groups]),
        "cu_seqlens_k": at_p,
    } | how
    own: dict[str, Any] = {"causal": True, "cu_seqlens_q": at_c, "cu_seqlens_k": at_c} | how
    prompt: dict[str, Any] = {"causal": True, "cu_seqlens_q": at_p, "cu_seqlens_k": at_p} | how
    fp32: dict[str, Any] = {"out_dtype": torch.promote_types(q.dtype, torch.float32)}
    out_p, lse_p = attention.forward(q[head], k[head], v[head], **prompt)
    out_x, lse_x = attention.forward(q[tail], k[head], v[head], **crossing, **fp32)
    out_o, lse_o = attention.forward(q[tail], k[tail], v[tail], **own, **fp32)
    out_c, lse_c = attention.merge(out_x, lse_x, out_o, lse_o)
    grads: dict[str, Any] = {"grad_dtype": fp32["out_dtype"]}
    dq_p, dk_p, dv_p = attention.backward(dout[head], q[head], k[head], v[head], out_p, lse_p, **prompt, **grads)
    dq_x, dk_x, dv_x = attention.backward(dout[tail], q[tail], k[head], v[head], out_c, lse_c, **crossing, **grads)
    dq_o, dk_o, dv_o = attention.backward(dout[tail], q[tail], k[tail], v[tail], out_c, lse_c, **own, **grads)
    return [
        torch.cat([out_p, out_c.to(q.dtype)]),
        torch.cat([lse_p, lse_c], 1),
        torch.cat([dq_p, dq_x + dq_o]),
        torch.cat([dk_p + dk_x, dk_o]),
        torch.cat([dv_p + dv_x, dv_o]),
    ]


PROMPTS, GROUPS = [21, 1, 30], [[4, 9, 0, 1], [3], [7, 7]]


def prefix_mask() -> Tensor:
    completions = [n for group in GROUPS for n in group]
    mask = segment_mask(PROMPTS + completions, PROMPTS + completions, True)
    total, at_p, at_g = sum(PROMPTS), bounds(PROMPTS), bounds([sum(group) for group in GROUPS])
    for i in range(len(PROMPTS)):
        mask[total + at_g[i] : total + at_g[i + 1], at_p[i] : at_p[i + 1]] = True
    return mask


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shared_prefix_is_the_dense_attention(three_way, backend: str, dtype: torch.dtype) -> None:
    mask = prefix_mask()
    tensors = make(len(mask), len(mask), (4, 2), 32, dtype)
    got = shared_prefix(tensors, PROMPTS, GROUPS, backend=backend)
    plain, exact = dense(*tensors, mask, dtype), dense(*tensors, mask, torch.float64)
    for a, b, c in zip(got, plain, exact, strict=True):
        three_way(a, b, c)


def test_shared_prefix_mutants_fail(three_way) -> None:
    mask = prefix_mask()
    tensors = make(len(mask), len(mask), (4, 2), 32, torch.float32)
    plain, exact = dense(*tensors, mask, torch.float32), dense(*tensors, mask, torch.float64)
    without_prompt = segment_mask(
        PROMPTS + [n for g in GROUPS for n in g], PROMPTS + [n for g in GROUPS for n in g], True
    )
    dropped_merge = dense(*tensors, without_prompt, torch.float32)
    swapped = shared_prefix(tensors, PROMPTS, [[4, 9, 1, 0], [7], [3, 7]], backend="cpu")
    shifted = shared_prefix(tensors, PROMPTS, [[5, 8, 0, 1], [3], [7, 7]], backend="cpu")
    for mutant in (dropped_merge, swapped, shifted):
        for a, b, c in zip(mutant, plain, exact, strict=True):
            with pytest.raises(AssertionError):
                three_way(a, b, c)


@pytest.mark.parametrize("backend", BACKENDS)
def test_partials_of_bf16_are_not_rounded(backend: str) -> None:
    tensors = make(40, 40, (4, 2), 32, torch.bfloat16)
    exact = dense(*tensors, segment_mask([40], [40], True), torch.float64)
    q, k, v, dout = tensors
    out, lse = attention.forward(q, k, v, causal=True, out_dtype=torch.float32, backend=backend)
    grads = attention.backward(dout, q, k, v, out, lse, causal=True, grad_dtype=torch.float32, backend=backend)
    for a, c in zip((out, lse, *grads), exact, strict=True):
        assert a.dtype == torch.float32
        # inputs are exact in both: what is left is fp32 rounding, three decimal digits below bf16's
        assert (a - c).abs().max() < 16 * torch.finfo(torch.float32).eps * c.abs().max()


def test_merge_with_an_empty_side_is_exact() -> None:
    q, k, v, _ = make(9, 9, (4, 2), 16, torch.float32)
    out, lse = attention.forward(q, k, v, causal=True)
    nothing, no_lse = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf)
    for merged in (attention.merge(out, lse, nothing, no_lse), attention.merge(nothing, no_lse, out, lse)):
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)
    both = attention.merge(nothing, no_lse, nothing, no_lse)
    assert torch.equal(both[0], torch.zeros_like(out))
    assert torch.equal(both[1], no_lse)


def test_merge_survives_scores_that_differ_by_hundreds() -> None:
    out_a, out_b = torch.ones(1, 1, 2), torch.full((1, 1, 2), 3.0)
    out, lse = attention.merge(out_a, torch.tensor([[500.0]]), out_b, torch.tensor([[-500.0]]))
    assert torch.equal(out, out_a)
    assert lse.item() == 500.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_segment_cannot_see_another_not_even_its_nan(backend: str) -> None:
    q, k, v, dout = make(30, 30, (4, 2), 16, torch.float32)
    how = {"causal": True, "cu_seqlens_q": [0, 11, 30], "backend": backend}
    clean = ours(q, k, v, dout, **how)
    for x in (q, k, v, dout):
        x[11:] = math.nan
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours(q, k, v, dout, **how), clean, strict=True):
        assert torch.equal(a[:, :11], b[:, :11]) if name == "lse" else torch.equal(a[:11], b[:11])


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bitwise_equal(backend: str) -> None:
    tensors = make(500, 500, (8, 2), 32, torch.float32)
    how = {"causal": True, "cu_seqlens_q": [0, 7, 20, 320, 500], "deterministic": True, "backend": backend}
    first = ours(*tensors, **how)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(*tensors, **how), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_in_any_layout_and_nothing_at_all(backend: str) -> None:
    tensors = make(24, 24, (4, 2), 16, torch.float32)
    q, k, v, dout = tensors
    for cu_seqlens in ([0, 24], [0, 5, 24]):
        how = {"causal": True, "cu_seqlens_q": cu_seqlens, "backend": backend}
        want = ours(*tensors, **how)
        for first in (1, 2):  # heads outermost, width outermost
            q, k, v, dout = (x.transpose(0, first).contiguous().transpose(0, first) for x in tensors)
            for a, b in zip(ours(q, k, v, dout, **how), want, strict=True):
                torch.testing.assert_close(a, b)
    empty = ours(q[:0], k[:0], v[:0], dout[:0], causal=True, backend=backend)
    assert [tuple(x.shape) for x in empty] == [(0, 4, 16), (4, 0), (0, 4, 16), (0, 2, 16), (0, 2, 16)]
    out, lse = attention.forward(tensors[0], tensors[1][:0], tensors[2][:0], causal=False, backend=backend)
    assert not out.any()
    assert (lse == -math.inf).all()


def test_scale_is_used() -> None:
    q, k, v, dout = make(12, 12, (2, 2), 16, torch.float64)
    scaled = ours(q, k, v, dout, causal=True, scale=0.5)
    same = ours(q * 2, k, v, dout, causal=True)  # 1 / sqrt(16) = 0.25
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), scaled, same, strict=True):
        torch.testing.assert_close(a, 2 * b if name == "dq" else b, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_is_refused_with_a_way_out() -> None:
    q, k, v, dout = make(10, 12, (4, 2), 16, torch.float32)
    with pytest.raises(ValueError, match="use causal=False"):
        attention.forward(q, k, v, causal=True)
    with pytest.raises(ValueError, match="use causal=False"):
        attention.forward(q, k[:10], v[:10], causal=True, cu_seqlens_q=[0, 4, 10], cu_seqlens_k=[0, 5, 10])
    with pytest.raises(ValueError, match="one for one"):
        attention.forward(q, k, v, causal=False, cu_seqlens_q=[0, 4, 10])
    with pytest.raises(ValueError, match="rise from 0 to the 10 tokens"):
        attention.forward(q, k, v, causal=False, cu_seqlens_q=[0, 9], cu_seqlens_k=[0, 12])
    with pytest.raises(ValueError, match="rise from 0"):
        attention.forward(q, k, v, causal=False, cu_seqlens_q=[0, 6, 4, 10], cu_seqlens_k=[0, 3, 4, 12])
    with pytest.raises(ValueError, match="max_seqlen_q is 4"):
        attention.forward(q, k, v, causal=False, max_seqlen_q=4)
    with pytest.raises(ValueError, match="choose from auto, reference"):
        attention.forward(q, k, v, causal=False, backend="flash5")
    with pytest.raises(ValueError, match="use 'blockwise'"):
        attention.forward(q.to("meta"), k.to("meta"), v.to("meta"), causal=False, backend="cpu")
    with pytest.raises(ValueError, match="multiple of the 3 key heads"):
        attention.forward(q, k.new_zeros(12, 3, 16), v.new_zeros(12, 3, 16), causal=False)
    with pytest.raises(ValueError, match="one floating dtype"):
        attention.forward(q, k.double(), v, causal=False)
    with pytest.raises(ValueError, match=r"\[T, H, E\]"):
        attention.forward(q, k, v[:, :, :8], causal=False)
    out, lse = attention.forward(q, k, v, causal=False)
    with pytest.raises(ValueError, match=r"must be \[H, T\]"):
        attention.backward(dout, q, k, v, out, lse.t(), causal=False)


def test_blockwise_memory_is_linear() -> None:
    """2048 tokens of 4 heads: all scores would be 16M entries; the largest tensor made holds one block row of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, Tensor):
                    self.size = max(self.size, x.numel())
            return result

    tensors = make(2048, 2048, (4, 2), 16, torch.float32)
    with Largest() as largest:
        ours(*tensors, causal=True, backend="blockwise")
    assert 4 * BLOCK_Q * BLOCK_K <= largest.size < 4 * 2048 * 2048 // 8
