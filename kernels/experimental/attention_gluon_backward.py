"""Attention's backward in Gluon for Hopper: the two kernels that `attention_gluon` launches.

Each owns what it sums, so nothing is added atomically and every run gives the same bits: 14 E operations a pair where
10 E are needed. As in the forward, a warp of its own loads blocks (TMA) and two groups of four warps multiply (wgmma).

dk and dv: a group owns ROWS keys of one key head and takes the blocks of queries of all heads that share it in order.
Scores are transposed, so that probabilities and their gradients come out of registers as factors of dv and dk. dq: a
group owns ROWS queries; the scores of a block are under way beside the product of the block before. `base` is the lse
in units of log 2, +inf for rows past the segment's end or without keys anywhere: their probabilities are 0.
What lies past a segment's end is replaced by zeros in shared memory where it would be a factor, since 0 times NaN is
NaN; both groups write the same there.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (what gluon.jit makes of a function is not typed, and layouts are annotated as the compile-time values they become)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .attention_gluon_parts import count_blocks, let_go, own_blocks, place, seen_by, slot_of, store, zero_tail


@gluon.jit
def _add_rows(
    shared, base, delta, dk, dv, key_head, tile, end, first, last, scale, unit, tokens, group, stride_dk,
    WHO: gl.constexpr, E: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """What warp group WHO does for dk and dv: its ROWS keys against every block of STEP queries."""
    k_s, v_s, q_s, do_s, rows_s, own_full, full, empty = shared
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    column = tile + WHO * ROWS
    o_column = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    o_row = gl.arange(0, STEP, layout=gl.SliceLayout(0, s_layout))
    b_dk = gl.zeros([ROWS, E], gl.float32, layout=d_layout)
    b_dv = gl.zeros([ROWS, E], gl.float32, layout=d_layout)
    zeros = gl.zeros([ROWS, STEP], gl.float32, layout=s_layout)
    start = first
    if CAUSAL:
        start = tile
        last = end  # one register less
    blocks = gl.cdiv(last - start, STEP)
    b_k = k_s.index(WHO)
    b_v = v_s.index(WHO)
    mbarrier.wait(own_full.index(WHO), 0)
    row = start
    for turn in range(0, group * blocks):
        slot, parity = slot_of(turn, STAGES)
        b_q = q_s.index(slot)
        b_do = do_s.index(slot)
        mbarrier.wait(full.index(slot), parity)
        if last - row < STEP:
            zero_tail(b_q, last - row, STEP, E)
            zero_tail(b_do, last - row, STEP, E)
        scoring = warpgroup_mma(b_k, b_q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        slopes = warpgroup_mma(b_v, b_do.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scoring])
        b_base = rows_s.index(2 * slot).load(gl.SliceLayout(0, s_layout))
        p = gl.exp2(scores * scale - b_base[None, :])
        if CAUSAL:
            p = gl.where((o_row + (row - column))[None, :] >= o_column[:, None], p, 0.0)
        b_p = gl.convert_layout(p.to(q_s.dtype), p_layout)
        dp = warpgroup_mma_wait(0, deps=[slopes])
        adding_dv = warpgroup_mma(b_p, b_do, b_dv, is_async=True)
        b_delta = rows_s.index(2 * slot + 1).load(gl.SliceLayout(0, s_layout))
        b_ds = gl.convert_layout((p * (dp - b_delta[None, :])).to(q_s.dtype), p_layout)
        adding_dk = warpgroup_mma(b_ds, b_q, b_dk, is_async=True)
        b_dv, b_dk = warpgroup_mma_wait(0, deps=[adding_dv, adding_dk])
        mbarrier.arrive(empty.index(slot), count=1)
        row = gl.where(row + STEP < last, row + STEP, start)
    store(dk, b_dk * unit, key_head, column, end, stride_dk, E, ROWS, d_layout)
    store(dv, b_dv, key_head, column, end, stride_dk, E, ROWS, d_layout)


@gluon.jit
def _keys_first(
    shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dk, dv, key_head, tile, end, first, last, scale, unit, tokens,
    group, stride_dk,
    E: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    _add_rows(
        shared, base, delta, dk, dv, key_head, tile, end, first, last, scale, unit, tokens, group, stride_dk,
        0, E, ROWS, STEP, STAGES, CAUSAL,
    )  # fmt: skip


@gluon.jit
def _keys_second(
    shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dk, dv, key_head, tile, end, first, last, scale, unit, tokens,
    group, stride_dk,
    E: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    _add_rows(
        shared, base, delta, dk, dv, key_head, tile, end, first, last, scale, unit, tokens, group, stride_dk,
        1, E, ROWS, STEP, STAGES, CAUSAL,
    )  # fmt: skip


@gluon.jit
def _keys_load(
    shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dk, dv, key_head, tile, end, first, last, scale, unit, tokens,
    group, stride_dk,
    E: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """What the loading warp does for dk and dv: each group's keys and values, then blocks of queries and dout."""
    k_s, v_s, q_s, do_s, rows_s, own_full, full, empty = shared
    layout: gl.constexpr = gl.BlockedLayout([STEP // 32], [32], [1], [0])
    o_step = gl.arange(0, STEP, layout=layout)
    for who in gl.static_range(2):
        mbarrier.expect(own_full.index(who), 2 * k_tma.block_type.nbytes)
        where = [tile + who * ROWS, key_head * E]
        tma.async_copy_global_to_shared(k_tma, where, own_full.index(who), k_s.index(who))
        tma.async_copy_global_to_shared(v_tma, where, own_full.index(who), v_s.index(who))
    start = first
    if CAUSAL:
        start = tile
    blocks = gl.cdiv(last - start, STEP)
    for turn in range(0, group * blocks):
        slot, parity = slot_of(turn, STAGES)
        row = start + turn % blocks * STEP
        head = key_head * group + turn // blocks
        at = head.to(gl.int64) * tokens + row + o_step
        b_base = gl.load(base + at, mask=row + o_step < last, other=float("inf"))
        b_delta = gl.load(delta + at, mask=row + o_step < last, other=0.0)
        where = [row, head * E]
        mbarrier.wait(empty.index(slot), parity ^ 1)
        rows_s.index(2 * slot).store(b_base)
        rows_s.index(2 * slot + 1).store(b_delta)
        mbarrier.arrive(full.index(slot), count=1)
        mbarrier.expect(full.index(slot), 2 * q_tma.block_type.nbytes)
        tma.async_copy_global_to_shared(q_tma, where, full.index(slot), q_s.index(slot))
        tma.async_copy_global_to_shared(dout_tma, where, full.index(slot), do_s.index(slot))


@gluon.jit
def keys_kernel(
    q_tma, k_tma, v_tma, dout_tma, base, delta, dk, dv, programs, scale, unit, tokens, heads, group, stride_dk,
    E: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk and dv [keys, heads, E] of one tile of 2 ROWS keys that has queries; heads are key heads here."""
    key_head, tile, end, first, last = place(programs, heads)
    k_s = gl.allocate_shared_memory(k_tma.dtype, [2, ROWS, E], k_tma.layout)
    v_s = gl.allocate_shared_memory(v_tma.dtype, [2, ROWS, E], v_tma.layout)
    q_s = gl.allocate_shared_memory(q_tma.dtype, [STAGES, STEP, E], q_tma.layout)
    do_s = gl.allocate_shared_memory(dout_tma.dtype, [STAGES, STEP, E], dout_tma.layout)
    rows_s = gl.allocate_shared_memory(gl.float32, [2 * STAGES, STEP], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    own_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for who in gl.static_range(2):
        mbarrier.init(own_full.index(who), count=1)
    for slot in gl.static_range(STAGES):
        # once for the bytes of q and dout, once for base and delta
        mbarrier.init(full.index(slot), count=2)
        mbarrier.init(empty.index(slot), count=2)
    shared = (k_s, v_s, q_s, do_s, rows_s, own_full, full, empty)
    # written out three times: a name would make run-time values of the compile-time ones
    gl.warp_specialize(
        [
            (_keys_first, (shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dk, dv, key_head, tile, end, first, last,
                           scale, unit, tokens, group, stride_dk, E, ROWS, STEP, STAGES, CAUSAL)),
            (_keys_second, (shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dk, dv, key_head, tile, end, first, last,
                            scale, unit, tokens, group, stride_dk, E, ROWS, STEP, STAGES, CAUSAL)),
            (_keys_load, (shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dk, dv, key_head, tile, end, first, last,
                          scale, unit, tokens, group, stride_dk, E, ROWS, STEP, STAGES, CAUSAL)),
        ],
        [4, 1], [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _slope(scores, dp, b_base, b_delta, scale, seen, MASKED: gl.constexpr):
    """ds / scale [ROWS, STEP], 0 where a query doesn't see a key."""
    ds = gl.exp2(scores * scale - b_base[:, None]) * (dp - b_delta[:, None])
    if MASKED:
        ds = gl.where(seen, ds, 0.0)
    return ds


@gluon.jit
def _add_columns(
    shared, base, delta, dq, head, tile, end, first, last, scale, unit, tokens, stride_dq,
    WHO: gl.constexpr, E: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """What warp group WHO does for dq: its ROWS queries against blocks of STEP keys, the masked one first."""
    q_s, do_s, k_s, v_s, own_full, k_full, k_empty, v_full, v_empty = shared
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    row = tile + WHO * ROWS
    blocks, hidden = own_blocks(tile, row, first, last, ROWS, STEP, CAUSAL)
    let_go(hidden, k_full, k_empty, v_full, v_empty, STAGES)
    o_row = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    at = head.to(gl.int64) * tokens + o_row
    b_base = gl.load(base + at, mask=o_row < end, other=float("inf"))
    b_delta = gl.load(delta + at, mask=o_row < end, other=0.0)
    zeros = gl.zeros([ROWS, STEP], gl.float32, layout=s_layout)
    acc = gl.zeros([ROWS, E], gl.float32, layout=d_layout)
    b_q = q_s.index(WHO)
    b_do = do_s.index(WHO)
    slot, parity = slot_of(hidden, STAGES)
    column = first + (blocks - 1 - hidden) * STEP
    mbarrier.wait(own_full.index(WHO), 0)
    mbarrier.wait(k_full.index(slot), parity)
    if last - column < STEP:
        zero_tail(k_s.index(slot), last - column, STEP, E)
    scoring = warpgroup_mma(b_q, k_s.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(slot), parity)
    slopes = warpgroup_mma(b_do, v_s.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores, dp = warpgroup_mma_wait(0, deps=[scoring, slopes])
    mbarrier.arrive(v_empty.index(slot), count=1)
    seen = seen_by(o_row, column, last, STEP, CAUSAL, s_layout)
    ds = _slope(scores, dp, b_base, b_delta, scale, seen, True)
    b_ds = gl.convert_layout(ds.to(q_s.dtype), p_layout)
    slot, parity = slot_of(hidden + 1, STAGES)
    mbarrier.wait(k_full.index(slot), parity, pred=hidden + 1 < blocks)
    for turn in range(hidden + 1, blocks):
        slot, parity = slot_of(turn, STAGES)
        before, _ = slot_of(turn - 1, STAGES)
        after, after_parity = slot_of(turn + 1, STAGES)
        scoring = warpgroup_mma(b_q, k_s.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(slot), parity)
        slopes = warpgroup_mma(b_do, v_s.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        adding = warpgroup_mma(b_ds, k_s.index(before), acc, is_async=True)
        scores, dp = warpgroup_mma_wait(1, deps=[scoring, slopes])
        mbarrier.arrive(v_empty.index(slot), count=1)
        ds = _slope(scores, dp, b_base, b_delta, scale, seen, False)
        # waited for here, so that the exponentials stay in front of the wait for the product (see the forward)
        mbarrier.wait(k_full.index(after), after_parity, pred=turn + 1 < blocks)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(k_empty.index(before), count=1)
        b_ds = gl.convert_layout(ds.to(q_s.dtype), p_layout)
    slot, parity = slot_of(blocks - 1, STAGES)
    adding = warpgroup_mma(b_ds, k_s.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[adding])
    store(dq, acc * unit, head, row, end, stride_dq, E, ROWS, d_layout)


@gluon.jit
def _queries_first(
    shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dq, head, tile, end, first, last, scale, unit, tokens, group,
    stride_dq,
    E: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    _add_columns(
        shared, base, delta, dq, head, tile, end, first, last, scale, unit, tokens, stride_dq,
        0, E, ROWS, STEP, STAGES, CAUSAL,
    )  # fmt: skip


@gluon.jit
def _queries_second(
    shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dq, head, tile, end, first, last, scale, unit, tokens, group,
    stride_dq,
    E: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    _add_columns(
        shared, base, delta, dq, head, tile, end, first, last, scale, unit, tokens, stride_dq,
        1, E, ROWS, STEP, STAGES, CAUSAL,
    )  # fmt: skip


@gluon.jit
def _queries_load(
    shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dq, head, tile, end, first, last, scale, unit, tokens, group,
    stride_dq,
    E: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """What the loading warp does for dq: each group's queries and dout, then blocks of keys and values."""
    q_s, do_s, k_s, v_s, own_full, k_full, k_empty, v_full, v_empty = shared
    for who in gl.static_range(2):
        mbarrier.expect(own_full.index(who), 2 * q_tma.block_type.nbytes)
        where = [tile + who * ROWS, head * E]
        tma.async_copy_global_to_shared(q_tma, where, own_full.index(who), q_s.index(who))
        tma.async_copy_global_to_shared(dout_tma, where, own_full.index(who), do_s.index(who))
    blocks = count_blocks(tile, first, last, ROWS, STEP, CAUSAL)
    for turn in range(0, blocks):
        slot, parity = slot_of(turn, STAGES)
        where = [first + (blocks - 1 - turn) * STEP, (head // group) * E]
        mbarrier.wait(k_empty.index(slot), parity ^ 1)
        mbarrier.expect(k_full.index(slot), k_tma.block_type.nbytes)
        tma.async_copy_global_to_shared(k_tma, where, k_full.index(slot), k_s.index(slot))
        mbarrier.wait(v_empty.index(slot), parity ^ 1)
        mbarrier.expect(v_full.index(slot), v_tma.block_type.nbytes)
        tma.async_copy_global_to_shared(v_tma, where, v_full.index(slot), v_s.index(slot))


@gluon.jit
def queries_kernel(
    q_tma, k_tma, v_tma, dout_tma, base, delta, dq, programs, scale, unit, tokens, heads, group, stride_dq,
    E: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq [tokens, heads, E] of one tile of 2 ROWS queries that has keys."""
    head, tile, end, first, last = place(programs, heads)
    q_s = gl.allocate_shared_memory(q_tma.dtype, [2, ROWS, E], q_tma.layout)
    do_s = gl.allocate_shared_memory(dout_tma.dtype, [2, ROWS, E], dout_tma.layout)
    k_s = gl.allocate_shared_memory(k_tma.dtype, [STAGES, STEP, E], k_tma.layout)
    v_s = gl.allocate_shared_memory(v_tma.dtype, [STAGES, STEP, E], v_tma.layout)
    own_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for who in gl.static_range(2):
        mbarrier.init(own_full.index(who), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)
    shared = (q_s, do_s, k_s, v_s, own_full, k_full, k_empty, v_full, v_empty)
    # written out three times: a name would make run-time values of the compile-time ones
    gl.warp_specialize(
        [
            (_queries_first, (shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dq, head, tile, end, first, last,
                              scale, unit, tokens, group, stride_dq, E, ROWS, STEP, STAGES, CAUSAL)),
            (_queries_second, (shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dq, head, tile, end, first, last,
                               scale, unit, tokens, group, stride_dq, E, ROWS, STEP, STAGES, CAUSAL)),
            (_queries_load, (shared, q_tma, k_tma, v_tma, dout_tma, base, delta, dq, head, tile, end, first, last,
                             scale, unit, tokens, group, stride_dq, E, ROWS, STEP, STAGES, CAUSAL)),
        ],
        [4, 1], [REGISTERS, 24],
    )  # fmt: skip
