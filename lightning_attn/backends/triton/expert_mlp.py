"""The two products of an expert's MLP that have the activation in them:

    g, u = gate_e x, up_e x        a = silu(g) u                                          expert_up
    da = down_e^T dy               s = silu(g), with the router's weight w of the pair:
    dweight = <da, s u>            wa = w s u        dg = w da u s'        du = w da s     expert_down_backward

a, wa and what the backward needs of g and u are rounded to the inputs' dtype, sums are in float32.
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
from .operands import Rows, group_constants, programs_of, row_tiles, weight
from .primitives import program_index


@triton.jit(do_not_specialize=["programs", "rows"])
def expert_up_kernel(
    x, x_tiles, order,  # [M, D]: see `groups.product`
    gate, gate_tiles, up, up_tiles,  # [E, F, D] each
    scale,  # [E, 2F] float32, or None
    offs,  # [E] int32
    a,  # [M, F], written
    h,  # [M, 2F], written, or None: g and u in the columns STEP f and OFFSET + STEP f, as the rows of gate_up
    programs, rows,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    STEP: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK: tl.constexpr, HALVINGS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    column_tiles: tl.constexpr = tl.cdiv(N, BLOCK_N)
    groups = group_tiles(offs, rows, column_tiles, E, BLOCK_E, BLOCK)
    for tile in range(program_index(), tl.max(groups[2], 0), programs):
        e, row, left, column_tile = locate_tile(groups, tile, column_tiles, BLOCK, TOGETHER)
        n = column_tile * BLOCK_N
        for half in tl.static_range(HALVINGS):
            if fits(left, BLOCK >> half, half, HALVINGS):
                g, u = product(
                    x, x_tiles, order, gate, gate_tiles, up, up_tiles, e, row, left, n,
                    E, N, K, TOP_K, BLOCK >> half, BLOCK_N, BLOCK_K, half == 0,
                )  # fmt: skip
                g = scaled(g, scale, e, n, E, 2 * N, STEP, 0, N)
                u = scaled(u, scale, e, n, E, 2 * N, STEP, OFFSET, N)
                i, column = tl.arange(0, BLOCK >> half), n + tl.arange(0, BLOCK_N)
                r = (row + i).to(tl.int64)[:, None]
                mask = (i < left)[:, None] & (column < N)[None, :]
                if h is not None:
                    at = h + r * (2 * N) + STEP * column[None, :]
                    tl.store(at, g.to(h.dtype.element_ty), mask=mask)
                    tl.store(at + OFFSET, u.to(h.dtype.element_ty), mask=mask)
                act = g * tl.sigmoid(g) * u
                tl.store(a + r * N + column[None, :], act.to(a.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["programs", "rows"])
def expert_down_backward_kernel(
    dy, dy_tiles, order,  # [M, D]: see `groups.product`
    down, down_tiles,  # [E, F, D], the transpose of the weight
    h,  # [M, 2F], as `expert_up_kernel` leaves it
    weights, pairs,  # [T * k] float32, the router's; the pairs of the rows
    offs,  # [E] int32
    wa, dh,  # [M, F] and [M, 2F], written
    partial,  # [column tiles, M] float32, written: dweight of each tile
    programs, rows,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    STEP: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK: tl.constexpr, HALVINGS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    column_tiles: tl.constexpr = tl.cdiv(N, BLOCK_N)
    groups = group_tiles(offs, rows, column_tiles, E, BLOCK_E, BLOCK)
    for tile in range(program_index(), tl.max(groups[2], 0), programs):
        e, row, left, column_tile = locate_tile(groups, tile, column_tiles, BLOCK, TOGETHER)
        n = column_tile * BLOCK_N
        for half in tl.static_range(HALVINGS):
            if fits(left, BLOCK >> half, half, HALVINGS):
                da, _ = product(
                    dy, dy_tiles, order, down, down_tiles, None, None, e, row, left, n,
                    E, N, K, TOP_K, BLOCK >> half, BLOCK_N, BLOCK_K, half == 0,
                )  # fmt: skip
                i, column = tl.arange(0, BLOCK >> half), n + tl.arange(0, BLOCK_N)
                real = (i < left) & (e < E)
                r = (row + i).to(tl.int64)
                pair = tl.load(pairs + r, mask=real, other=0)
                w = tl.load(weights + pair, mask=real, other=0.0)[:, None]
                mask = (i < left)[:, None] & (column < N)[None, :]
                to_h = r[:, None] * (2 * N) + STEP * column[None, :]
                g = tl.load(h + to_h, mask=mask, other=0.0).to(tl.float32)
                u = tl.load(h + to_h + OFFSET, mask=mask, other=0.0).to(tl.float32)
                gate = tl.sigmoid(g)
                s = g * gate
                tl.store(partial + column_tile.to(tl.int64) * rows + r, tl.sum(da * s * u, 1), mask=i < left)
                tl.store(
                    wa + r[:, None] * N + column[None, :], (w * s * u).to(wa.dtype.element_ty), mask=mask
                )
                da *= w
                tl.store(
                    dh + to_h, (da * u * gate * (1.0 + g * (1.0 - gate))).to(dh.dtype.element_ty), mask=mask
                )
                tl.store(dh + to_h + OFFSET, (da * s).to(dh.dtype.element_ty), mask=mask)


def up(
    x: Rows, gate_up: Expert, interleaved: bool, offs: Tensor, a: Tensor, h: Tensor | None, arch: Arch
) -> Launch:
    """a [M, F], and h [M, 2F] where it is kept, from rows [M, D] and gate_up [E, 2F, D]."""
    M, F = a.shape
    E, _, D = gate_up.weight.shape
    how = moe_config.product(M, E, a.dtype, 2, arch)
    tiles = how.tiles
    programs = programs_of(how, M, E, F)
    (gate, gate_tiles), (up, up_tiles) = (weight(part, how) for part in halves(gate_up.weight, interleaved))
    kept = 0 if h is None else h.nbytes
    return Launch(
        expert_up_kernel,
        programs,
        {
            "x": x.pointer,
            "x_tiles": row_tiles(x, how),
            "order": x.order,
            "gate": gate,
            "gate_tiles": gate_tiles,
            "up": up,
            "up_tiles": up_tiles,
            "scale": gate_up.scale,
            "offs": offs,
            "a": a,
            "h": h,
            "programs": programs,
            "rows": M,
        },
        {"E": E, "N": F, "K": D, "TOP_K": x.top_k, **_columns(F, interleaved), **group_constants(how, E)},
        tiles,
        bytes=M * D * a.element_size()
        + a.nbytes
        + kept
        + min(E, M) * 2 * F * D * gate_up.weight.element_size(),
        flops=4 * M * F * D,
    )


def down_backward(
    dy: Rows,
    down: Tensor,
    h: Tensor,
    weights: Tensor,
    pairs: Tensor,
    offs: Tensor,
    wa: Tensor,
    dh: Tensor,
    interleaved: bool,
    arch: Arch,
) -> tuple[Launch, Tensor]:
    """wa [M, F] and dh [M, 2F] from rows [M, D] of dy, down [E, D, F], h [M, 2F]; and the partial sums of the gradient of
    the router's weights [column tiles, M].
    """
    M, F = wa.shape
    E, D, _ = down.shape
    how = moe_config.product(M, E, wa.dtype, 1, arch)
    tiles = how.tiles
    programs = programs_of(how, M, E, F)
    matrix, matrix_tiles = weight(down.mT, how)
    partial = weights.new_empty((-(-F // tiles.value), M))
    launch = Launch(
        expert_down_backward_kernel,
        programs,
        {
            "dy": dy.pointer,
            "dy_tiles": row_tiles(dy, how),
            "order": dy.order,
            "down": matrix,
            "down_tiles": matrix_tiles,
            "h": h,
            "weights": weights,
            "pairs": pairs,
            "offs": offs,
            "wa": wa,
            "dh": dh,
            "partial": partial,
            "programs": programs,
            "rows": M,
        },
        {"E": E, "N": F, "K": D, "TOP_K": dy.top_k, **_columns(F, interleaved), **group_constants(how, E)},
        tiles,
        bytes=M * D * wa.element_size()
        + wa.nbytes
        + 2 * h.nbytes
        + partial.nbytes
        + min(E, M) * F * D * wa.element_size(),
        flops=2 * M * F * D,
    )
    return launch, partial


def halves(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views [E, F, D] of the rows of the gate and of the up projection."""
    if interleaved:
        return gate_up[:, 0::2], gate_up[:, 1::2]
    gate, up = gate_up.chunk(2, 1)
    return gate, up


def _columns(F: int, interleaved: bool) -> dict[str, int]:
    return {"STEP": 2, "OFFSET": 1} if interleaved else {"STEP": 1, "OFFSET": F}
