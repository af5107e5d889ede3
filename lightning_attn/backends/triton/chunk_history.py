"""What a state adds to the outputs of a sweep that began without it, or its gradient to those of one that ended without, in place:

    out_t += scale lambda^(t+1) S^T x_t          backward in time: out_t += scale lambda^(T-1-t) S^T x_t

A program takes a span of tokens of one head and BLOCK_V columns of V: x is read once, out is read and written once. Spans where the
power of lambda is zero are left alone.
"""

import triton
import triton.language as tl

from .primitives import advance, below, dot, program_index, rows, state_tile, tile_head_unit

FARTHEST = tl.constexpr(103.98)  # -log of half of the smallest float32


@triton.jit(do_not_specialize=["programs", "tokens", "spans", "length"])
def chunk_history_kernel(
    x, out,  # operands [B, T, H, K], [B, T, H, V]
    state,  # state [B, H, K, V]
    decay,  # [H] float32
    scale, programs, tokens, heads, spans, length,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    tile, head, unit = tile_head_unit(index, tl.cdiv(V, BLOCK_V), heads)
    column = tile * BLOCK_V
    batch, span = unit // spans, unit % spans
    first = span.to(tl.int64) * length  # tokens, from the state on
    s = tl.load(decay + head)
    if s * first.to(tl.float32) > FARTHEST:
        return
    row_k, column_v = tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_V)
    in_k, in_v = below(K, 0, BLOCK_K), below(V, column, BLOCK_V)
    S = tl.load(state_tile(state, batch, head, row_k, column_v), mask=(row_k < K)[:, None] & in_v, other=0.0)
    S = S.to(x[0].dtype.element_ty)

    i = tl.arange(0, BLOCK)
    at = tl.cast(tokens, tl.int64) - 1 - first if REVERSE else first
    step: tl.constexpr = -BLOCK if REVERSE else BLOCK
    xp = rows(x, batch, head, at, BLOCK, 0, BLOCK_K, REVERSE)
    op = rows(out, batch, head, at, BLOCK, column, BLOCK_V, REVERSE)
    distance = first + i + (0 if REVERSE else 1)
    count = tl.minimum(tokens - first, length).to(tl.int32)
    for t in range(0, count, BLOCK):
        live = (i < count - t)[:, None]
        xb = tl.load(xp, mask=live & in_k, other=0.0)  # [C, K]
        before = tl.load(op, mask=live & in_v, other=0.0)  # [C, V]
        weight = tl.exp(-s * (distance + t).to(tl.float32)) * scale
        after = before.to(tl.float32) + dot(xb, S) * weight[:, None]
        tl.store(op, after.to(before.dtype), mask=live & in_v)
        xp += advance(x, step)
        op += advance(out, step)
