"""The first pass over a split sequence: the state that each segment leaves to the next one of the sweep.

Only the document that goes on beyond the segment counts, from its initial state if it starts there, else from zero; what
enters the segment is for `scan`. k and v are read once: 512 B a token and head at K = V = 128 in 16 bits.
"""

import triton
import triton.language as tl

from .primitives import (
    advance,
    below,
    carry_on,
    first_state,
    locate_crossing,
    program_index,
    rows,
    state_tile,
    tile_head_unit,
)


@triton.jit(do_not_specialize=["programs", "tokens", "sequences", "segments", "length"])
def chunk_state_kernel(
    k, v,  # operands [B, T, H, K], [B, T, H, V]
    decay,  # [H] float32
    initial,  # state [N, H, K, V] before the sweep's first token of each sequence, or None
    entering,  # state [B * segments, H, K, V]; what a segment leaves is written where the next one will look for it
    cu_seqlens,  # [N + 1] int32 or int64, or None
    scale,  # of the products, or None
    programs, tokens, heads, sequences, segments, length,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, REVERSE: tl.constexpr,
    LAG: tl.constexpr,  # 1: what is added is decayed once more, see `carry_on`
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    tile, head, unit = tile_head_unit(index, tl.cdiv(V, BLOCK_V), heads)
    column = tile * BLOCK_V
    batch, n, segment, begin, end, starts, crosses = locate_crossing(
        cu_seqlens, unit, tokens, sequences, segments, length, REVERSE
    )
    if not crosses:
        return
    row_k, column_v = tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_V)
    in_k, in_v = below(K, 0, BLOCK_K), below(V, column, BLOCK_V)
    in_state = (row_k < K)[:, None] & in_v
    S = first_state(initial, None, n, 0, head, row_k, column_v, in_state, starts)

    s = tl.load(decay + head)
    i = tl.arange(0, BLOCK)
    at = end - 1 if REVERSE else begin
    step: tl.constexpr = -BLOCK if REVERSE else BLOCK
    kp = rows(k, batch, head, at, BLOCK, 0, BLOCK_K, REVERSE)
    vp = rows(v, batch, head, at, BLOCK, column, BLOCK_V, REVERSE)
    count = (end - begin).to(tl.int32)
    for t in range(0, count, BLOCK):
        m = tl.minimum(count - t, BLOCK)  # tokens in this block
        live = (i < m)[:, None]
        kb = tl.load(kp, mask=live & in_k, other=0.0)  # [C, K]
        vb = tl.load(vp, mask=live & in_v, other=0.0)  # [C, V]
        S = carry_on(S, kb, vb, m, s, scale * tl.exp(-s) if LAG else scale)
        kp += advance(k, step)
        vp += advance(v, step)

    reader = batch * segments + segment + (-1 if REVERSE else 1)
    tl.store(state_tile(entering, reader, head, row_k, column_v), S, mask=in_state)
