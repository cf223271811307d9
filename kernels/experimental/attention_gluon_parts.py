"""What the kernels of attention in Gluon share: a program's place, the ring in shared memory, blocks at a segment's end."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (what gluon.jit makes of a function is not typed, and layouts are annotated as the compile-time values they become)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def place(programs, heads):
    """(head, first token, end, other side's begin, other side's end) of this program; heads of a tile are neighbours."""
    index = gl.program_id(0)
    p_program = programs + (index // heads) * 4
    return index % heads, gl.load(p_program), gl.load(p_program + 1), gl.load(p_program + 2), gl.load(p_program + 3)


@gluon.jit
def slot_of(turn, STAGES: gl.constexpr):
    """(slot, parity) of a turn."""
    return turn % STAGES, (turn // STAGES) & 1


@gluon.jit
def count_blocks(row, first, last, ROWS: gl.constexpr, COLUMNS: gl.constexpr, CAUSAL: gl.constexpr):
    """How many blocks of keys a tile of 2 ROWS queries from `row` on sees."""
    stop = last
    if CAUSAL:
        stop = gl.minimum(last, row + 2 * ROWS)
    return gl.cdiv(stop - first, COLUMNS)


@gluon.jit
def own_blocks(tile, row, first, last, ROWS: gl.constexpr, COLUMNS: gl.constexpr, CAUSAL: gl.constexpr):
    """(blocks that the tile sees, how many of these, from the end, a group with queries from `row` on doesn't see)"""
    blocks = count_blocks(tile, first, last, ROWS, COLUMNS, CAUSAL)
    top = blocks - 1
    if CAUSAL:
        top = gl.minimum(top, (row - first) // COLUMNS)
    return blocks, blocks - 1 - top


@gluon.jit
def let_go(hidden, k_full, k_empty, v_full, v_empty, STAGES: gl.constexpr):
    """The first `hidden` blocks, of which a group sees nothing: each phase is waited for, or its parity would say nothing."""
    for turn in range(0, hidden):
        slot, parity = slot_of(turn, STAGES)
        mbarrier.wait(k_full.index(slot), parity)
        mbarrier.arrive(k_empty.index(slot), count=1)
        mbarrier.wait(v_full.index(slot), parity)
        mbarrier.arrive(v_empty.index(slot), count=1)


@gluon.jit
def seen_by(o_row, column, last, COLUMNS: gl.constexpr, CAUSAL: gl.constexpr, layout: gl.constexpr):
    """Which keys from `column` on the queries `o_row` see; to be broadcast."""
    o_column = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    if CAUSAL:
        seen = o_row[:, None] >= o_column[None, :]
    else:
        seen = (o_column < last)[None, :]
    return seen


@gluon.jit
def zero_tail(block, valid, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Zeros in a block [ROWS, WIDTH] of shared memory from row `valid` on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    x = block.load(layout)
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    block.store(gl.where((o_row < valid)[:, None], x, gl.zeros([ROWS, WIDTH], x.dtype, layout=layout)))
    fence_async_shared()


@gluon.jit
def store(to, values, head, row, end, stride, E: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """values [ROWS, E] into one head of `to` [T, heads, E], rounded."""
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_e = gl.arange(0, E, layout=gl.SliceLayout(0, layout))
    base = to + head.to(gl.int64) * E + row.to(gl.int64) * stride
    # 32-bit offsets inside a tile
    gl.store(
        base + (o_row[:, None] * stride + o_e[None, :]),
        values.to(to.dtype.element_ty),
        mask=(row + o_row < end)[:, None],
    )
