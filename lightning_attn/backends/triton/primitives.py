"""What the kernels share: where a program works, the powers of lambda, and the products of tiles.

An operand [B, T, H, D] comes as a tuple (pointer, batch stride, token stride, head stride); its last dimension is
contiguous. A state comes as (pointer, row stride, head stride, key stride, value stride). Strides are in elements and
may be 32-bit: what multiplies them is 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def program_index():
    """The number of this program in a grid that `launch.grid` may have folded in two dimensions."""
    return tl.program_id(0).to(tl.int64) + tl.program_id(1).to(tl.int64) * tl.num_programs(0)


@triton.jit
def tile_head_unit(index, tiles: tl.constexpr, heads):
    """What program `index` is for: a tile of columns, a head, and a piece or batch row, all 32-bit. Tiles are next to each
    other, as they read the same rows.
    """
    rest = index // tiles
    return (index % tiles).to(tl.int32), (rest % heads).to(tl.int32), (rest // heads).to(tl.int32)


@triton.jit
def decay_parts(x):
    """e^{-x} for x >= 0 as kept + loss, of which one is exact and the other right to its own last bits.

    What is carried on is S kept + S loss. The float32 nearest to a slow e^{-s n} would not do: what it is off by is the
    same at every block, and over a million tokens adds up to 1e-3. Nor would 1 + loss for a fast one, as a large state
    would leave behind what the loss is off by.
    """
    series = 1.0 - x * (1 / 8)
    series = 1.0 - x * (1 / 7) * series
    series = 1.0 - x * (1 / 6) * series
    series = 1.0 - x * (1 / 5) * series
    series = 1.0 - x * (1 / 4) * series
    series = 1.0 - x * (1 / 3) * series
    series = 1.0 - x * (1 / 2) * series
    slow = x < 0.25
    return tl.where(slow, 1.0, tl.exp(-x)), tl.where(slow, -x * series, 0.0)


@triton.jit
def causal_decay(s, C: tl.constexpr):
    """D [C, C]: lambda^(i-j) for i >= j, else 0. No exponent is positive, so nothing overflows."""
    i = tl.arange(0, C)
    distance = i[:, None] - i[None, :]
    return tl.where(distance >= 0, tl.exp(-s * tl.maximum(distance, 0)), 0.0)


@triton.jit
def dot(a, b, acc=None):
    """acc + a b in float32: float32 operands are multiplied as such, never as TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def state_tile(x, row, head, i, j):
    """Pointers to the elements [i, j] of one state; i [BLOCK_K] and j [BLOCK_V] are indices."""
    base = x[0] + row.to(tl.int64) * x[1] + head.to(tl.int64) * x[2]
    return base + i.to(tl.int64)[:, None] * x[3] + j.to(tl.int64)[None, :] * x[4]


@triton.jit
def carry_on(S, k, v, n, s, factor):
    """The state after a block of n tokens, k [C, K] and v [C, V], whose rows past n are zero:

    lambda^n S + factor K^T (V o lambda^(n-1-j)); a factor of None is 1. Backward in time it is scale lambda.
    """
    j = tl.arange(0, k.shape[0])
    added = tl.exp(-s * tl.maximum(n - 1 - j, 0))
    # The product is summed apart, not onto the state: tensor cores cut off what they add at the magnitude of their
    # accumulator, always downwards. Besides, Triton up to 3.7 miscompiles for Blackwell an accumulator that the loop also
    # scales and reads (triton-lang/triton#10993). An fma, as the compiler would merge a sum into the accumulator again.
    # The factor comes after it: float16 would underflow.
    product = dot(tl.trans(k), (v * added[:, None]).to(v.dtype))
    if factor is not None:
        product *= factor
    kept, loss = decay_parts(s * n)
    return tl.fma(S, tl.zeros_like(S) + kept, tl.fma(S, tl.zeros_like(S) + loss, product))


@triton.jit
def first_state(initial, entering, n, slot, head, i, j, mask, starts):
    """The state before a piece: that of sequence n if it `starts` there, else the one that enters segment `slot`; each
    may be None, and is zero then.
    """
    S = tl.zeros(mask.shape, tl.float32)
    if initial is not None:
        S += tl.load(state_tile(initial, n, head, i, j), mask=mask & starts, other=0.0)
    if entering is not None:
        S += tl.load(state_tile(entering, slot, head, i, j), mask=mask & (not starts), other=0.0)
    return S


@triton.jit
def rows(x, batch, head, at, C: tl.constexpr, column, width: tl.constexpr, REVERSE: tl.constexpr):
    """Pointers [C, width] to the rows of C tokens of an operand from token `at` on, columns from `column` on."""
    i = tl.arange(0, C).to(tl.int64)
    token = at - i if REVERSE else at + i
    base = x[0] + batch.to(tl.int64) * x[1] + head.to(tl.int64) * x[3]
    return base + token[:, None] * x[2] + (column + tl.arange(0, width))[None, :]


