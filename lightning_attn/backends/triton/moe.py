"""The raw functions of the mixture of experts, as launches one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import Expert, Routing
from . import counting_sort, expert_mlp, grouped_gemm, moe_config, moe_route, moe_rows
from .config import Arch, device_arch
from .launch import Launch, run_all
from .operands import Rows


def moe_route_forward(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    size = logits.shape[0], top_k
    weights = logits.new_empty(size, dtype=torch.float32)
    experts = logits.new_empty(size, dtype=torch.int32)
    launches = moe_route.forward(logits, weights, experts, renormalize, device_arch(logits.device))
    run_all(launches, logits.device)
    return weights, experts


def moe_route_backward(
    dweights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, renormalize: bool
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    arch = device_arch(logits.device)
    launches = moe_route.backward(dweights, logits, weights, experts, dlogits, renormalize, arch)
    run_all(launches, logits.device)
    return dlogits


def moe_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, position = experts.new_empty(experts.numel()), experts.new_empty(experts.shape)
    offs = experts.new_empty(num_experts)
    run_all(
        counting_sort.launches(experts, order, position, offs, device_arch(experts.device)), experts.device
    )
    return order, position, offs


def grouped_gemm_forward(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], w.shape[1])
    run_all([grouped_gemm.gemm(Rows(x), Expert(w), offs, y, device_arch(x.device))], x.device)
    return y


def grouped_gemm_backward(
    dy: Tensor, x: Tensor, w: Tensor, offs: Tensor, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    arch = device_arch(x.device)
    dx = x.new_empty(x.shape) if need_x else None
    dw = w.new_empty(w.shape) if need_w else None
    launches = []
    if dx is not None:
        launches.append(grouped_gemm.gemm(Rows(dy), Expert(w.mT), offs, dx, arch))
    if dw is not None:
        launches.append(grouped_gemm.weight_gradient(Rows(dy), Rows(x), offs, dw, x.shape[0], arch))
    run_all(launches, x.device)
    return dx, dw


def moe_mlp_forward(
    x: Tensor,
    gate_up: Expert,
    down: Expert,
    weights: Tensor,
    routing: Routing,
    interleaved: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    y = x.new_empty(x.shape)
    h = x.new_empty(weights.numel(), gate_up.weight.shape[1]) if save else None
    arch = device_arch(x.device)
    run_all(mlp_forward(x, gate_up, down, weights, routing, interleaved, h, y, arch), x.device)
    return y, h


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
    needs = need_x, need_gate_up, need_down, need_weights
    dx, dgate_up, ddown, dweights = (
        t.new_empty(t.shape) if need else None
        for t, need in zip((x, gate_up, down, weights), needs, strict=True)
    )
    launches = mlp_backward(
        dy, x, gate_up, down, weights, routing, h, interleaved, dx, dgate_up, ddown, dweights,
        device_arch(x.device),
    )  # fmt: skip
    run_all(launches, x.device)
    return dx, dgate_up, ddown, dweights


def mlp_forward(
    x: Tensor,
    gate_up: Expert,
    down: Expert,
    weights: Tensor,
    routing: Routing,
    interleaved: bool,
    h: Tensor | None,
    y: Tensor,
    arch: Arch,
) -> list[Launch]:
    """y [T, D], and h where it is kept."""
    order, position, offs = routing
    pairs, k = weights.numel(), weights.shape[1]
    a = x.new_empty(pairs, down.weight.shape[2])
    z = x.new_empty(pairs, x.shape[1])
    first, rows = _sorted(x, gate_up.weight.shape[0], 2, order, offs, k, pairs, arch)
    return [
        *first,
        expert_mlp.up(rows, gate_up, interleaved, offs, a, h, arch),
        grouped_gemm.gemm(Rows(a), down, offs, z, arch),
        moe_rows.gather_sum(z, position, weights, y, arch),
    ]


def mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    routing: Routing,
    h: Tensor,
    interleaved: bool,
    dx: Tensor | None,
    dgate_up: Tensor | None,
    ddown: Tensor | None,
    dweights: Tensor | None,
    arch: Arch,
) -> list[Launch]:
    """Those of the gradients that are tensors."""
    order, position, offs = routing
    (E, D, F), (pairs, k) = down.shape, (weights.numel(), weights.shape[1])
    da, wa, dh = (x.new_empty(pairs, n) for n in (F, F, 2 * F))
    launches, dy_rows = _sorted(dy, E, 1, order, offs, k, pairs, arch)
    launches += [
        grouped_gemm.gemm(dy_rows, Expert(down.mT), offs, da, arch),
        expert_mlp.activation_backward(da, h, weights, position, wa, dh, dweights, interleaved, arch),
    ]
    if ddown is not None:
        launches.append(grouped_gemm.weight_gradient(dy_rows, Rows(wa), offs, ddown, pairs, arch))
    if dgate_up is not None:
        x_rows = Rows(x, order, k)
        launches.append(grouped_gemm.weight_gradient(Rows(dh), x_rows, offs, dgate_up, pairs, arch))
    if dx is not None:
        dz = x.new_empty(pairs, D)
        launches.append(grouped_gemm.gemm(Rows(dh), Expert(gate_up.mT), offs, dz, arch))
        launches.append(moe_rows.gather_sum(dz, position, None, dx, arch))
    return launches


def _sorted(
    x: Tensor, E: int, accumulators: int, order: Tensor, offs: Tensor, k: int, pairs: int, arch: Arch
) -> tuple[list[Launch], Rows]:
    """The rows of x in the order of the pairs: copied for large tiles, which lack the registers to find them and can come by
    descriptor then; else found as they are read.
    """
    if moe_config.product(pairs, E, x.dtype, x.dtype, accumulators, arch).way != "large":
        return [], Rows(x, order, k)
    xs = x.new_empty(pairs, x.shape[1])
    return [moe_rows.gather(x, order, offs, xs, k, arch)], Rows(xs)
