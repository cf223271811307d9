"""Attention in Triton: the kernels that `attention_triton` launches. What they compute stands in attention_dense.py.

One program owns a tile of one segment and head: ROWS queries (forward, dq) or COLUMNS keys of a key head (dk and dv). It
finds its place in `programs` [n, 4]: first token of the tile, end of its segment, begin and end of the other side's
segment. Blocks of the other side that hold only visible pairs come in a loop without masks, the others (diagonal, end of
a segment) in a second one. Scores are kept in units of log 2, so that exp2 needs no factor.

Tokens past a segment's end belong to its neighbour, or don't exist. As rows of a program's own tile they are computed
and not stored; as a summand they are replaced by zeros, so that not even a NaN crosses from one segment to the next.
"""

# pyright: reportGeneralTypeIssues=false
# (what triton.jit makes of a function is not typed)

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _block(
    x, described, head, token, end, stride, stride_head,
    E: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[TOKENS, WIDTH] of one head from `token` on: zeros past column E and, with MASKED, from token `end` on."""
    if TMA and not MASKED:
        block = described.load([head, token, 0]).reshape(TOKENS, WIDTH)
    else:
        o_token, o_e = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
        # one 64-bit base; offsets inside a tile fit in 32 bits and stay in registers from block to block
        base = x + head.to(tl.int64) * stride_head + token.to(tl.int64) * stride
        p_block = base + (o_token[:, None] * stride + o_e[None, :])
        if MASKED:
            block = tl.load(p_block, mask=(token + o_token < end)[:, None] & (o_e < E)[None, :], other=0.0)
        elif E == WIDTH:
            block = tl.load(p_block)
        else:
            block = tl.load(p_block, mask=(o_e < E)[None, :], other=0.0)
    return block


@triton.jit
def _store(
    to, values, head, token, end, stride, E: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """values [TOKENS, WIDTH] into one head of `to` [T, heads, E], rounded; a descriptor would write past the segment."""
    o_token, o_e = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    base = to + head.to(tl.int64) * E + token.to(tl.int64) * stride
    mask = (token + o_token < end)[:, None] & (o_e < E)[None, :]
    tl.store(base + (o_token[:, None] * stride + o_e[None, :]), values.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _place(programs, heads):
    """(head, first token, end, other side's begin, other side's end) of this program; heads of a tile are neighbours."""
    index = tl.program_id(0)
    p_program = programs + (index // heads) * 4
    return index % heads, tl.load(p_program), tl.load(p_program + 1), tl.load(p_program + 2), tl.load(p_program + 3)


@triton.jit
def _visible(row, first, last, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr):
    """(end of the keys that a tile of queries sees whole blocks of, end of those it sees at all)."""
    if CAUSAL:
        whole = first + (row + 1 - first) // COLUMNS * COLUMNS
        stop = tl.minimum(last, row + ROWS)
    else:
        whole = first + (last - first) // COLUMNS * COLUMNS
        stop = last
    return tl.minimum(whole, stop), stop


@triton.jit
def _mask(scores, hidden, row, column, last, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr):
    """Scores [ROWS, COLUMNS], or what is made of them, with `hidden` where a query doesn't see a key."""
    o_column = column + tl.arange(0, COLUMNS)
    if CAUSAL:
        seen = row + tl.arange(0, ROWS)[:, None] >= o_column[None, :]
    else:
        seen = (o_column < last)[None, :]
    return tl.where(seen, scores, hidden)


@triton.jit
def _attend(
    acc, peak, total, b_q, k, v, k_tma, v_tma, key_head, row, start, stop, last, scale,
    stride_k, stride_k_head,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys start..stop (Milakov and Gimelshein, arXiv:1805.02867, as in FlashAttention-2)."""
    for offset in range(0, stop - start, COLUMNS):
        column = start + offset
        b_k = _block(k, k_tma, key_head, column, last, stride_k, stride_k_head, E, COLUMNS, WIDTH, TMA, MASKED)
        scores = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        if MASKED:
            scores = _mask(scores, float("-inf"), row, column, last, ROWS, COLUMNS, CAUSAL)
        # the first key is visible to every row, so the peak is finite from the first block on
        new = tl.maximum(peak, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new[:, None])
        decay = tl.exp2(peak - new)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        b_v = _block(v, v_tma, key_head, column, last, stride_k, stride_k_head, E, COLUMNS, WIDTH, TMA, MASKED)
        acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
        peak = new
    return acc, peak, total


@triton.jit
def forward_kernel(
    q, k, v, q_tma, k_tma, v_tma, out, lse, programs, scale, tokens, heads, group,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_out,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr, WIDTH: tl.constexpr,
    TMA: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [tokens, heads, E] and lse [heads, tokens] of one tile of queries; `scale` holds the factor log2(e)."""
    head, row, end, first, last = _place(programs, heads)
    key_head = head // group
    b_q = _block(q, q_tma, head, row, end, stride_q, stride_q_head, E, ROWS, WIDTH, TMA, not TMA)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    peak, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    whole, stop = _visible(row, first, last, ROWS, COLUMNS, CAUSAL)
    acc, peak, total = _attend(
        acc, peak, total, b_q, k, v, k_tma, v_tma, key_head, row, first, whole, last, scale,
        stride_k, stride_k_head, E, ROWS, COLUMNS, WIDTH, TMA, CAUSAL, False, PRECISION,
    )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, b_q, k, v, k_tma, v_tma, key_head, row, whole, stop, last, scale,
        stride_k, stride_k_head, E, ROWS, EDGE, WIDTH, TMA, CAUSAL, True, PRECISION,
    )  # fmt: skip
    # no keys at all: 0 / 1 and -inf + 0; a NaN stays one
    total = tl.where(total == 0, 1.0, total)
    o_row = row + tl.arange(0, ROWS)
    p_lse = lse + head.to(tl.int64) * tokens + o_row
    tl.store(p_lse, (peak + tl.log2(total)) * LN2, mask=o_row < end)
    _store(out, acc / total[:, None], head, row, end, stride_out, E, ROWS, WIDTH)


@triton.jit
def delta_kernel(
    dout, out, lse, delta, base, tokens, heads, stride_do, stride_do_head, stride_out, stride_out_head,
    E: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """delta [heads, tokens] = sum of dout * out, and base, the lse in units of log 2; +inf (p = 0) for a row without keys."""
    head, row = tl.program_id(0) % heads, tl.program_id(0) // heads * ROWS
    b_dout = _block(dout, dout, head, row, tokens, stride_do, stride_do_head, E, ROWS, WIDTH, False, True)
    b_out = _block(out, out, head, row, tokens, stride_out, stride_out_head, E, ROWS, WIDTH, False, True)
    o_row = row + tl.arange(0, ROWS)
    m_row, at = o_row < tokens, head.to(tl.int64) * tokens + o_row
    b_lse = tl.load(lse + at, mask=m_row, other=0.0)
    dead = tl.abs(b_lse) == float("inf")
    b_delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(delta + at, tl.where(dead, 0.0, b_delta), mask=m_row)
    tl.store(base + at, tl.where(dead, float("inf"), b_lse * LOG2E), mask=m_row)


@triton.jit
def _rows(p_row, o_row, last, MASKED: tl.constexpr):
    """A number a row, with MASKED 0 from row `last` on."""
    if MASKED:
        b_row = tl.load(p_row, mask=o_row < last, other=0.0)
    else:
        b_row = tl.load(p_row)
    return b_row


@triton.jit
def _add_keys(
    dk, dv, b_k, b_v, q, dout, q_tma, dout_tma, base, delta, head, row, column, last, scale, tokens,
    stride_q, stride_q_head,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to dk / scale and dv [COLUMNS, WIDTH]. Scores are transposed, [COLUMNS, ROWS]."""
    o_row = row + tl.arange(0, ROWS)
    at = head.to(tl.int64) * tokens + o_row
    # a row past the end: p = exp2(0 - inf)
    if MASKED:
        b_base = tl.load(base + at, mask=o_row < last, other=float("inf"))
    else:
        b_base = tl.load(base + at)
    if WIDTH <= 64:
        b_delta = _rows(delta + at, o_row, last, MASKED)
    b_q = _block(q, q_tma, head, row, last, stride_q, stride_q_head, E, ROWS, WIDTH, TMA, MASKED)
    p = tl.exp2(tl.dot(b_k, b_q.T, input_precision=PRECISION) * scale - b_base[None, :])
    if MASKED and CAUSAL:
        p = tl.where(o_row[None, :] >= column + tl.arange(0, COLUMNS)[:, None], p, 0.0)
    b_do = _block(dout, dout_tma, head, row, last, stride_q, stride_q_head, E, ROWS, WIDTH, TMA, MASKED)
    dv = tl.dot(p.to(b_do.dtype), b_do, dv, input_precision=PRECISION)
    dp = tl.dot(b_v, b_do.T, input_precision=PRECISION)
    if WIDTH > 64:
        # the sums of a wide head leave no registers to hold it any sooner
        b_delta = _rows(delta + at, o_row, last, MASKED)
    ds = p * (dp - b_delta[None, :])
    dk = tl.dot(ds.to(b_q.dtype), b_q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, dout, q_tma, k_tma, v_tma, dout_tma, base, delta, dk, dv, programs, scale, unit, tokens, heads, group,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_dk,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr, WIDTH: tl.constexpr,
    TMA: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys: the query heads of its group in order, each one's blocks of queries in order."""
    key_head, column, end, first, last = _place(programs, heads)
    b_k = _block(k, k_tma, key_head, column, end, stride_k, stride_k_head, E, COLUMNS, WIDTH, TMA, not TMA)
    b_v = _block(v, v_tma, key_head, column, end, stride_k, stride_k_head, E, COLUMNS, WIDTH, TMA, not TMA)
    b_dk, b_dv = tl.zeros([COLUMNS, WIDTH], tl.float32), tl.zeros([COLUMNS, WIDTH], tl.float32)
    start = column if CAUSAL else first
    # masked blocks of EDGE queries on the diagonal, then whole ones, then masked ones at the segment's end
    edges = tl.cdiv(last - start, EDGE)
    diagonal = tl.minimum(edges, (COLUMNS + EDGE - 1) // EDGE) if CAUSAL else edges * 0
    whole = tl.maximum(last - start - diagonal * EDGE, 0) // ROWS
    skipped = whole * (ROWS // EDGE)
    masked = edges - skipped
    # one loop over heads and blocks: a nested one needs more registers, and fills and drains its pipeline for each head
    for i in range(0, group * whole):
        head, row = key_head * group + i // whole, start + diagonal * EDGE + i % whole * ROWS
        b_dk, b_dv = _add_keys(
            b_dk, b_dv, b_k, b_v, q, dout, q_tma, dout_tma, base, delta, head, row, column, last, scale, tokens,
            stride_q, stride_q_head, E, ROWS, COLUMNS, WIDTH, TMA, CAUSAL, False, PRECISION,
        )  # fmt: skip
    for i in range(0, group * masked):
        head, block = key_head * group + i // masked, i % masked
        row = start + (block + tl.where(block >= diagonal, skipped, 0)) * EDGE
        b_dk, b_dv = _add_keys(
            b_dk, b_dv, b_k, b_v, q, dout, q_tma, dout_tma, base, delta, head, row, column, last, scale, tokens,
            stride_q, stride_q_head, E, EDGE, COLUMNS, WIDTH, TMA, CAUSAL, True, PRECISION,
        )  # fmt: skip
    _store(dk, b_dk * unit, key_head, column, end, stride_dk, E, COLUMNS, WIDTH)
    _store(dv, b_dv, key_head, column, end, stride_dk, E, COLUMNS, WIDTH)


@triton.jit
def _add_queries(
    dq, b_q, b_do, b_base, b_delta, k, v, k_tma, v_tma, key_head, row, start, stop, last, scale,
    stride_k, stride_k_head,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the keys start..stop add to dq / scale [ROWS, WIDTH]."""
    for offset in range(0, stop - start, COLUMNS):
        column = start + offset
        b_k = _block(k, k_tma, key_head, column, last, stride_k, stride_k_head, E, COLUMNS, WIDTH, TMA, MASKED)
        p = tl.exp2(tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale - b_base[:, None])
        if MASKED:
            p = _mask(p, 0.0, row, column, last, ROWS, COLUMNS, CAUSAL)
        b_v = _block(v, v_tma, key_head, column, last, stride_k, stride_k_head, E, COLUMNS, WIDTH, TMA, MASKED)
        dp = tl.dot(b_do, b_v.T, input_precision=PRECISION)
        ds = p * (dp - b_delta[:, None])
        dq = tl.dot(ds.to(b_k.dtype), b_k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def queries_kernel(
    q, k, v, dout, q_tma, k_tma, v_tma, dout_tma, base, delta, dq, programs, scale, unit, tokens, heads, group,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_dq,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr, WIDTH: tl.constexpr,
    TMA: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries."""
    head, row, end, first, last = _place(programs, heads)
    key_head = head // group
    b_q = _block(q, q_tma, head, row, end, stride_q, stride_q_head, E, ROWS, WIDTH, TMA, not TMA)
    b_do = _block(dout, dout_tma, head, row, end, stride_q, stride_q_head, E, ROWS, WIDTH, TMA, not TMA)
    o_row = row + tl.arange(0, ROWS)
    at = head.to(tl.int64) * tokens + o_row
    b_base = tl.load(base + at, mask=o_row < end, other=float("inf"))
    b_delta = tl.load(delta + at, mask=o_row < end, other=0.0)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    whole, stop = _visible(row, first, last, ROWS, COLUMNS, CAUSAL)
    acc = _add_queries(
        acc, b_q, b_do, b_base, b_delta, k, v, k_tma, v_tma, key_head, row, first, whole, last, scale,
        stride_k, stride_k_head, E, ROWS, COLUMNS, WIDTH, TMA, CAUSAL, False, PRECISION,
    )  # fmt: skip
    acc = _add_queries(
        acc, b_q, b_do, b_base, b_delta, k, v, k_tma, v_tma, key_head, row, whole, stop, last, scale,
        stride_k, stride_k_head, E, ROWS, EDGE, WIDTH, TMA, CAUSAL, True, PRECISION,
    )  # fmt: skip
    _store(dq, acc * unit, head, row, end, stride_dq, E, ROWS, WIDTH)
