"""Scores fused with what is made of them, in Triton: the backend of NVIDIA GPUs. Formulas: linear_logprob.py.

    partial        2 N D V operations; reads h and W, writes 12 bytes a row and part of 64 or 128 entries, merged in order
    gradient       2 N D V; reads h and W, writes dx in the inputs' dtype: 2 N V bytes, one block at a time
    keep           2 N D V; as partial, and writes e = exp(z - the tile's peak) in the inputs' dtype: 2 N V bytes
    kept_gradient  no product; e becomes dx in place: 4 N V bytes

The two products dx W and dx^T h are cuBLAS's (products.py), another 4 N D V operations and 2 N V bytes read each. So a
forward and backward is 8 N D V in two passes (partial, gradient) or 6 N D V in one (keep, kept_gradient). At N = 8192,
D = 4096, V = 128256 one product is 8.6 TFLOP; a block's dx crosses memory three times, 6.3 GB in all. Besides, 8 bytes
of fp32 sums are read and written for each element of the gradient that is summed whole (sums.py).

Scores and softmax are fp32 in registers. A program owns one [ROWS, COLUMNS] tile; the sum over D goes in fixed steps and
parts are merged by one program in vocabulary order, so a row's bits don't depend on the rows around it (an adapter's
a = scale h A^T is cuBLAS's, and is not promised that; nor are tensors laid out in another way); there are no atomics. Addresses are 64-bit. Any V and D: entries past the end are -inf before the softmax. Tensor memory descriptors
(TMA) load the tiles where the GPU has them and rows are multiples of 16 bytes, masked loads elsewhere.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (what triton.jit and tl.static_range make of a function and a loop is not typed)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .gpu import Tile, address, capability, launch, tiles
from .scores import Partial, Scores, Stats, Upstream

BLOCK_BYTES = 640 << 20
"""Budget of a block of dx: with fp32 sums of dh, 32000 rows of 4096 stay within 1.5 GiB."""
KEPT_BYTES = 2500 << 20
"""Budget of a one-pass chunk: 8192 rows of 152064 entries, the knee where the fp32 sums of dW stop costing time."""
PARTIAL_ROWS = 8192
"""Rows whose parts' results are held before they are merged: 112 MiB at 152064 entries in parts of 128, twice that in parts of 64."""
COMBINE_ROWS, COMBINE_PARTS = 32, 32
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sum_products(
    x, w, row, column, n, vocab, width, stride_x, stride_w, acc,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [ROWS, COLUMNS] + x[row:] w[column:]^T. Rows and entries past the end: zeros with TMA, else repeated."""
    if TMA:
        for k in range(0, width, STEP):
            acc = tl.dot(x.load([row, k]), w.load([column, k]).T, acc, input_precision=PRECISION)
    else:
        o_row = ((row + tl.arange(0, ROWS)) % n).to(tl.int64)
        o_column = ((column + tl.arange(0, COLUMNS)) % vocab).to(tl.int64)
        o_k = tl.arange(0, STEP)
        p_x = x + o_row[:, None] * stride_x + o_k[None, :]
        p_w = w + o_column[:, None] * stride_w + o_k[None, :]
        for k in range(0, width, STEP):
            m_k = o_k[None, :] < width - k
            b_x = tl.load(p_x, mask=m_k, other=0.0)
            b_w = tl.load(p_w, mask=m_k, other=0.0)
            acc = tl.dot(b_x, b_w.T, acc, input_precision=PRECISION)
            p_x += STEP
            p_w += STEP
    return acc


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation: a series near 0, where 1 - p is small."""
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    return tl.where(x > -0.5, -x * series, 1 - tl.exp2(x * LOG2E))


@triton.jit
def _tanh(x):
    """By 1 - exp(-2|x|), which keeps the digits of a small x."""
    t = _one_minus_exp(-2 * tl.abs(x))
    y = t / (2 - t)
    return tl.where(x < 0, -y, y)


@triton.jit
def _place(index, n, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a program's tile: GROUP row tiles share the weight's tiles while those lie in L2."""
    n_rows, n_columns = tl.cdiv(n, ROWS), tl.cdiv(columns, COLUMNS)
    group = index // (GROUP * n_columns)
    size = tl.minimum(n_rows - group * GROUP, GROUP)
    inside = index % (GROUP * n_columns)
    return (group * GROUP + inside % size) * ROWS, (inside // size) * COLUMNS


@triton.jit
def _products(
    x, w, low_x, low_w, row, column, n, vocab, width, low_width,
    stride_x, stride_w, stride_low_x, stride_low_w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """h W^T + a B^T of one tile."""
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    acc = _sum_products(
        x, w, row, column, n, vocab, width, stride_x, stride_w, acc, ROWS, COLUMNS, STEP, TMA, PRECISION
    )
    if LOW:
        acc = _sum_products(
            low_x, low_w, row, column, n, vocab, low_width, stride_low_x, stride_low_w, acc,
            ROWS, COLUMNS, STEP, TMA, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def _part(acc, index: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One of the PARTS (1 or 2) column ranges of a tile: the epilogue of half a tile fits in registers."""
    if PARTS == 2:
        low, high = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        acc = low if index == 0 else high
    return acc


@triton.jit
def _z(
    acc, bias, inverse_heat, softcap, o_row, o_column, n, vocab,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """softcap(acc + b) / T, -inf past the vocabulary's end."""
    m_column = o_column < vocab
    if BIAS:
        acc += tl.load(bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    inverse = tl.load(inverse_heat + o_row, mask=o_row < n, other=1.0)[:, None]
    if SOFTCAP:
        acc = _tanh(acc / softcap) * softcap
    return tl.where(m_column[None, :], acc * inverse, float("-inf"))


@triton.jit
def _store(
    to, values, row, column, n, columns, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """values [ROWS, COLUMNS] into to [n, columns], rounded; a descriptor needs no addresses in registers."""
    if TMA:
        to.store([row, column], values.to(to.dtype))
    else:
        o_row, o_column = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        p_to = to + o_row.to(tl.int64)[:, None] * stride + o_column[None, :]
        mask = (o_row < n)[:, None] & (o_column < columns)[None, :]
        tl.store(p_to, values.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _partial_kernel(
    x, w, low_x, low_w, bias, targets, inverse_heat, partials, target_z, kept, softcap,
    n, vocab, width, low_width, first, stride_x, stride_w, stride_low_x, stride_low_w, stride_kept,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """(peak, total, weighted) of a tile's parts into partials [parts, 3, n], z of targets, with KEEP exp(z - peak)."""
    row, column = _place(tl.program_id(0), n, vocab, ROWS, COLUMNS, GROUP)
    acc = _products(
        x, w, low_x, low_w, row, column, n, vocab, width, low_width,
        stride_x, stride_w, stride_low_x, stride_low_w, ROWS, COLUMNS, STEP, TMA, PRECISION, LOW,
    )  # fmt: skip
    WIDE: tl.constexpr = COLUMNS // PARTS
    o_row = row + tl.arange(0, ROWS)
    m_row = o_row < n
    target = tl.load(targets + o_row, mask=m_row, other=-1) - first
    for index in tl.static_range(PARTS):
        start = column + index * WIDE
        o_column = start + tl.arange(0, WIDE)
        part = _part(acc, index, PARTS, ROWS, COLUMNS)
        z = _z(part, bias, inverse_heat, softcap, o_row, o_column, n, vocab, BIAS, SOFTCAP)
        peak = tl.max(z, 1)
        # a part that a bias of -inf bars entirely: relative to 0 its entries stay -inf, relative to -inf they were NaN
        base = tl.where(peak == float("-inf"), 0.0, peak)[:, None]
        e = tl.exp2((z - base) * LOG2E)
        # the parts of the last tile may lie past the end
        m_part = m_row & (start < vocab)
        p_row = partials + (start // WIDE).to(tl.int64) * 3 * n + o_row
        tl.store(p_row, peak, mask=m_part)
        tl.store(p_row + n, tl.sum(e, 1), mask=m_part)
        tl.store(p_row + 2 * n, tl.sum(tl.where(e > 0, e * (z - base), 0.0), 1), mask=m_part)
        b_target = tl.sum(tl.where(o_column[None, :] == target[:, None], z, 0.0), 1)
        mine = (target >= start) & (target < tl.minimum(start + WIDE, vocab))
        tl.store(target_z + o_row, b_target, mask=m_row & mine)
        if KEEP:
            _store(kept, e, row, start, n, vocab, stride_kept, ROWS, WIDE, TMA)


# n is not to be specialised: its divisibility by 16 would change how a row's parts are spread over lanes, hence the order
# of their sum, and with it the bits of a row that has other company
@triton.jit(do_not_specialize=["n", "parts"])
def _combine_kernel(partials, merged, n, parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """merged [3, n]: the parts of each row, PARTS at a time in vocabulary order."""
    o_row, o_part = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PARTS)
    m_row = o_row < n
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total, weighted = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, parts, PARTS):
        mask = (start + o_part < parts)[:, None] & m_row[None, :]
        p_part = partials + (start + o_part).to(tl.int64)[:, None] * 3 * n + o_row[None, :]
        b_peak = tl.load(p_part, mask=mask, other=float("-inf"))
        b_total = tl.load(p_part + n, mask=mask, other=0.0)
        b_weighted = tl.load(p_part + 2 * n, mask=mask, other=0.0)
        new = tl.maximum(peak, tl.max(b_peak, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        shift = tl.where(b_peak == float("-inf"), 0.0, b_peak - base[None, :])
        scale = tl.where(b_peak == float("-inf"), 0.0, tl.exp2(shift * LOG2E))
        old_shift = tl.where(peak == float("-inf"), 0.0, peak - base)
        old_scale = tl.where(peak == float("-inf"), 0.0, tl.exp2(old_shift * LOG2E))
        weighted = (weighted + total * old_shift) * old_scale + tl.sum((b_weighted + b_total * shift) * scale, 0)
        total = total * old_scale + tl.sum(b_total * scale, 0)
        peak = new
    tl.store(merged + o_row, peak, mask=m_row)
    tl.store(merged + n + o_row, total, mask=m_row)
    tl.store(merged + 2 * n + o_row, weighted, mask=m_row)


@triton.jit
def _dx(log_p, p, capped, target, o_column, row_terms, softcap, n, o_row, m_row, SOFTCAP: tl.constexpr):
    """dL/dx of a tile: p (a - b log p), times the soft-cap's slope at `capped` = z T, and at the target its own number."""
    a = tl.load(row_terms + 2 * n + o_row, mask=m_row, other=0.0)[:, None]
    b = tl.load(row_terms + 3 * n + o_row, mask=m_row, other=0.0)[:, None]
    at_target = tl.load(row_terms + 4 * n + o_row, mask=m_row, other=0.0)[:, None]
    # 0 where p is: 0 x -inf is NaN
    dx = tl.where(p > 0, p * (a - b * log_p), 0.0)
    if SOFTCAP:
        squashed = capped / softcap
        dx = tl.where(p > 0, dx * (1 - squashed * squashed), 0.0)
    return tl.where(o_column[None, :] == target[:, None], at_target, dx)


@triton.jit
def _gradient_kernel(
    x, w, low_x, low_w, bias, targets, inverse_heat, row_terms, dx, softcap,
    n, begin, stop, vocab, width, low_width, first, stride_x, stride_w, stride_low_x, stride_low_w, stride_dx,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dx [n, stop - begin] of the entries begin..stop, the scores computed again."""
    row, column = _place(tl.program_id(0), n, stop - begin, ROWS, COLUMNS, GROUP)
    acc = _products(
        x, w, low_x, low_w, row, begin + column, n, vocab, width, low_width,
        stride_x, stride_w, stride_low_x, stride_low_w, ROWS, COLUMNS, STEP, TMA, PRECISION, LOW,
    )  # fmt: skip
    WIDE: tl.constexpr = COLUMNS // PARTS
    o_row = row + tl.arange(0, ROWS)
    m_row = o_row < n
    peak = tl.load(row_terms + o_row, mask=m_row, other=0.0)[:, None]
    log_sum = tl.load(row_terms + n + o_row, mask=m_row, other=0.0)[:, None]
    target = tl.load(targets + o_row, mask=m_row, other=-1) - first
    for index in tl.static_range(PARTS):
        start = column + index * WIDE
        o_column = begin + start + tl.arange(0, WIDE)
        part = _part(acc, index, PARTS, ROWS, COLUMNS)
        z = _z(part, bias, inverse_heat, softcap, o_row, o_column, n, vocab, BIAS, SOFTCAP)
        log_p = (z - peak) - log_sum
        # without a soft-cap this is not read, hence not made
        capped = z * tl.load(row_terms + 6 * n + o_row, mask=m_row, other=1.0)[:, None]
        b_dx = _dx(
            log_p, tl.exp2(log_p * LOG2E), capped, target, o_column, row_terms, softcap, n, o_row, m_row, SOFTCAP
        )
        _store(dx, b_dx, row, start, n, stop - begin, stride_dx, ROWS, WIDE, TMA)


@triton.jit
def _kept_gradient_kernel(
    kept, partials, targets, row_terms, softcap, n, vocab, first, stride_kept,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """exp(z - its part's peak) becomes dx in place; one part of COLUMNS entries a program."""
    row, column = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    o_row, o_column = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    m_row = o_row < n
    p_kept = kept + o_row.to(tl.int64)[:, None] * stride_kept + o_column[None, :]
    mask = m_row[:, None] & (o_column < vocab)[None, :]
    e = tl.load(p_kept, mask=mask, other=0.0).to(tl.float32)
    peak = tl.load(row_terms + o_row, mask=m_row, other=0.0)
    log_sum = tl.load(row_terms + n + o_row, mask=m_row, other=0.0)
    part_peak = tl.load(partials + tl.program_id(0).to(tl.int64) * 3 * n + o_row, mask=m_row, other=0.0)
    part_peak = tl.where(part_peak == float("-inf"), 0.0, part_peak)
    offset = (part_peak - peak) - log_sum
    log_p = tl.log2(e) / LOG2E + offset[:, None]
    p = e * tl.exp2(offset * LOG2E)[:, None]
    target = tl.load(targets + o_row, mask=m_row, other=-1) - first
    heat = tl.load(row_terms + 6 * n + o_row, mask=m_row, other=1.0)[:, None]
    capped = log_p * heat + tl.load(row_terms + 5 * n + o_row, mask=m_row, other=0.0)[:, None]
    b_dx = _dx(log_p, p, capped, target, o_column, row_terms, softcap, n, o_row, m_row, SOFTCAP)
    tl.store(p_kept, b_dx.to(kept.dtype.element_ty), mask=mask)


def partial(scores: Scores) -> Partial:
    """Partial results [N] of all rows over the weight's entries."""
    n, device = len(scores), scores.hidden.device
    merged = torch.empty(3, n, dtype=torch.float32, device=device)
    target_z = torch.full((n,), -torch.inf, dtype=torch.float32, device=device)
    for i in range(0, n, PARTIAL_ROWS):
        part = scores.rows(slice(i, i + PARTIAL_ROWS))
        partials = _launch_partial(part, target_z[i : i + PARTIAL_ROWS], None)
        merged[:, i : i + PARTIAL_ROWS] = _combine(partials)
    return Partial(*merged.unbind(), target_z)


def keep(scores: Scores) -> tuple[Partial, tuple[Tensor, Tensor]]:
    """Partial results, and what `kept_gradient` makes the gradient from: exponentials [n, V] and the parts' results."""
    n = len(scores)
    target_z = torch.full((n,), -torch.inf, dtype=torch.float32, device=scores.hidden.device)
    kept = _matrix(n, scores.vocab, scores)
    partials = _launch_partial(scores, target_z, kept)
    return Partial(*_combine(partials).unbind(), target_z), (kept, partials)


def gradient(scores: Scores, stats: Stats, upstream: Upstream, start: int, stop: int) -> Tensor:
    """dL/dx [n, stop - start] of the weight's entries start..stop, in the inputs' dtype."""
    tile, n = _tile(scores), len(scores)
    dx = _matrix(n, stop - start, scores)
    common, pointers, flags = _arguments(scores, tile)
    if n:
        grid = (tiles(n, tile.rows) * tiles(stop - start, tile.columns),)
        launch(
            _gradient_kernel, grid, dx.device, *pointers, scores.targets.contiguous(), _inverse(scores), _row_terms(scores, stats, upstream),
            _target(dx, tile), float(scores.softcap or 0.0), n, start, stop, *common, dx.stride(0), **flags,
        )  # fmt: skip
    return dx


def kept_gradient(scores: Scores, kept: tuple[Tensor, Tensor], stats: Stats, upstream: Upstream) -> Tensor:
    """dL/dx [n, V], in place of the exponentials that `keep` gave."""
    dx, partials = kept
    n, rows, part = len(scores), 16, _tile(scores).part
    if n:
        grid = (tiles(scores.vocab, part), tiles(n, rows))
        launch(
            _kept_gradient_kernel, grid, dx.device, dx, partials, scores.targets.contiguous(), _row_terms(scores, stats, upstream), float(scores.softcap or 0.0), n,
            scores.vocab, scores.first, dx.stride(0),
            ROWS=rows, COLUMNS=part, SOFTCAP=scores.softcap is not None, num_warps=4,
        )  # fmt: skip
    return dx


def block(scores: Scores, rows_first: bool) -> tuple[int, int]:
    """Rows and entries of one block of dx, within BLOCK_BYTES: whole rows if they come first, else as many as there are."""
    size, columns = scores.hidden.element_size(), _tile(scores).columns
    if rows_first:
        return max(128, BLOCK_BYTES // (scores.vocab * size) // 128 * 128), scores.vocab
    rows = max(1, min(len(scores), BLOCK_BYTES // (4096 * size)))
    return rows, max(columns, BLOCK_BYTES // (rows * size) // columns * columns)


def chunk_rows(scores: Scores) -> int:
    """Rows of one one-pass chunk."""
    return max(128, KEPT_BYTES // (scores.vocab * scores.hidden.element_size()) // 128 * 128)


def unit(scores: Scores, upstream: Upstream) -> Tensor | None:
    """Power of two in whose units dx is made: fp16 would flush the gradients of a long batch to zero, or overflow."""
    if scores.hidden.dtype != torch.float16 or not len(scores):
        return None
    largest = torch.stack([x.abs() / scores.temperature for x in upstream]).amax().float()
    # dx is at most some sixteen times the largest, and 2^15 the largest that fp16 holds
    return torch.ldexp(torch.ones_like(largest), (torch.frexp(largest).exponent - 10).clamp(min=-126))


def _tile(scores: Scores) -> Tile:
    tma = all(_aligned(x) for pair in scores.products() for x in pair)
    capped = scores.softcap is not None
    return Tile.of(capability(scores.hidden.device), scores.hidden.dtype, tma=tma, capped=capped)


def _matrix(rows: int, columns: int, scores: Scores) -> Tensor:
    """[rows, columns] uninitialised, each row at a multiple of 128 bytes: cuBLAS is slow on odd ones."""
    align = 128 // scores.hidden.element_size()
    stride = tiles(columns, align) * align
    return torch.empty(rows, stride, dtype=scores.hidden.dtype, device=scores.hidden.device)[:, :columns]


def _inverse(scores: Scores) -> Tensor:
    return scores.temperature.reciprocal()


def _row_terms(scores: Scores, stats: Stats, upstream: Upstream) -> Tensor:
    """[7, n], as the gradient's kernels read them: peak, log_sum, a, b, the target's dx, lse T and T.

    dz_j = p_j (l - g - h (log p_j + entropy)) + g [j is the target], and dx = dz slope / T.
    """
    heat, (g, h, by_lse) = scores.temperature, upstream
    # at the target g (1 - p) is taken from its log-prob: 1 - p of a p near 1 would cancel
    p = stats.logp.exp()
    at_target = torch.where(p > 0, p * (by_lse - h * (stats.logp + stats.entropy)), 0.0) - g * torch.special.expm1(
        stats.logp
    )
    lse = stats.peak + stats.log_sum
    if scores.softcap is not None:
        at_target = at_target * (1 - ((stats.logp + lse) * heat / scores.softcap).square())
    a, b = (by_lse - g - h * stats.entropy) / heat, h / heat
    return torch.stack([stats.peak, stats.log_sum, a, b, at_target / heat, lse * heat, heat])


def _arguments(scores: Scores, tile: Tile) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Sizes and strides, tensors or descriptors, and compile-time flags that the product kernels share."""
    products = [(_dense(left), _dense(right)) for left, right in scores.products()]
    low = products[-1]  # without an adapter the first product again, never read

    def describe(x: Tensor, rows: int) -> Any:
        return TensorDescriptor.from_tensor(x, [rows, tile.step]) if tile.tma else x

    pointers = [describe(x, rows) for pair in (products[0], low) for x, rows in zip(pair, tile.shape, strict=True)]
    sizes = (scores.vocab, products[0][0].shape[1], low[0].shape[1], scores.first)
    strides = (x.stride(0) for pair in (products[0], low) for x in pair)
    flags = {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.step, "PARTS": tile.parts, "GROUP": tile.group, "TMA": tile.tma,
        "PRECISION": "ieee" if scores.hidden.dtype == torch.float32 else "tf32",
        "LOW": len(products) > 1, "BIAS": scores.bias is not None, "SOFTCAP": scores.softcap is not None,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    bias = scores.hidden if scores.bias is None else scores.bias.contiguous()
    return (*sizes, *strides), (*pointers, bias), flags


def _target(x: Tensor, tile: Tile) -> Any:
    """What a product kernel stores its parts through."""
    return TensorDescriptor.from_tensor(x, [tile.rows, tile.part]) if tile.tma else x


def _dense(x: Tensor) -> Tensor:
    """Rows of unit stride; a copy only where they aren't."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _aligned(x: Tensor) -> bool:
    """What a tensor memory descriptor asks of base address and row length."""
    return address(x) % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(1) == 1


def _launch_partial(scores: Scores, target_z: Tensor, kept: Tensor | None) -> Tensor:
    """The parts' results [parts, 3, n]."""
    tile, n = _tile(scores), len(scores)
    partials = torch.empty(tiles(scores.vocab, tile.part), 3, n, dtype=torch.float32, device=scores.hidden.device)
    common, pointers, flags = _arguments(scores, tile)
    if n:
        grid = (tiles(n, tile.rows) * tiles(scores.vocab, tile.columns),)
        launch(
            _partial_kernel, grid, partials.device, *pointers, scores.targets.contiguous(), _inverse(scores), partials, target_z,
            scores.hidden if kept is None else _target(kept, tile), float(scores.softcap or 0.0),
            n, *common, 0 if kept is None else kept.stride(0), KEEP=kept is not None, **flags,
        )  # fmt: skip
    return partials


def _combine(partials: Tensor) -> Tensor:
    """[3, n]: the parts' results merged in vocabulary order."""
    parts, _, n = partials.shape
    merged = torch.empty(3, n, dtype=torch.float32, device=partials.device)
    if n:
        launch(
            _combine_kernel, (tiles(n, COMBINE_ROWS),), merged.device, partials, merged, n, parts,
            ROWS=COMBINE_ROWS, PARTS=COMBINE_PARTS, num_warps=4,
        )  # fmt: skip
    return merged
