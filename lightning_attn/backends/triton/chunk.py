"""The block form of the recurrence, BLOCK tokens at a time, the state in registers (arXiv 2501.08313, section 2.2):

    O = scale ((Q K^T) o D) V + (Q o lambda^(i+1)) (scale S)     D_ij = lambda^(i-j) for i >= j, else 0
    S <- lambda^n S + K^T (V o lambda^(n-1-j))                   n tokens in the block, lambda = e^{-s}

A program takes one piece of a sequence for one head and BLOCK_V columns of V, so q, k and v are read once and o is written
once (1024 B a token and head at K = V = 128 in 16 bits; programs of the other columns, which run beside it, find q and
k in the L2 cache). The same sweep makes four outputs, as each gradient has the form of a forward pass:

    o   from (q, k, v) and the state S            forward in time
    dq  from (do, v, k) and S^T                   forward in time
    dk  from (v, do, q) and R^T                   backward in time, R being the gradient of the state
    dv  from (k, q, do) and R                     backward in time

Backward in time i and j count from the block's last token. The gradient that enters stands AT that token, and the one
that leaves at the token that the sweep meets next: both exponents shift by one (LAG), and the scale, which belongs to
what passes through o, moves from the state that is read to what is added to it.
"""

import triton
import triton.language as tl

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


@triton.jit
def sweep(
    q, k, v, o, decay, initial, entering, final, cu_seqlens, scale,
    unit, column, head, tokens, sequences, segments, length,
    K, V,
    keep,  # whether this program writes its part of `final`
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Piece `unit` of one head, columns of V from `column` on."""
    LAG: tl.constexpr = 1 if REVERSE else 0
    batch, n, segment, begin, end, starts, ends = locate_piece(
        cu_seqlens, unit, tokens, sequences, segments, length
    )
    if REVERSE:
        starts, ends = ends, starts
    row_k, column_v = tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_V)
    in_k, in_v = below(K, 0, BLOCK_K), below(V, column, BLOCK_V)
    in_state = (row_k < K)[:, None] & in_v
    slot = batch * segments + segment
    S = first_state(initial, entering, n, slot, head, row_k, column_v, in_state, starts)

    s = tl.load(decay + head)
    i = tl.arange(0, BLOCK)
    D = causal_decay(s, BLOCK) * scale
    carried = tl.exp(-s * (i + 1 - LAG))[:, None]
    at = end - 1 if REVERSE else begin
    step: tl.constexpr = -BLOCK if REVERSE else BLOCK
    qp = rows(q, batch, head, at, BLOCK, 0, BLOCK_K, REVERSE)
    kp = rows(k, batch, head, at, BLOCK, 0, BLOCK_K, REVERSE)
    vp = rows(v, batch, head, at, BLOCK, column, BLOCK_V, REVERSE)
    op = rows(o, batch, head, at, BLOCK, column, BLOCK_V, REVERSE)
    count = (end - begin).to(tl.int32)
    for t in range(0, count, BLOCK):
        m = tl.minimum(count - t, BLOCK)  # tokens in this block
        live = (i < m)[:, None]
        qb = tl.load(qp, mask=live & in_k, other=0.0)  # [C, K]
        kb = tl.load(kp, mask=live & in_k, other=0.0)  # [C, K]
        vb = tl.load(vp, mask=live & in_v, other=0.0)  # [C, V]
        read = S if REVERSE else S * scale
        ob = dot(qb, read.to(qb.dtype)) * carried  # [C, V]
        p = dot(qb, tl.trans(kb)) * D  # [C, C]
        ob = dot(p.to(vb.dtype), vb, ob)
        tl.store(op, ob.to(vb.dtype), mask=live & in_v)
        S = carry_on(S, kb, vb, m, s, scale * tl.exp(-s) if REVERSE else None)
        qp += advance(q, step)
        kp += advance(k, step)
        vp += advance(v, step)
        op += advance(o, step)

    if final is not None:
        kept = in_state & ends & (begin <= end) & keep
        tl.store(state_tile(final, n, head, row_k, column_v), S, mask=kept)


@triton.jit(do_not_specialize=["programs", "tokens", "sequences", "segments", "length"])
def chunk_kernel(
    q, k, v, o,  # operands [B, T, H, K], [B, T, H, K], [B, T, H, V], [B, T, H, V]
    decay,  # [H] float32
    initial,  # state [N, H, K, V] before the sweep's first token of each sequence, or None
    entering,  # state [B * segments, H, K, V] that enters each segment, or None if there is but one
    final,  # state [N, H, K, V] after the sweep's last token of each sequence, written, or None
    cu_seqlens,  # [N + 1] int32 or int64, or None
    scale, programs, tokens, heads, sequences, segments, length,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    tile, head, unit = tile_head_unit(index, tl.cdiv(V, BLOCK_V), heads)
    column = tile * BLOCK_V
    sweep(
        q, k, v, o, decay, initial, entering, final, cu_seqlens, scale,
        unit, column, head, tokens, sequences, segments, length,
        K, V, True, BLOCK, BLOCK_K, BLOCK_V, REVERSE,
    )  # fmt: skip
