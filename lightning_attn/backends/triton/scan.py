"""The states that enter the segments of a split sequence, from the states E that its segments leave, started from zero:

    S_0 = none;  S_{g+1} = lambda^{L_g} S_g + E_g    if a document that entered segment g goes on through all of it
                 S_{g+1} = E_g                        otherwise (E_g holds the initial state of a document that starts there)

In place: slot g + 1 holds E_g before and S_{g+1} after (backward in time, slot g - 1).
"""

import triton
import triton.language as tl

from .primitives import decay_parts, ended, program_index, segment_span, tile_head_unit


@triton.jit
def passes_through(cu_seqlens, sequences, begin, end):
    """Whether one document holds a segment and the tokens around it: none ends from `begin` to `end`."""
    return ended(cu_seqlens, sequences, begin - 1) == ended(cu_seqlens, sequences, end)


@triton.jit(do_not_specialize=["programs", "tokens", "sequences", "segments", "length"])
def scan_kernel(
    entering,  # [chains, segments, H, K * V] float32, contiguous
    decay,  # [H] float32
    cu_seqlens,  # [N + 1] int32 or int64, or None
    programs, tokens, heads, sequences, segments, length,
    SIZE: tl.constexpr,  # K * V
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    tile, head, chain = tile_head_unit(index, tl.cdiv(SIZE, BLOCK), heads)
    x = tile * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(decay + head)
    stride = tl.cast(heads, tl.int64) * SIZE
    first = segments - 1 if REVERSE else 0
    at = entering + (chain * segments + first) * stride + head.to(tl.int64) * SIZE + x
    S = tl.zeros([BLOCK], tl.float32)
    for step in range(1, segments):
        left = segments - step if REVERSE else step - 1  # the segment whose end state this is
        begin, end = segment_span(tl.cast(left, tl.int64), length, tl.cast(tokens, tl.int64))
        through = step > 1
        if cu_seqlens is not None:
            through &= passes_through(cu_seqlens, sequences, begin, end)
        at += -stride if REVERSE else stride
        E = tl.load(at, mask=x < SIZE, other=0.0)
        kept, loss = decay_parts(s * (end - begin))
        S = tl.where(through, S * kept + S * loss, 0.0) + E
        tl.store(at, S, mask=x < SIZE)
