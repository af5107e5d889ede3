"""What kernels over groups of rows share: which tile a program takes, and the product of a group's rows and its matrix.

Group e has rows [offs_{e-1}, offs_e) of x; what follows the last one is no group's and comes out zero. Rows and columns of the
output are cut in tiles within each group, and the tiles of all groups are numbered one after the other, on the device.
Offsets are bounded here: whatever they are, no row outside of x is read or written.
"""

import triton
import triton.language as tl

from .moe_rows import token_of
from .primitives import dot


@triton.jit
def group_tiles(offs, rows, column_tiles, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    """Of each group, and of the rows after the last as group E: the first row, how many there are, and how many tiles there
    are up to its end; [BLOCK_E] each.
    """
    e = tl.arange(0, BLOCK_E)
    end = tl.load(offs + e, mask=e < E, other=rows)
    begin = tl.load(offs + e - 1, mask=(e > 0) & (e <= E), other=0)
    end = tl.minimum(tl.maximum(end, 0), rows)
    begin = tl.minimum(tl.maximum(begin, 0), rows)
    count = tl.where(e <= E, tl.maximum(end - begin, 0), 0)
    return begin, count, tl.cumsum(tl.cdiv(count, BLOCK).to(tl.int64) * column_tiles, 0)


@triton.jit
def locate_tile(groups, tile, column_tiles, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """Tile number `tile`: its group, its first row and how many its group has from there on, and its tile of columns.

    In a group up to TOGETHER tiles of rows come one after the other for the same columns, whose part of the weight then is
    in the L2 cache.
    """
    begin, count, ends = groups
    e = tl.arange(0, ends.shape[0])
    group = tl.sum((ends <= tile).to(tl.int32), 0)
    first = tl.max(tl.where(e < group, ends, 0), 0)
    begin = tl.sum(tl.where(e == group, begin, 0), 0)
    count = tl.sum(tl.where(e == group, count, 0), 0)
    local = (tile - first).to(tl.int32)
    band = local // (TOGETHER * column_tiles)
    height = tl.minimum(tl.cdiv(count, BLOCK) - band * TOGETHER, TOGETHER)
    within = local - band * (TOGETHER * column_tiles)
    skipped = (band * TOGETHER + within % height) * BLOCK
    return group, begin + skipped, count - skipped, within // height


@triton.jit
def _rows_tile(x, x_tiles, token, live, row, k, K: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr):
    """[ROWS, BLOCK_K] of x. By descriptor, which whole tiles may have, it ends in rows of the next group."""
    if WHOLE and x_tiles is not None:
        return x_tiles.load([row, k])
    else:
        column = k + tl.arange(0, BLOCK_K)
        at = x[0] + token[:, None] * x[1] + column[None, :]
        return tl.load(at, mask=live[:, None] & (column < K)[None, :], other=0.0)


@triton.jit
def _weight_tile(
    w, w_tiles, e, n, k,
    N: tl.constexpr, K: tl.constexpr, ALONG_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] of matrix e, zero where it ends. It is contiguous ALONG_K, or else along N: then a descriptor is of
    its transpose.
    """
    if w_tiles is not None:
        if ALONG_K:
            return w_tiles.load([e, n, k]).reshape(BLOCK_N, BLOCK_K)
        else:
            return tl.trans(w_tiles.load([e, k, n]).reshape(BLOCK_K, BLOCK_N))
    else:
        i, j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        corner = w[0] + e.to(tl.int64) * w[1] + tl.cast(n, tl.int64) * w[2] + tl.cast(k, tl.int64) * w[3]
        at = corner + (
            i[:, None] * w[2] + j[None, :] * w[3]
        )  # within a tile 32 bits suffice: `operands.weight`
        return tl.load(at, mask=(n + i < N)[:, None] & (k + j < K)[None, :], other=0)


@triton.jit
def product(
    x, x_tiles, order,  # [., K] as (pointer, row stride), or by descriptor; the pairs whose tokens are its rows, or None
    w, w_tiles, other, other_tiles,  # [E, N, K] as (pointer, strides), or by descriptor; another such weight, or None
    e, row, left, n,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, ALONG_K: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """x_r w_e^T for ROWS rows of group e from `row` on and columns from n on, [ROWS, BLOCK_N] float32, and with `other` the
    same of it. Zero for group E.

    Few rows are multiplied without matrix instructions, up to 64 with the weight as the first operand: of that, matrix
    instructions take 64 rows or more, of the second as few as 8 columns. So is an int8 weight, which is converted in
    registers, as on Hopper only the first operand may be there.
    """
    FEW: tl.constexpr = ROWS < 16
    SWAP: tl.constexpr = ROWS <= 64 or w[0].dtype.element_ty == tl.int8
    i = tl.arange(0, ROWS)
    live = i < left
    token = (row + i).to(tl.int64) if order is None else token_of(order, row + i, row + left, TOP_K)
    if FEW:
        acc = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    elif SWAP:
        acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    second = acc
    for k in range(0, tl.where(e < E, K, 0), BLOCK_K):
        a = _rows_tile(x, x_tiles, token, live, row, k, K, BLOCK_K, WHOLE)
        b = _weight_tile(w, w_tiles, e, n, k, N, K, ALONG_K, BLOCK_N, BLOCK_K)
        acc = _add(acc, a, b, FEW, SWAP)
        if other is not None:
            b = _weight_tile(other, other_tiles, e, n, k, N, K, ALONG_K, BLOCK_N, BLOCK_K)
            second = _add(second, a, b, FEW, SWAP)
    if FEW:
        return tl.sum(acc, 2), tl.sum(second, 2)
    elif SWAP:
        return tl.trans(acc), tl.trans(second)
    else:
        return acc, second


@triton.jit
def _add(acc, a, b, FEW: tl.constexpr, SWAP: tl.constexpr):
    if FEW:
        return acc + a.to(tl.float32)[:, None, :] * b.to(tl.float32)[None, :, :]
    elif SWAP:
        return dot(b.to(a.dtype), tl.trans(a), acc)
    else:
        return dot(a, tl.trans(b.to(a.dtype)), acc)


@triton.jit
def scaled(
    acc,
    scale,
    e,
    n,
    E: tl.constexpr,
    stride: tl.constexpr,
    step: tl.constexpr,
    offset: tl.constexpr,
    N: tl.constexpr,
):
    """acc [ROWS, BLOCK_N] times the factors of its columns, those of rows `offset + step n` of [E, stride]; None: of one."""
    if scale is None:
        return acc
    else:
        column = n + tl.arange(0, acc.shape[1])
        at = scale + tl.minimum(e, E - 1).to(tl.int64) * stride + offset + step * column
        return acc * tl.load(at, mask=column < N, other=0.0)[None, :]


@triton.jit
def fits(left, ROWS: tl.constexpr, half: tl.constexpr, HALVINGS: tl.constexpr):
    """Whether a tile of ROWS rows, as many as a whole one halved `half` times, is the one of fewest that holds what is left;
    a whole one holds what it can.
    """
    enough = (half == 0) | (left <= ROWS)
    return enough & ((half == HALVINGS - 1) | (left > ROWS // 2))
