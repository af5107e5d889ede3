"""y = n w g with n = x rstd, rstd = (mean(x^2) + eps)^(-1/2), g = sigmoid(gate), over rows of D elements.

With e = dy w g, the gradient of n:

    dx = rstd (e - n mean(e n))        dgate = e n (1 - g)        dw = sum over rows of dy n g

A program holds whole rows, so whatever has the size of x is read once and written once. All operands are matrices
[rows, D] whose rows are contiguous; a stride is that from row to row in elements, or None for D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .config import Arch
from .launch import Launch
from .primitives import program_index


@triton.jit
def _rows(x, stride, row, column, D: tl.constexpr):
    """Pointers [ROWS, BLOCK_D]."""
    return x + row.to(tl.int64)[:, None] * (D if stride is None else stride) + column[None, :]


@triton.jit
def _compensated_add(total, lost, term):
    """Kahan's sum, for as many terms as there may be: what an addition lost goes into the next one."""
    term -= lost
    after = total + term
    return after, (after - total) - term


@triton.jit(do_not_specialize=["programs", "rows"])
def gated_rms_norm_forward_kernel(
    x, gate, y, x_stride, gate_stride,  # y is contiguous
    weight,  # [D], float32 or of x's dtype
    rstd,  # [rows] float32, written
    eps, programs, rows,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    row, column = index * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    xb = tl.load(_rows(x, x_stride, row, column, D), mask=mask, other=0.0).to(tl.float32)
    gb = tl.load(_rows(gate, gate_stride, row, column, D), mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(xb * xb, 1), D * 1.0) + eps))
    tl.store(rstd + row, r, mask=row < rows)
    yb = xb * r[:, None] * w[None, :] * tl.sigmoid(gb)
    tl.store(_rows(y, None, row, column, D), yb.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["programs", "rows", "share"])
def gated_rms_norm_backward_kernel(
    dy, x, gate, dx, dgate, dy_stride, x_stride, gate_stride,  # dx and dgate are contiguous
    weight,  # [D], float32 or of x's dtype
    rstd,  # [rows] float32
    partial,  # [programs, D] float32, written: dw of each program's rows
    programs, rows,
    share,  # rows of a program, a multiple of ROWS
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, COMPENSATED: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    column = tl.arange(0, BLOCK_D)
    in_row = column < D
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    lost = tl.zeros([ROWS, BLOCK_D], tl.float32)
    row = index * share + tl.arange(0, ROWS)
    for _ in range(0, share, ROWS):
        mask = (row < rows)[:, None] & in_row[None, :]
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        n = tl.load(_rows(x, x_stride, row, column, D), mask=mask, other=0.0).to(tl.float32) * r
        g = tl.sigmoid(tl.load(_rows(gate, gate_stride, row, column, D), mask=mask, other=0.0).to(tl.float32))
        d = tl.load(_rows(dy, dy_stride, row, column, D), mask=mask, other=0.0).to(tl.float32) * g
        if COMPENSATED:
            total, lost = _compensated_add(total, lost, d * n)
        else:
            total += d * n
        # Again for each row: the weight stays in the cache, where it takes no registers.
        e = d * tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
        mean = tl.sum(e * n, 1) * (1.0 / D)
        dgb, dxb = e * n * (1.0 - g), r * (e - n * mean[:, None])
        tl.store(_rows(dgate, None, row, column, D), dgb.to(dgate.dtype.element_ty), mask=mask)
        tl.store(_rows(dx, None, row, column, D), dxb.to(dx.dtype.element_ty), mask=mask)
        row += ROWS
    tl.store(partial + index * D + column, tl.sum(total - lost, 0), mask=in_row)


@triton.jit(do_not_specialize=["parts"])
def gated_rms_norm_dweight_kernel(
    partial,  # [parts, D] float32
    dweight,  # [D], written
    parts,
    D: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum of the partial sums, always in the same order."""
    column = program_index() * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    lost = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        mask = (part < parts)[:, None] & (column < D)[None, :]
        term = tl.load(_rows(partial, None, part, column, D), mask=mask, other=0.0)
        total, lost = _compensated_add(total, lost, term)
    tl.store(dweight + column, tl.sum(total - lost, 0).to(dweight.dtype.element_ty), mask=column < D)


def _matrix(x: Tensor) -> Tensor:
    """The rows of `x` as a matrix: a view wherever strides allow one."""
    return x.reshape(-1, x.shape[-1])


def _stride(x: Tensor) -> int | None:
    """As kernels take it. Of a number Triton only knows whether 16 divides it: with rows of 1000 elements it would miss
    that 8 does. Where 16 does it is passed, as the backward pass in float32 takes more registers with a constant.
    """
    stride, D = x.stride(0), x.shape[1]
    return None if stride == D and D % 16 else stride


def forward(
    x: Tensor, gate: Tensor, weight: Tensor, y: Tensor, rstd: Tensor, eps: float, arch: Arch
) -> list[Launch]:
    x, gate = _matrix(x), _matrix(gate)
    rows, D = x.shape
    tiles = config.norm(D, arch)
    programs = -(-rows // tiles.block)
    return [
        Launch(
            gated_rms_norm_forward_kernel,
            programs,
            {
                "x": x,
                "gate": gate,
                "y": y,
                "x_stride": _stride(x),
                "gate_stride": _stride(gate),
                "weight": weight,
                "rstd": rstd,
                "eps": float(eps),
                "programs": programs,
                "rows": rows,
            },
            {"D": D, "ROWS": tiles.block, "BLOCK_D": tiles.value},
            tiles,
            bytes=3 * y.nbytes + rstd.nbytes + weight.nbytes,
            again=(programs - 1) * weight.nbytes,
            flops=rows * D * 8,
        )
    ]


def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dx: Tensor,
    dgate: Tensor,
    dweight: Tensor,
    arch: Arch,
) -> list[Launch]:
    dy, x, gate = _matrix(dy), _matrix(x), _matrix(gate)
    rows, D = x.shape
    tiles = config.norm(D, arch)
    share = config.norm_share(rows, tiles, arch)
    parts = -(-rows // share.rows)
    partial = x.new_empty((parts, D), dtype=torch.float32)
    main = Launch(
        gated_rms_norm_backward_kernel,
        parts,
        {
            "dy": dy,
            "x": x,
            "gate": gate,
            "dx": dx,
            "dgate": dgate,
            "dy_stride": _stride(dy),
            "x_stride": _stride(x),
            "gate_stride": _stride(gate),
            "weight": weight,
            "rstd": rstd,
            "partial": partial,
            "programs": parts,
            "rows": rows,
            "share": share.rows,
        },
        {"D": D, "ROWS": tiles.block, "BLOCK_D": tiles.value, "COMPENSATED": share.compensated},
        tiles,
        bytes=5 * dx.nbytes + rstd.nbytes + weight.nbytes + partial.nbytes,
        again=(parts * share.rows // tiles.block - 1) * weight.nbytes,
        flops=rows * D * 18,
    )
    tiles = config.norm_dweight(arch)
    finish = Launch(
        gated_rms_norm_dweight_kernel,
        -(-D // tiles.value),
        {"partial": partial, "dweight": dweight, "parts": parts},
        {"D": D, "BLOCK": tiles.block, "COLUMNS": tiles.value},
        tiles,
        bytes=partial.nbytes + dweight.nbytes,
        flops=parts * D,
    )
    return [main, finish]
