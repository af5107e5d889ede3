"""Rows that move between the tokens and the sorted pairs, and the sums over a token's pairs, always in the same order.

gather:       xs_r = x_{order_r / k}                              for each sorted pair r
gather_sum:   y_t = sum_j weights_tj z_{position_tj}              for each token t
dweights:     dweights_p = sum over parts of partial_{part, position_p}
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import moe_config
from .config import Arch
from .launch import Launch
from .primitives import program_index


@triton.jit
def token_of(order, row, ends, TOP_K: tl.constexpr):
    """The tokens, 64-bit, of sorted pairs `row`; 0 from `ends` on, where no pair is."""
    return tl.load(order + row, mask=row < ends, other=0).to(tl.int64) // TOP_K


@triton.jit(do_not_specialize=["programs", "pairs"])
def moe_gather_kernel(
    x, row_stride,  # [T, D]
    order, offs,  # [pairs], [E] int32
    xs,  # [pairs, D], written up to the end of the last group
    programs, pairs,
    D: tl.constexpr, TOP_K: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    strips: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row = (index // strips) * ROWS + tl.arange(0, ROWS)
    column = ((index % strips) * BLOCK_D).to(tl.int32) + tl.arange(0, BLOCK_D)
    end = tl.minimum(tl.load(offs + E - 1), pairs)
    mask = (row < end)[:, None] & (column < D)[None, :]
    token = token_of(order, row, end, TOP_K)
    rows = tl.load(x + token[:, None] * row_stride + column[None, :], mask=mask)
    tl.store(xs + row.to(tl.int64)[:, None] * D + column[None, :], rows, mask=mask)


@triton.jit(do_not_specialize=["programs", "tokens"])
def moe_gather_sum_kernel(
    z,  # [pairs, D]
    position,  # [T, k] int32, -1 for a pair that has no row
    weights,  # [T, k] float32, or None for ones
    y,  # [T, D], written
    programs, tokens,
    D: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    strips: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    t = (index // strips) * ROWS + tl.arange(0, ROWS)
    column = ((index % strips) * BLOCK_D).to(tl.int32) + tl.arange(0, BLOCK_D)
    pair = t.to(tl.int64) * TOP_K
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for j in range(TOP_K):
        row = tl.load(position + pair + j, mask=t < tokens, other=-1).to(tl.int64)
        real = row >= 0
        mask = real[:, None] & (column < D)[None, :]
        term = tl.load(z + row[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if weights is not None:
            term *= tl.load(weights + pair + j, mask=real, other=0.0)[:, None]
        total += term
    at = y + t.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & (column < D)[None, :])


def gather(x: Tensor, order: Tensor, offs: Tensor, xs: Tensor, top_k: int, arch: Arch) -> Launch:
    pairs, D = xs.shape
    tiles = moe_config.rows(D, arch)
    programs = -(-pairs // tiles.block) * -(-D // tiles.value)
    return Launch(
        moe_gather_kernel,
        programs,
        {
            "x": x,
            "row_stride": x.stride(0),
            "order": order,
            "offs": offs,
            "xs": xs,
            "programs": programs,
            "pairs": pairs,
        },
        {"D": D, "TOP_K": top_k, "E": offs.shape[0], "ROWS": tiles.block, "BLOCK_D": tiles.value},
        tiles,
        bytes=xs.nbytes // top_k + xs.nbytes + order.nbytes,
        again=xs.nbytes - xs.nbytes // top_k,
    )


def gather_sum(z: Tensor, position: Tensor, weights: Tensor | None, y: Tensor, arch: Arch) -> Launch:
    (T, k), D = position.shape, z.shape[1]
    tiles = moe_config.rows(D, arch)
    programs = -(-T // tiles.block) * -(-D // tiles.value)
    return Launch(
        moe_gather_sum_kernel,
        programs,
        {
            "z": z,
            "position": position,
            "weights": weights,
            "y": y,
            "programs": programs,
            "tokens": T,
        },
        {"D": D, "TOP_K": k, "ROWS": tiles.block, "BLOCK_D": tiles.value},
        tiles,
        bytes=z.nbytes + y.nbytes + position.nbytes + (0 if weights is None else weights.nbytes),
        flops=2 * z.numel(),
    )