@triton.jit
def advance(x, tokens: tl.constexpr):
    """How far it is from a token of an operand to the one so many later."""
    return tl.cast(x[2], tl.int64) * tokens


@triton.jit
def below(dim, column, width: tl.constexpr):
    """Which of `width` columns from `column` on exist, [1, width]."""
    return (column + tl.arange(0, width) < dim)[None, :]


# ---- documents and segments --------------------------------------------------------------------------------------
#
# The tokens of a chain (a sequence, or all packed ones) are cut into segments of one length, wherever documents end. A
# piece is what a document and a segment have in common. In the order of the tokens one comes from a piece to the next
# past the end of a document, of a segment, or past one and then the other, so piece p lies in document n and segment p - n:
# there are at most N + segments - 1 of them, known without a look at the offsets.


@triton.jit
def ended(cu_seqlens, sequences, token):
    """How many documents end at `token` or before. All offsets are read, in one or few wide loads."""
    count = tl.zeros([1024], tl.int32)
    i = tl.arange(0, 1024)
    for m in range(0, sequences, 1024):
        end = tl.load(cu_seqlens + 1 + m + i, mask=m + i < sequences, other=0)
        count += ((end <= token) & (m + i < sequences)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def document_of_piece(cu_seqlens, sequences, piece, length):
    """The document that a piece lies in: how many documents end before the piece in the order above."""
    count = tl.zeros([1024], tl.int32)
    i = tl.arange(0, 1024)
    for m in range(0, sequences, 1024):
        end = tl.load(cu_seqlens + 1 + m + i, mask=m + i < sequences, other=0).to(tl.int64)
        segments_before = (tl.maximum(end, 1) - 1) // length
        count += ((m + i + segments_before < piece) & (m + i < sequences)).to(tl.int32)
    return tl.minimum(tl.sum(count, 0), sequences - 1)


@triton.jit
def document_span(cu_seqlens, n, tokens):
    """The tokens [begin, end) of document n, 64-bit; whatever the offsets are, within [0, tokens)."""
    begin, end = tl.load(cu_seqlens + n).to(tl.int64), tl.load(cu_seqlens + n + 1).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), tokens)
    return begin, tl.minimum(tl.maximum(end, begin), tokens)


@triton.jit
def segment_span(segment, length, tokens):
    """The tokens [begin, end) of a segment, 64-bit."""
    begin = segment.to(tl.int64) * length
    return begin, tl.minimum(begin + length, tokens)


@triton.jit
def locate_piece(cu_seqlens, unit, tokens, sequences, segments, length):
    """Piece `unit` of all: its batch row, document, segment and tokens [begin, end), and whether the document starts
    and ends in it. Where the ends of a document and of a segment coincide there is a unit too many, with no document
    of its own: its `begin` is after its `end`.
    """
    tokens = tl.cast(tokens, tl.int64)
    if cu_seqlens is None:
        batch, segment = unit // segments, unit % segments
        begin, end = segment_span(segment, length, tokens)
        return batch, batch, segment, begin, end, begin == 0, end == tokens
    else:
        n = document_of_piece(cu_seqlens, sequences, unit, length)
        # Of offsets that fall, too, there must be such a segment.
        segment = tl.minimum(tl.maximum(unit - n, 0), segments - 1)
        begin, end = segment_span(segment, length, tokens)
        first, stop = document_span(cu_seqlens, n, tokens)
        extra = (first >= end) & (stop > end)
        starts, ends = first >= begin, stop <= end
        begin, end = tl.maximum(begin, first), tl.minimum(end, stop)
        return tl.zeros_like(n), n, segment, tl.where(extra, end + 1, begin), end, starts, ends


@triton.jit
def locate_crossing(cu_seqlens, unit, tokens, sequences, segments, length, REVERSE: tl.constexpr):
    """The piece that carries a state from segment `unit` to the next one of the sweep, as `locate_piece`, with whether
    the document starts (backward in time: ends) in it, and whether it goes on beyond at all.
    """
    tokens = tl.cast(tokens, tl.int64)
    per_chain = segments - 1  # nobody reads the state of a chain's last segment
    batch, segment = unit // per_chain, unit % per_chain + (1 if REVERSE else 0)
    begin, end = segment_span(segment, length, tokens)
    if cu_seqlens is None:
        return batch, batch, segment, begin, end, (end == tokens) if REVERSE else (begin == 0), begin < end
    else:
        border = begin if REVERSE else end
        n = tl.minimum(ended(cu_seqlens, sequences, border), sequences - 1)
        first, stop = document_span(cu_seqlens, n, tokens)
        crosses = (first < border) & (stop > border)
        starts = (stop <= end) if REVERSE else (first >= begin)
        return tl.zeros_like(n), n, segment, tl.maximum(begin, first), tl.minimum(end, stop), starts, crosses
