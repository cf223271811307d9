"""Attention's forward in Gluon for Hopper: the kernel that `attention_gluon` launches.

One program owns 2 ROWS queries of one segment and head. A warp of its own loads blocks of keys and values into a ring in
shared memory (TMA); two groups of four warps own ROWS queries each and multiply (asynchronous wgmma). The scores of the
next block are under way while the softmax of this one is computed, and so is the product of the last probabilities with
their values; only then are sums of an older peak scaled down (the overlap inside a warp group of FlashAttention-3, Shah
et al., arXiv:2407.08608, section 3.2).

Blocks are taken from the last to the first, so that the one that needs a mask comes first and the loop has none: causal,
the block of a group's own diagonal (COLUMNS is a multiple of ROWS and both are counted from the segment's begin); full,
the one at the segment's end. A group waits for a block that it sees nothing of and lets it go. In the block at the end
of a segment the values of the next segment are replaced by zeros in shared memory, since 0 times NaN is NaN; both groups
write the same there. Scores are kept in units of log 2.

Newer Triton (3.9) calls a TMA store async_store; there is none here: it would write past a segment's end.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (what gluon.jit makes of a function is not typed, and layouts are annotated as the compile-time values they become)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .attention_gluon_parts import count_blocks, let_go, own_blocks, place, seen_by, slot_of, store, zero_tail

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _softmax(scores, peak, total, scale):
    """(probabilities of a block, what sums so far shrink by, peak, total)"""
    new = gl.maximum(peak, gl.max(scores, 1) * scale)
    p = gl.exp2(scores * scale - new[:, None])
    decay = gl.exp2(peak - new)
    return p, decay, new, total * decay + gl.sum(p, 1)


@gluon.jit
def _attend(
    shared, out, lse, head, tile, end, first, last, scale, tokens, stride_out,
    WHO: gl.constexpr, E: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """What warp group WHO does: its ROWS queries against every block of keys that they see."""
    q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty = shared
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row = tile + WHO * ROWS
    blocks, hidden = own_blocks(tile, row, first, last, ROWS, COLUMNS, CAUSAL)
    let_go(hidden, k_full, k_empty, v_full, v_empty, STAGES)
    o_row = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, layout=s_layout)
    acc = gl.zeros([ROWS, E], gl.float32, layout=o_layout)
    peak = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, s_layout))
    total = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, s_layout))
    slot, parity = slot_of(hidden, STAGES)
    b_q = q_s.index(WHO)
    mbarrier.wait(q_full.index(WHO), 0)
    mbarrier.wait(k_full.index(slot), parity)
    started = warpgroup_mma(b_q, k_s.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[started])
    mbarrier.arrive(k_empty.index(slot), count=1)
    column = first + (blocks - 1 - hidden) * COLUMNS
    seen = seen_by(o_row, column, last, COLUMNS, CAUSAL, s_layout)
    # the first key of the first block is visible to every row, so the peak is finite from here on
    p, decay, peak, total = _softmax(gl.where(seen, scores, float("-inf")), peak, total, scale)
    b_p = gl.convert_layout(p.to(q_s.dtype), p_layout)
    if last - column < COLUMNS:
        mbarrier.wait(v_full.index(slot), parity)
        zero_tail(v_s.index(slot), last - column, COLUMNS, E)
    slot, parity = slot_of(hidden + 1, STAGES)
    mbarrier.wait(k_full.index(slot), parity, pred=hidden + 1 < blocks)
    for turn in range(hidden + 1, blocks):
        slot, _ = slot_of(turn, STAGES)
        before, before_parity = slot_of(turn - 1, STAGES)
        after, after_parity = slot_of(turn + 1, STAGES)
        started = warpgroup_mma(b_q, k_s.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), before_parity)
        adding = warpgroup_mma(b_p, v_s.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[started])
        mbarrier.arrive(k_empty.index(slot), count=1)
        p, decay, peak, total = _softmax(scores, peak, total, scale)
        # the next block's keys are waited for here, not where they are used: without a loop in between, ptxas would
        # wait for the product before it computes the exponentials, and these would run beside nothing
        mbarrier.wait(k_full.index(after), after_parity, pred=turn + 1 < blocks)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
        b_p = gl.convert_layout(p.to(q_s.dtype), p_layout)
    slot, parity = slot_of(blocks - 1, STAGES)
    mbarrier.wait(v_full.index(slot), parity)
    adding = warpgroup_mma(b_p, v_s.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[adding])
    gl.store(lse + head.to(gl.int64) * tokens + o_row, (peak + gl.log2(total)) * LN2, mask=o_row < end)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, o_layout))[:, None]
    store(out, acc, head, row, end, stride_out, E, ROWS, o_layout)


@gluon.jit
def _attend_first(
    shared, q_tma, k_tma, v_tma, out, lse, head, group, tile, end, first, last, scale, tokens, stride_out,
    E: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    _attend(
        shared, out, lse, head, tile, end, first, last, scale, tokens, stride_out, 0, E, ROWS, COLUMNS, STAGES, CAUSAL
    )


@gluon.jit
def _attend_second(
    shared, q_tma, k_tma, v_tma, out, lse, head, group, tile, end, first, last, scale, tokens, stride_out,
    E: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    _attend(
        shared, out, lse, head, tile, end, first, last, scale, tokens, stride_out, 1, E, ROWS, COLUMNS, STAGES, CAUSAL
    )


@gluon.jit
def _load(
    shared, q_tma, k_tma, v_tma, out, lse, head, group, tile, end, first, last, scale, tokens, stride_out,
    E: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """What the loading warp does: queries once, then blocks of keys and values as slots become free."""
    q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty = shared
    for who in gl.static_range(2):
        mbarrier.expect(q_full.index(who), q_tma.block_type.nbytes)
        tma.async_copy_global_to_shared(q_tma, [tile + who * ROWS, head * E], q_full.index(who), q_s.index(who))
    blocks = count_blocks(tile, first, last, ROWS, COLUMNS, CAUSAL)
    from_column = (head // group) * E
    for turn in range(0, blocks):
        slot, parity = slot_of(turn, STAGES)
        column = first + (blocks - 1 - turn) * COLUMNS
        mbarrier.wait(k_empty.index(slot), parity ^ 1)
        mbarrier.expect(k_full.index(slot), k_tma.block_type.nbytes)
        tma.async_copy_global_to_shared(k_tma, [column, from_column], k_full.index(slot), k_s.index(slot))
        mbarrier.wait(v_empty.index(slot), parity ^ 1)
        mbarrier.expect(v_full.index(slot), v_tma.block_type.nbytes)
        tma.async_copy_global_to_shared(v_tma, [column, from_column], v_full.index(slot), v_s.index(slot))


@gluon.jit
def forward_kernel(
    q_tma, k_tma, v_tma, out, lse, programs, scale, tokens, heads, group, stride_out,
    E: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [tokens, heads, E] and lse [heads, tokens] of one tile of queries that has keys; `scale` holds log2(e)."""
    head, tile, end, first, last = place(programs, heads)
    q_s = gl.allocate_shared_memory(q_tma.dtype, [2, ROWS, E], q_tma.layout)
    k_s = gl.allocate_shared_memory(k_tma.dtype, [STAGES, COLUMNS, E], k_tma.layout)
    v_s = gl.allocate_shared_memory(v_tma.dtype, [STAGES, COLUMNS, E], v_tma.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for who in gl.static_range(2):
        mbarrier.init(q_full.index(who), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)
    shared = (q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty)
    # written out three times: a name would make run-time values of the compile-time ones
    gl.warp_specialize(
        [
            (_attend_first, (shared, q_tma, k_tma, v_tma, out, lse, head, group, tile, end, first, last, scale, tokens,
                             stride_out, E, ROWS, COLUMNS, STAGES, CAUSAL)),
            (_attend_second, (shared, q_tma, k_tma, v_tma, out, lse, head, group, tile, end, first, last, scale, tokens,
                              stride_out, E, ROWS, COLUMNS, STAGES, CAUSAL)),
            (_load, (shared, q_tma, k_tma, v_tma, out, lse, head, group, tile, end, first, last, scale, tokens,
                     stride_out, E, ROWS, COLUMNS, STAGES, CAUSAL)),
        ],
        [4, 1], [REGISTERS, 24],
    )  # fmt: skip
