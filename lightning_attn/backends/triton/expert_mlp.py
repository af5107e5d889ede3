"""An expert's activation, in the product before it, and backward through it:

    g, u = gate_e x, up_e x        s = silu(g)        a = s u
    dweight = <da, a>              wa = w a           dg = w da u s'        du = w da s

where da = down_e^T dy and w is the router's weight of the pair, which goes to both gradients of down_e. What is stored is
rounded to the inputs' dtype; a is made from float32. Backward it is a pass of its own, over 0.4% of the time of the products
at the shape of MiniMax-Text-01: in the epilogue of the product it spills, or halves its tile, which costs more.
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


@triton.jit
def _finite(x, dtype: tl.constexpr):
    """In `dtype`; what would overflow float16 is its largest number, or the backward would multiply infinity by zero. NaN stays."""
    if dtype == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(dtype)


@triton.jit(do_not_specialize=["programs", "rows"])
def expert_up_kernel(
    x, x_tiles, order,  # [M, D]: see `groups.product`
    gate, gate_tiles, up, up_tiles,  # [E, F, D] each
    scale,  # [E, 2F] float32, or None
    offs,  # [E] int32
    a,  # [M, F], written
    h,  # [M, 2F], written, or None: g and u in the columns STEP f and OFFSET + STEP f, as the rows of gate_up
    programs, rows,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, ALONG_K: tl.constexpr,
    STEP: tl.constexpr, OFFSET: tl.constexpr,
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
                g, u = product(
                    x, x_tiles, order, gate, gate_tiles, up, up_tiles, e, row, left, n,
                    E, N, K, TOP_K, ALONG_K, BLOCK >> half, BLOCK_N, BLOCK_K, half == 0,
                )  # fmt: skip
                g = scaled(g, scale, e, n, E, 2 * N, STEP, 0, N)
                u = scaled(u, scale, e, n, E, 2 * N, STEP, OFFSET, N)
                i, column = tl.arange(0, BLOCK >> half), n + tl.arange(0, BLOCK_N)
                r = (row + i).to(tl.int64)[:, None]
                mask = (i < left)[:, None] & (column < N)[None, :]
                if h is not None:
                    gh, uh = _finite(g, h.dtype.element_ty), _finite(u, h.dtype.element_ty)
                    if STEP == 2:  # whole rows of both, where two stores of every other column would spill
                        c = 2 * n + tl.arange(0, 2 * BLOCK_N)
                        both = (i < left)[:, None] & (c < 2 * N)[None, :]
                        tl.store(h + r * (2 * N) + c[None, :], tl.interleave(gh, uh), mask=both)
                    else:
                        at = h + r * (2 * N) + column[None, :]
                        tl.store(at, gh, mask=mask)
                        tl.store(at + OFFSET, uh, mask=mask)
                act = g * tl.sigmoid(g) * u
                tl.store(a + r * N + column[None, :], act.to(a.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pairs"])
def expert_activation_backward_kernel(
    da,  # [M, F]
    h,  # [M, 2F], as `expert_up_kernel` leaves it
    weights, position,  # [T * k] float32, the router's, and the row of each pair or -1
    wa, dh, dweights,  # [M, F], [M, 2F] and [T * k] float32, written; dweights may be None
    pairs,
    N: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p = program_index()
    if p >= pairs:
        return
    row = tl.load(position + p).to(tl.int64)
    w = tl.load(weights + p)
    total = tl.zeros([BLOCK_N], tl.float32)
    for n in range(0, tl.where(row >= 0, N, 0), BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        mask = column < N
        at, at_h = row * N + column, row * (2 * N) + STEP * column
        d = tl.load(da + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(h + at_h, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(h + at_h + OFFSET, mask=mask, other=0.0).to(tl.float32)
        gate = tl.sigmoid(g)
        s = g * gate
        total += d * s * u
        d *= w
        tl.store(wa + at, (w * s * u).to(wa.dtype.element_ty), mask=mask)
        tl.store(dh + at_h, (d * u * gate * (1.0 + g * (1.0 - gate))).to(dh.dtype.element_ty), mask=mask)
        tl.store(dh + at_h + OFFSET, (d * s).to(dh.dtype.element_ty), mask=mask)
    if dweights is not None:
        tl.store(dweights + p, tl.sum(total, 0))


def up(
    x: Rows, gate_up: Expert, interleaved: bool, offs: Tensor, a: Tensor, h: Tensor | None, arch: Arch
) -> Launch:
    """a [M, F], and h [M, 2F] where it is kept, from rows [M, D] and gate_up [E, 2F, D]."""
    M, F = a.shape
    E, _, D = gate_up.weight.shape
    how = moe_config.product(M, E, a.dtype, gate_up.weight.dtype, 2, arch)
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
        {
            "E": E,
            "N": F,
            "K": D,
            "TOP_K": x.top_k,
            **_columns(F, interleaved),
            **group_constants(how, E, gate),
        },
        tiles,
        bytes=M * D * a.element_size()
        + a.nbytes
        + kept
        + min(E, M) * 2 * F * D * gate_up.weight.element_size(),
        flops=4 * M * F * D,
    )


def activation_backward(
    da: Tensor,
    h: Tensor,
    weights: Tensor,
    position: Tensor,
    wa: Tensor,
    dh: Tensor,
    dweights: Tensor | None,
    interleaved: bool,
    arch: Arch,
) -> Launch:
    """wa [M, F], dh [M, 2F] and the gradient of the router's weights from da [M, F] and h [M, 2F]."""
    pairs, F = da.shape
    tiles = moe_config.activation(F, arch)
    return Launch(
        expert_activation_backward_kernel,
        pairs,
        {
            "da": da,
            "h": h,
            "weights": weights,
            "position": position,
            "wa": wa,
            "dh": dh,
            "dweights": dweights,
            "pairs": pairs,
        },
        {"N": F, **_columns(F, interleaved), "BLOCK_N": tiles.value},
        tiles,
        bytes=2 * (da.nbytes + h.nbytes) + weights.nbytes + position.nbytes,
        flops=16 * da.numel(),
    )


def halves(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views [E, F, D] of the rows of the gate and of the up projection."""
    if interleaved:
        return gate_up[:, 0::2], gate_up[:, 1::2]
    gate, up = gate_up.chunk(2, 1)
    return gate, up


def _columns(F: int, interleaved: bool) -> dict[str, int]:
    return {"STEP": 2, "OFFSET": 1} if interleaved else {"STEP": 1, "OFFSET": F}
