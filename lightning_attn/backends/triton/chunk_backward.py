"""dK and dV in one launch, backward in time. Where a state fits in the registers of one program, it makes both:

    dK = ((V dO^T) o D) Q + (V R^T) o lambda^i       dV = ((K Q^T) o D) dO + (K R) o lambda^i
    R <- lambda^n R + Q^T (scale dO o lambda^(n-i))

with i counted from the block's last token, D and its scale as in `chunk`, and R [K, V] the gradient of the state. Where
it does not, programs side by side make a tile of columns each, of dK or of dV, with `chunk.sweep`, and find most operands
in the L2 cache. Either way memory moves q, k, v, do, dk and dv once: 1536 B a token and head at K = V = 128 in 16 bits. With
the 1024 of dq, which is a sweep forward in time, the backward comes to 2560 B.
"""

import triton
import triton.language as tl

from .chunk import sweep
from .primitives import (
    advance,
    below,
    carry_on,
    causal_decay,
    dot,
    first_state,
    locate_piece,
    program_index,
    rows,
    state_tile,
    tile_head_unit,
)


@triton.jit(do_not_specialize=["programs", "tokens", "sequences", "segments", "length"])
def chunk_backward_kernel(
    q, k, v, do,  # operands [B, T, H, K], [B, T, H, K], [B, T, H, V], [B, T, H, V]
    dk, dv,  # operands [B, T, H, K], [B, T, H, V], written
    decay,  # [H] float32
    dstate,  # gradient [N, H, K, V] of the state after each sequence, or None
    entering,  # R [B * segments, H, K, V] that enters each segment, or None if there is but one
    dinitial,  # gradient [N, H, K, V] of the state before each sequence, written, or None
    cu_seqlens,  # [N + 1] int32 or int64, or None
    scale, programs, tokens, heads, sequences, segments, length,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    _, head, unit = tile_head_unit(index, 1, heads)
    batch, n, segment, begin, end, ends, starts = locate_piece(
        cu_seqlens, unit, tokens, sequences, segments, length
    )
    row_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    in_k, in_v = below(K, 0, BLOCK_K), below(V, 0, BLOCK_V)
    in_state = (row_k < K)[:, None] & in_v
    slot = batch * segments + segment
    R = first_state(dstate, entering, n, slot, head, row_k, column_v, in_state, starts)

    s = tl.load(decay + head)
    i = tl.arange(0, BLOCK)
    D = causal_decay(s, BLOCK) * scale
    carried = tl.exp(-s * i)[:, None]
    qp = rows(q, batch, head, end - 1, BLOCK, 0, BLOCK_K, True)
    kp = rows(k, batch, head, end - 1, BLOCK, 0, BLOCK_K, True)
    vp = rows(v, batch, head, end - 1, BLOCK, 0, BLOCK_V, True)
    dop = rows(do, batch, head, end - 1, BLOCK, 0, BLOCK_V, True)
    dkp = rows(dk, batch, head, end - 1, BLOCK, 0, BLOCK_K, True)
    dvp = rows(dv, batch, head, end - 1, BLOCK, 0, BLOCK_V, True)
    count = (end - begin).to(tl.int32)
    for t in range(0, count, BLOCK):
        m = tl.minimum(count - t, BLOCK)  # tokens in this block
        live = (i < m)[:, None]
        qb = tl.load(qp, mask=live & in_k, other=0.0)  # [C, K]
        kb = tl.load(kp, mask=live & in_k, other=0.0)  # [C, K]
        vb = tl.load(vp, mask=live & in_v, other=0.0)  # [C, V]
        dob = tl.load(dop, mask=live & in_v, other=0.0)  # [C, V]
        read = R.to(qb.dtype)
        dvb = dot(kb, read) * carried  # [C, V]
        dvb = dot((dot(kb, tl.trans(qb)) * D).to(dob.dtype), dob, dvb)
        tl.store(dvp, dvb.to(vb.dtype), mask=live & in_v)
        dkb = dot(vb, tl.trans(read)) * carried  # [C, K]
        dkb = dot((dot(vb, tl.trans(dob)) * D).to(qb.dtype), qb, dkb)
        tl.store(dkp, dkb.to(kb.dtype), mask=live & in_k)
        R = carry_on(R, qb, dob, m, s, scale * tl.exp(-s))
        qp -= advance(q, BLOCK)
        kp -= advance(k, BLOCK)
        vp -= advance(v, BLOCK)
        dop -= advance(do, BLOCK)
        dkp -= advance(dk, BLOCK)
        dvp -= advance(dv, BLOCK)

    if dinitial is not None:
        keep = in_state & ends & (begin <= end)
        tl.store(state_tile(dinitial, n, head, row_k, column_v), R, mask=keep)


@triton.jit
def either(first, a, b):
    """One of two operands."""
    return (
        tl.where(first, a[0], b[0]), tl.where(first, a[1], b[1]),
        tl.where(first, a[2], b[2]), tl.where(first, a[3], b[3]),
    )  # fmt: skip


@triton.jit
def turned(straight, x):
    """A state, or its transpose."""
    return x[0], x[1], x[2], tl.where(straight, x[3], x[4]), tl.where(straight, x[4], x[3])


@triton.jit
def either_dim(first, a: tl.constexpr, b: tl.constexpr):
    """One of two head dims, with what is known of both: whether whole vectors are below it."""
    if a == b:
        return a
    else:
        unit: tl.constexpr = 16 if a % 16 == 0 and b % 16 == 0 else 8 if a % 8 == 0 and b % 8 == 0 else 1
        return tl.multiple_of(tl.where(first, a, b), unit)


@triton.jit(do_not_specialize=["programs", "tokens", "sequences", "segments", "length"])
def chunk_backward_split_kernel(
    q, k, v, do, dk, dv, decay, dstate, entering, dinitial, cu_seqlens,  # as above
    scale, programs, tokens, heads, sequences, segments, length,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,  # of the larger of K and V
    TILE: tl.constexpr,  # columns of dv, or of dk
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    tiles_k: tl.constexpr = (K + TILE - 1) // TILE
    tiles_v: tl.constexpr = (V + TILE - 1) // TILE
    tile, head, unit = tile_head_unit(index, tiles_k + tiles_v, heads)
    # Chosen by value, not by a branch: of two loops the compiler would keep the buffers of both.
    to_v = tile < tiles_v
    sweep(
        either(to_v, k, v), either(to_v, q, do), either(to_v, do, q), either(to_v, dv, dk),
        decay,
        turned(to_v, dstate) if dstate is not None else None,
        turned(to_v, entering) if entering is not None else None,
        dinitial, cu_seqlens, scale,
        unit, tl.where(to_v, tile, tile - tiles_v) * TILE, head, tokens, sequences, segments, length,
        either_dim(to_v, K, V), either_dim(to_v, V, K), to_v, BLOCK, BLOCK_K, TILE, True,
    )  # fmt: skip
