"""The mixture of experts in plain PyTorch: any device, floating dtype and size. Values are read, so a GPU is waited for.

    y_t = sum_j w_tj down_e (silu(gate_e x_t) * up_e x_t),  e = e_tj

with the weights and experts of each token from the router (arXiv 2501.08313, section 2). Sums and products are made in the
accumulation dtype; what the backward keeps, and what a product of matrices reads, is in x's dtype.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ...dispatch import accumulation_dtype
from .. import Expert, Routing
from ..raw import raw


@raw
def moe_route_forward(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    logits = logits.to(accumulation_dtype(logits.dtype))
    # A stable sort gives equal logits in the order of their experts, as torch.topk need not.
    largest, experts = (x[:, :top_k] for x in logits.sort(dim=-1, descending=True, stable=True))
    # The softmax over the chosen ones is that of all of them, divided by its sum over those.
    weights = largest.softmax(-1) if renormalize else logits.softmax(-1).gather(1, experts)
    return weights.contiguous(), experts.to(torch.int32).contiguous()


@raw
def moe_route_backward(
    dweights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, renormalize: bool
) -> Tensor:
    acc = weights.dtype
    dweights = dweights.to(acc)
    mean = (weights * dweights).sum(-1, keepdim=True)
    chosen = experts.long()
    if renormalize:
        dlogits = torch.zeros_like(logits, dtype=acc).scatter_(1, chosen, weights * (dweights - mean))
    else:
        dlogits = (-mean * logits.to(acc).softmax(-1)).scatter_add_(1, chosen, weights * dweights)
    return dlogits.to(logits.dtype).contiguous()


@raw
def moe_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = experts.reshape(-1).long()
    real = (flat >= 0) & (flat < num_experts)
    order = torch.where(real, flat, num_experts).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    position = torch.where(real, place, -1).view(experts.shape)
    offs = torch.bincount(flat[real], minlength=num_experts).cumsum(0)
    return order.int(), position.int(), offs.int()


@raw
def grouped_gemm_forward(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    acc = accumulation_dtype(x.dtype)
    y = x.new_zeros(x.shape[0], w.shape[1])
    for e, rows in _groups(offs, x.shape[0]):
        y[rows] = (x[rows].to(acc) @ w[e].to(acc).mT).to(x.dtype)
    return y


@raw
def grouped_gemm_backward(
    dy: Tensor, x: Tensor, w: Tensor, offs: Tensor, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    acc = accumulation_dtype(x.dtype)
    dx = x.new_zeros(x.shape) if need_x else None
    dw = w.new_zeros(w.shape) if need_w else None
    for e, rows in _groups(offs, x.shape[0]):
        if dx is not None:
            dx[rows] = (dy[rows].to(acc) @ w[e].to(acc)).to(x.dtype)
        if dw is not None:
            dw[e] = (dy[rows].to(acc).mT @ x[rows].to(acc)).to(w.dtype)
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
    acc = accumulation_dtype(x.dtype)
    token = routing.order.long() // weights.shape[1]
    F = down.weight.shape[2]
    h = x.new_zeros(len(token), 2 * F) if save else None
    z = x.new_zeros(len(token), x.shape[1])
    for e, rows in _groups(routing.offs, len(token)):
        g, u = (x[token[rows]].to(acc) @ m.mT for m in _gate_and_up(gate_up, e, interleaved, acc))
        if h is not None:
            h[rows] = _finite(torch.cat([g, u], 1), x.dtype)
        a = (torch.nn.functional.silu(g) * u).to(x.dtype)
        z[rows] = (a.to(acc) @ _matrix(down, e, acc).mT).to(x.dtype)
    return _gather_sum(z, routing.position, weights), h


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
    acc = accumulation_dtype(x.dtype)
    pair = routing.order.long()
    token = pair // weights.shape[1]
    F = down.shape[2]
    dz = x.new_zeros(len(pair), x.shape[1]) if need_x else None  # the gradient of each pair's own row of x
    dgate_up = gate_up.new_zeros(gate_up.shape) if need_gate_up else None
    ddown = down.new_zeros(down.shape) if need_down else None
    dweights = torch.zeros_like(weights) if need_weights else None
    for e, rows in _groups(routing.offs, len(pair)):
        w = weights.view(-1)[pair[rows], None].to(acc)
        dy_ = dy[token[rows]].to(acc)
        g, u = (part.to(acc) for part in (h[rows, :F], h[rows, F:]))
        gate = torch.sigmoid(g)
        s = g * gate
        da = dy_ @ down[e].to(acc)  # of the activation, but for the router's weight
        if dweights is not None:
            dweights.view(-1)[pair[rows]] = (da * s * u).sum(1)
        if ddown is not None:
            ddown[e] = (dy_.mT @ (w * s * u).to(x.dtype).to(acc)).to(down.dtype)
        dg = (w * da * u * gate * (1 + g * (1 - gate))).to(x.dtype).to(acc)
        du = (w * da * s).to(x.dtype).to(acc)
        parts = _gate_and_up(Expert(gate_up), e, interleaved, acc)
        if dz is not None:
            dz[rows] = (dg @ parts[0] + du @ parts[1]).to(x.dtype)
        if dgate_up is not None:
            x_ = x[token[rows]].to(acc)
            for to, d in zip(_halves(dgate_up[e], interleaved), (dg, du), strict=True):
                to.copy_(d.mT @ x_)
    ones = torch.ones_like(weights)
    dx = None if dz is None else _gather_sum(dz, routing.position, ones)
    return dx, dgate_up, ddown, dweights


def _finite(h: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`; what would overflow float16 is its largest number, or the backward would multiply infinity by zero."""
    limit = torch.finfo(dtype).max
    return h.clamp(-limit, limit).to(dtype) if dtype == torch.float16 else h.to(dtype)


def _groups(offs: Tensor, rows: int) -> list[tuple[int, slice]]:
    """The groups that have rows."""
    ends = [min(max(end, 0), rows) for end in offs.tolist()]
    return [(e, slice(a, b)) for e, (a, b) in enumerate(pairwise([0, *ends])) if a < b]


def _matrix(expert: Expert, e: int, dtype: torch.dtype) -> Tensor:
    matrix = expert.weight[e].to(dtype)
    return matrix if expert.scale is None else matrix * expert.scale[e, :, None].to(dtype)


def _halves(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the rows [F, D] of the gate and of the up projection in one expert's [2F, D]."""
    if interleaved:
        return gate_up[0::2], gate_up[1::2]
    gate, up = gate_up.chunk(2)
    return gate, up


def _gate_and_up(gate_up: Expert, e: int, interleaved: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _halves(_matrix(gate_up, e, dtype), interleaved)


def _gather_sum(z: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    """y [T, D] with y_t = sum_j weights_tj z[position_tj], in the order of j; a pair without a position adds nothing."""
    y = z.new_zeros(position.shape[0], z.shape[1], dtype=weights.dtype)
    for place, w in zip(position.unbind(1), weights.unbind(1), strict=True):
        real = place >= 0
        y[real] += w[real, None] * z[place[real].long()].to(y.dtype)
    return y.to(z.dtype)
