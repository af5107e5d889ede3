"""Each group's rows times the matrix of its group, y_r = scale_e * (w_e x_r), and the gradient of the matrices,
dw_e = sum of dy_r x_r^T over the rows of group e.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import Expert
from . import moe_config
from .config import Arch
from .groups import fits, group_tiles, locate_tile, product, scaled
from .launch import Launch
from .moe_rows import token_of
from .operands import Rows, group_constants, programs_of, row_tiles, weight
from .primitives import dot, program_index


@triton.jit(do_not_specialize=["programs", "rows"])
def grouped_gemm_kernel(
    x, x_tiles, order,  # [M, K]: see `groups.product`
    w, w_tiles,  # [E, N, K]
    scale,  # [E, N] float32, or None
    offs,  # [E] int32
    y,  # [M, N], written
    programs, rows,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, ALONG_K: tl.constexpr,
    BLOCK: tl.constexpr, HALVINGS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    column_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    groups = group_tiles(offs, rows, column_tiles, E, BLOCK_E, BLOCK)
    for tile in range(program_index(), tl.max(groups[2], 0), programs):
        e, row, left, column_tile = locate_tile(groups, tile, column_tiles, BLOCK, TOGETHER)
        n = column_tile * BLOCK_N
        for half in tl.static_range(HALVINGS):
            if fits(left, BLOCK >> half, half, HALVINGS):
                acc, _ = product(
                    x, x_tiles, order, w, w_tiles, None, None, e, row, left, n,
                    E, N, K, TOP_K, ALONG_K, BLOCK >> half, BLOCK_N, BLOCK_K, half == 0,
                )  # fmt: skip
                acc = scaled(acc, scale, e, n, E, N, 1, 0, N)
                i, column = tl.arange(0, BLOCK >> half), n + tl.arange(0, BLOCK_N)
                at = y + (row + i).to(tl.int64)[:, None] * N + column[None, :]
                tl.store(at, acc.to(y.dtype.element_ty), mask=(i < left)[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["programs", "rows"])
def weight_gradient_kernel(
    dy, dy_order, x, x_order,  # [., N] and [., K] as (pointer, row stride), and the pairs whose tokens are their rows, or None
    offs,  # [E] int32
    dw,  # [E, N, K], written
    programs, rows,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    n_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    k_tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    e = (index // (n_tiles * k_tiles)).to(tl.int32)
    local = (index % (n_tiles * k_tiles)).to(tl.int32)
    band = local // (TOGETHER * k_tiles)  # of tiles of rows, as in `locate_tile`
    height = tl.minimum(n_tiles - band * TOGETHER, TOGETHER)
    within = local - band * (TOGETHER * k_tiles)
    row = (band * TOGETHER + within % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = (within // height) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = tl.load(offs + e - 1, mask=e > 0, other=0)
    end = tl.minimum(tl.load(offs + e), rows)
    begin = tl.minimum(tl.maximum(begin, 0), rows)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(begin, end, BLOCK):
        r = first + tl.arange(0, BLOCK)
        live = (r < end)[:, None]
        a = tl.load(
            _row_pointers(dy, dy_order, r, end, TOP_K) + row[None, :],
            mask=live & (row < N)[None, :],
            other=0.0,
        )
        b = tl.load(
            _row_pointers(x, x_order, r, end, TOP_K) + column[None, :],
            mask=live & (column < K)[None, :],
            other=0.0,
        )
        acc = dot(tl.trans(a), b, acc)
    at = dw + e.to(tl.int64) * N * K + row.to(tl.int64)[:, None] * K + column[None, :]
    tl.store(at, acc.to(dw.dtype.element_ty), mask=(row < N)[:, None] & (column < K)[None, :])


@triton.jit
def _row_pointers(x, order, r, end, TOP_K: tl.constexpr):
    token = r.to(tl.int64) if order is None else token_of(order, r, end, TOP_K)
    return x[0] + token[:, None] * x[1]


def gemm(x: Rows, w: Expert, offs: Tensor, y: Tensor, arch: Arch) -> Launch:
    """y [M, N] from rows [M, K] and matrices [E, N, K]."""
    E, N, K = w.weight.shape
    M = y.shape[0]
    how = moe_config.product(M, E, y.dtype, w.weight.dtype, 1, arch)
    tiles = how.tiles
    programs = programs_of(how, M, E, N)
    matrix, matrix_tiles = weight(w.weight, how)
    return Launch(
        grouped_gemm_kernel,
        programs,
        {
            "x": x.pointer,
            "x_tiles": row_tiles(x, how),
            "order": x.order,
            "w": matrix,
            "w_tiles": matrix_tiles,
            "scale": w.scale,
            "offs": offs,
            "y": y,
            "programs": programs,
            "rows": M,
        },
        {"E": E, "N": N, "K": K, "TOP_K": x.top_k, **group_constants(how, E, matrix)},
        tiles,
        bytes=M * K * y.element_size() + y.nbytes + min(E, M) * N * K * w.weight.element_size(),
        flops=2 * M * N * K,
    )


def weight_gradient(dy: Rows, x: Rows, offs: Tensor, dw: Tensor, M: int, arch: Arch) -> Launch:
    """dw [E, N, K] from the M rows of dy [., N] and x [., K]."""
    E, N, K = dw.shape
    tiles = moe_config.weight_gradient(dw.dtype, arch)
    programs = E * -(-N // tiles.block) * -(-K // tiles.value)
    return Launch(
        weight_gradient_kernel,
        programs,
        {
            "dy": dy.pointer,
            "dy_order": dy.order,
            "x": x.pointer,
            "x_order": x.order,
            "offs": offs,
            "dw": dw,
            "programs": programs,
            "rows": M,
        },
        {
            "E": E,
            "N": N,
            "K": K,
            "TOP_K": max(dy.top_k, x.top_k),
            "BLOCK_N": tiles.block,
            "BLOCK_K": tiles.value,
            "BLOCK": tiles.key,
            "TOGETHER": moe_config.TOGETHER,
        },
        tiles,
        bytes=M * (N + K) * dw.element_size() + dw.nbytes,
        flops=2 * M * N * K,
    )
