"""The steps between the products of a mixture of experts: one call of a C++ kernel each (csrc/cpu)."""

import torch
from torch import Tensor

from .. import Expert, threads
from . import _C
from .launch import DTYPES
from .memory import LARGE, empty

# What the number of rows of a product is rounded up to. oneDNN compiles a kernel for each number of rows of
# 16-bit operands: 2 ms, more than the product. Where the rows lie along memory, MKL wants whole cache lines:
# the forward takes 133 ms in float32, not 150.
_ROUND = {torch.float64: 1, torch.float32: 1, torch.bfloat16: 32, torch.float16: 16}
_ROUND_ALONG = {torch.float64: 8, torch.float32: 16, torch.bfloat16: 32, torch.float16: 16}


def rounded(rows: int, dtype: torch.dtype, along: bool = False) -> int:
    """How many rows to give to a product, instead of `rows`; those that are added do not count.

    `along`: the rows of the result are to lie along memory.
    """
    step = (_ROUND_ALONG if along else _ROUND)[dtype]
    return -(-rows // step) * step


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b.

    With AMX oneDNN reads bfloat16 rows in blocks of 32, and what lies behind a row of another length gets
    into the result where it is NaN or infinite (torch 2.13). So such rows get zeros behind them.
    """
    if a.dtype == torch.bfloat16 and (odd := -a.shape[1] % 32):
        a, b = torch.nn.functional.pad(a, (0, odd)), torch.nn.functional.pad(b, (0, 0, 0, odd))
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def gather(x: Tensor, pairs: Tensor | None, top_k: int, rows: int, along: bool = False) -> Tensor:
    """The rows of x that `pairs` belong to (the first ones if None), then zeros up to the rounded number."""
    to = empty(x, rounded(rows, x.dtype, along), x.shape[1])
    _C.gather_rows((
        DTYPES[x.dtype], rows, *to.shape, x.data_ptr(), x.stride(0),
        0 if pairs is None else pairs.data_ptr(), top_k, to.data_ptr(), threads(),
    ))  # fmt: skip
    return to


def transpose(x: Tensor, to: Tensor, scale: Tensor | None = None) -> None:
    """to = (x * scale[:, None])^T; `to` may have the accumulation dtype."""
    _C.transpose((
        DTYPES[x.dtype], to.dtype != x.dtype, *x.shape, x.data_ptr(), x.stride(0), *_scale(scale),
        to.data_ptr(), to.stride(0), threads(),
    ))  # fmt: skip


def weight_gradient(dy: Tensor, x: Tensor, rows: int, gradients: Tensor, e: int) -> None:
    """gradients[e] = dy^T @ x, of which the first `rows` rows count and those after them, if any, are zero."""
    dw = gradients[e]
    if rows > _C.OUTER_ROWS:
        product(columns(dy), x, out=dw)
        return
    past_caches = gradients.nbytes >= LARGE  # none will hold them until they are read
    _C.outer_product((
        DTYPES[dw.dtype], past_caches, rows, *dw.shape, dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0),
        dw.data_ptr(), threads(),
    ))  # fmt: skip


def columns(x: Tensor) -> Tensor:
    """x^T, in the memory order that products of its dtype are fast with."""
    if x.itemsize > 2:
        return x.t()
    to = empty(x, x.shape[1], x.shape[0])
    transpose(x, to)
    return to


def swiglu(
    gate: Tensor, up: Tensor, a: Tensor, gate_scale: Tensor | None = None, up_scale: Tensor | None = None
) -> None:
    """a = silu(gate) * up, each multiplied by its scales [rows] first."""
    gate_address, stride = _scale(gate_scale)
    up_address, _ = _scale(up_scale)
    _C.swiglu_forward((
        DTYPES[a.dtype], *a.shape, gate.data_ptr(), up.data_ptr(), gate.stride(0),
        gate_address, up_address, stride, a.data_ptr(), a.stride(0), threads(),
    ))  # fmt: skip


def swiglu_backward(
    da: Tensor, h: Tensor, weights: Tensor, pairs: Tensor, interleaved: bool, dweights: Tensor
) -> tuple[Tensor, Tensor]:
    """dh and w * a, with as many rows as da, from the gradient da of w * a; writes dweights of the pairs."""
    rows, dim = da.shape
    dh, a = empty(da, rows, 2 * dim), empty(da, rows, dim)
    _C.swiglu_backward((
        DTYPES[da.dtype], len(pairs), rows, dim, interleaved, da.data_ptr(), h.data_ptr(), weights.data_ptr(),
        pairs.data_ptr(), dh.data_ptr(), a.data_ptr(), dweights.data_ptr(), threads(),
    ))  # fmt: skip
    return dh, a


def gather_sum(x: Tensor, z: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    """y in x's dtype with y_t = sum_j weights_tj z[position_tj]."""
    y = empty(x, len(position), z.shape[1])
    _C.gather_sum((
        DTYPES[x.dtype], z.dtype != x.dtype, *position.shape, z.shape[1], z.data_ptr(), position.data_ptr(),
        0 if weights is None else weights.data_ptr(), y.data_ptr(), threads(),
    ))  # fmt: skip
    return y


def expert_rows(
    x: Tensor,
    w: Expert,
    offs: Tensor,
    max_rows: int,
    y: Tensor,
    order: Tensor | None = None,
    top_k: int = 1,
    interleaved: bool = False,
) -> None:
    """The rows of y that belong to groups of at most `max_rows` rows; `order` as in `gather`."""
    experts, width, dim = w.weight.shape
    _C.expert_rows((
        DTYPES[x.dtype], y.dtype != x.dtype, interleaved, experts, len(y), dim, width, max_rows,
        offs.data_ptr(), x.data_ptr(), x.stride(0), 0 if order is None else order.data_ptr(), top_k,
        w.weight.data_ptr(), w.weight.stride(0), w.weight.stride(1), _scale(w.scale)[0],
        y.data_ptr(), threads(),
    ))  # fmt: skip


class Matrices:
    """The matrix of each expert in `dtype`, and what its product is to be multiplied by."""

    def __init__(self, expert: Expert, dtype: torch.dtype) -> None:
        self.weight = expert.weight
        self.scale = expert.scale
        self.dtype = dtype
        self.buffer: Tensor | None = None  # of the expert that was asked for last

    def __getitem__(self, e: int) -> tuple[Tensor, Tensor | None]:
        w = self.weight[e]
        if self.scale is None:
            return w, None
        if self.buffer is None:
            self.buffer = w.new_empty(w.shape, dtype=self.dtype)
        if w.stride(1) == 1 or w.shape[1] == 1:
            _C.widen_int8((
                DTYPES[self.dtype], *w.shape, w.data_ptr(), w.stride(0), self.buffer.data_ptr(), threads()
            ))  # fmt: skip
        else:
            self.buffer.copy_(w).mul_(1 / 128)
        return self.buffer, self.scale[e] * 128


def halves(rows: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the gate's rows and of the up projection's."""
    if interleaved:
        return rows[0::2], rows[1::2]
    F = len(rows) // 2
    return rows[:F], rows[F:]


def _scale(scale: Tensor | None) -> tuple[int, int]:
    return (0, 0) if scale is None else (scale.data_ptr(), scale.stride(0))
