"""The mixture of experts on the CPU: torch.mm for groups of many rows, csrc/cpu for few and between products.

What was measured (two cores with AVX-512 and AMX, D = 1024, F = 1536, 16 experts of 256 rows; ms for all):
- `torch.nn.functional.grouped_mm` is a loop over torch.mm: at best 4 % faster, up to 1.9 times slower (dw),
  and it refuses float64. Hence torch.mm here.
- w @ x^T beats x @ w^T, for which w is packed: gate_up 88 against 95 in float32, 13 against 19 in bfloat16.
  So the forward keeps its activations transposed between the products.
- dy^T @ x wants dy^T in memory in bfloat16: 12 against 28; in float32 it makes no difference.
- The time hangs on the number of rows, which is therefore rounded up: see moe_steps.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import accumulation_dtype
from .. import Expert, Routing, threads
from ..raw import raw
from . import _C
from .launch import DTYPES
from .memory import empty, zeros
from .moe_steps import (
    Matrices,
    expert_rows,
    gather,
    gather_sum,
    halves,
    product,
    rounded,
    swiglu,
    swiglu_backward,
    transpose,
    weight_gradient,
)

# Up to how many rows `expert_rows` beats torch.mm (measured), by the dtype of the matrices; AMX wins early.
_FEW = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 4, torch.float16: 16, torch.int8: 12}
_CHUNK = 1024  # rows that the forward takes at a time, which bounds its buffers


class _Group(NamedTuple):
    expert: int
    begin: int
    end: int


@raw
def moe_route_forward(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k, dtype=accumulation_dtype(logits.dtype))
    chosen = logits.new_empty(tokens, top_k, dtype=torch.int32)
    _C.moe_route_forward((
        DTYPES[logits.dtype], tokens, experts, top_k, renormalize, logits.data_ptr(), logits.stride(0),
        weights.data_ptr(), chosen.data_ptr(), 0, 0, 0, threads(),
    ))  # fmt: skip
    return weights, chosen


@raw
def moe_route_backward(
    dweights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, renormalize: bool
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    dweights = dweights.to(weights.dtype)
    _C.moe_route_backward((
        DTYPES[logits.dtype], *logits.shape, weights.shape[1], renormalize,
        logits.data_ptr(), logits.stride(0), weights.data_ptr(), experts.data_ptr(),
        dweights.data_ptr(), dweights.stride(0), dlogits.data_ptr(), threads(),
    ))  # fmt: skip
    return dlogits


@raw
def moe_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, position = experts.new_empty(experts.numel()), torch.empty_like(experts)
    offs = experts.new_empty(num_experts)
    _C.moe_sort((
        len(order), num_experts, experts.data_ptr(), order.data_ptr(), position.data_ptr(), offs.data_ptr(),
    ))  # fmt: skip
    return order, position, offs


@raw
def grouped_gemm_forward(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    y = empty(x, x.shape[0], w.shape[1])
    few, many, limit = _split(offs, len(x), w)
    if few:
        expert_rows(x, Expert(w), offs, limit, y)
    for e, begin, end in _chunks(many):
        rows = min(rounded(end - begin, x.dtype, along=True), len(x) - begin)  # those past the end go nowhere
        y_t = product(w[e], x[begin : begin + rows].t())[:, : end - begin]
        transpose(y_t, y[begin:end])
    y[_last(offs, len(y)) :] = 0
    return y


@raw
def grouped_gemm_backward(
    dy: Tensor, x: Tensor, w: Tensor, offs: Tensor, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    groups = _groups(offs, len(x))
    dx = empty(x, *x.shape) if need_x else None
    dw = _gradients(w, groups) if need_w else None
    for e, begin, end in groups:
        # What is written past the group's end is the next one's or nobody's, and comes later.
        if dx is not None:
            rows = slice(begin, begin + min(rounded(end - begin, x.dtype), len(x) - begin))
            product(dy[rows], w[e], out=dx[rows])
        if dw is not None:
            dy_, x_ = (gather(t[begin:end], None, 1, end - begin) for t in (dy, x))
            weight_gradient(dy_, x_, end - begin, dw, e)
    if dx is not None:
        dx[_last(offs, len(x)) :] = 0
    return dx, dw


@raw
def moe_mlp_forward(
    x: Tensor,
    gate_up: Expert,
    down: Expert,
    weights: Tensor,
    routing: Routing,
    interleaved: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    if (
        x.dtype == torch.float16 and gate_up.scale is not None
    ):  # sums of int8 would overflow it before they are scaled
        y, _ = moe_mlp_forward(x.float(), gate_up, down, weights, routing, interleaved, save)
        return y.to(x.dtype), None
    order, position, offs = routing
    M, k, (D, F) = len(order), weights.shape[1], down.weight.shape[1:]
    few, many, limit = _split(offs, M, gate_up.weight, down.weight)
    h = empty(x, M, 2 * F) if save or few else None
    z = empty(x, M, D, dtype=x.dtype if down.scale is None else weights.dtype)
    if few:
        assert h is not None
        a = empty(x, M, F)
        expert_rows(x, gate_up, offs, limit, h, order, k, interleaved)
        for begin, end in _runs(few):
            swiglu(h[begin:end, :F], h[begin:end, F:], a[begin:end])
        expert_rows(a, down, offs, limit, z)
    gate_up_matrices, down_matrices = Matrices(gate_up, x.dtype), Matrices(down, x.dtype)
    for e, begin, end in _chunks(many):
        rows = end - begin
        matrix, scale = gate_up_matrices[e]
        x_ = gather(x, order[begin:end], k, rows, along=True)
        gate, up = halves(product(matrix, x_.t()), interleaved)  # [F, rows]
        scales = (None, None) if scale is None else halves(scale, interleaved)
        a = empty(x, *gate.shape)
        swiglu(gate, up, a, *scales)
        if save:
            assert h is not None
            transpose(gate[:, :rows], h[begin:end, :F], scales[0])
            transpose(up[:, :rows], h[begin:end, F:], scales[1])
        matrix, scale = down_matrices[e]
        transpose(product(matrix, a)[:, :rows], z[begin:end], scale)
    return gather_sum(x, z, position, weights), h if save else None


@raw
def moe_mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    routing: Routing,
    h: Tensor,
    interleaved: bool,
    need_x: bool,
    need_gate_up: bool,
    need_down: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    order, position, offs = routing
    M, k = len(order), weights.shape[1]
    groups = _groups(offs, M)
    dz = empty(x, M + rounded(1, x.dtype), x.shape[1]) if need_x else None  # of each pair's own row of x
    dgate_up = _gradients(gate_up, groups) if need_gate_up else None
    ddown = _gradients(down, groups) if need_down else None
    dweights = torch.zeros_like(weights)
    for e, begin, end in groups:
        pairs = order[begin:end]
        dy_ = gather(dy, pairs, k, end - begin)
        dh, a = swiglu_backward(product(dy_, down[e]), h[begin:end], weights, pairs, interleaved, dweights)
        if ddown is not None:
            weight_gradient(dy_, a, end - begin, ddown, e)
        if dz is not None:  # what is written past the group's end is the next one's, and comes later
            product(dh, gate_up[e], out=dz[begin : begin + len(dh)])
        if dgate_up is not None:
            weight_gradient(dh, gather(x, pairs, k, end - begin), end - begin, dgate_up, e)
    dx = None if dz is None else gather_sum(x, dz, position, None)
    return dx, dgate_up, ddown, dweights if need_weights else None


def _ends(offs: Tensor, rows: int) -> list[int]:
    return [min(max(end, 0), rows) for end in offs.tolist()]


def _last(offs: Tensor, rows: int) -> int:
    """Where the rows of no group begin."""
    return _ends(offs[-1:], rows)[0] if len(offs) else 0


def _groups(offs: Tensor, rows: int) -> list[_Group]:
    """The groups that have rows."""
    return [_Group(e, a, b) for e, (a, b) in enumerate(pairwise([0, *_ends(offs, rows)])) if a < b]


def _split(offs: Tensor, rows: int, *matrices: Tensor) -> tuple[list[_Group], list[_Group], int]:
    """The groups of so few rows that reading their matrices takes the time, the others, and the limit."""
    limit = _FEW[matrices[0].dtype] if all(w.stride(2) == 1 or w.shape[2] == 1 for w in matrices) else 0
    groups = _groups(offs, rows)
    few = [group for group in groups if group.end - group.begin <= limit]
    return few, [group for group in groups if group.end - group.begin > limit], limit


def _runs(groups: list[_Group]) -> Iterator[tuple[int, int]]:
    """The rows of groups that follow each other, joined."""
    begin = end = 0
    for group in groups:
        if group.begin != end:
            if begin < end:
                yield begin, end
            begin = group.begin
        end = group.end
    if begin < end:
        yield begin, end


def _chunks(groups: list[_Group]) -> Iterator[_Group]:
    for e, begin, end in groups:
        for at in range(begin, end, _CHUNK):
            yield _Group(e, at, min(at + _CHUNK, end))


def _gradients(w: Tensor, groups: list[_Group]) -> Tensor:
    """Memory for the gradient of each matrix: of those without rows it is zero."""
    if 5 * len(groups) < len(
        w
    ):  # no more than these, as fresh memory costs more than zeros over what was kept
        return zeros(w, *w.shape)
    dw = empty(w, *w.shape)
    for e in set(range(len(w))) - {group.expert for group in groups}:
        weight_gradient(w[e], w[e], 0, dw, e)  # a sum of nothing
    return dw
