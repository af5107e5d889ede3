"""The mixture of experts as torch.library knows it, and its gradients.

An operator takes tensors only: an int8 matrix comes with its scales beside it, and a result that was not asked for is an
empty tensor.
"""

from typing import Any

import torch
from torch import Tensor

from .. import validation
from ..backends import Expert, Routing
from ..dispatch import accumulation_dtype
from .once import once_differentiable
from .registry import check_values, dense, kernels_of, operator, rows


def matrices(w: Tensor) -> Tensor:
    """w [E, N, K] with one of the last two dimensions contiguous; kernels take any other strides."""
    return w if 1 in w.stride()[1:] else w.contiguous()


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    return _nothing(like) if x is None else x


# ---- routing ------------------------------------------------------------------------------------------------------


def _moe_route_forward_fake(
    logits: Tensor, top_k: int, renormalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    size = logits.shape[0], top_k
    dtype = accumulation_dtype(logits.dtype)
    return logits.new_empty(size, dtype=dtype), logits.new_empty(size, dtype=torch.int32)


@operator(_moe_route_forward_fake)
def moe_route_forward(logits: Tensor, top_k: int, renormalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    if check_values(logits):
        validation.moe_route_values(logits)
    dtype = accumulation_dtype(logits.dtype)
    kernels = kernels_of(backend, "moe_route_forward", logits, dtype, top_k)
    return kernels.moe_route_forward(rows(logits), top_k, renormalize)


def _moe_route_backward_fake(
    dweights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, renormalize: bool, backend: str
) -> Tensor:
    return logits.new_empty(logits.shape)


@operator(_moe_route_backward_fake)
def moe_route_backward(
    dweights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, renormalize: bool, backend: str
) -> Tensor:
    kernels = kernels_of(backend, "moe_route_backward", logits, weights.dtype, weights.shape[1])
    return kernels.moe_route_backward(
        rows(dweights), rows(logits), weights.contiguous(), experts.contiguous(), renormalize
    )


class MoeRouteFunction(torch.autograd.Function):
    """moe_route_forward, differentiable in the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, top_k: int, renormalize: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        weights, experts = moe_route_forward(logits, top_k, renormalize, backend)
        ctx.save_for_backward(logits, weights, experts)
        ctx.mark_non_differentiable(experts)
        ctx.renormalize, ctx.backend = renormalize, backend
        return weights, experts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, weights, experts = ctx.saved_tensors
        dlogits = moe_route_backward(dweights, logits, weights, experts, ctx.renormalize, ctx.backend)
        return dlogits, None, None, None


# ---- the product of groups ----------------------------------------------------------------------------------------


def _grouped_gemm_forward_fake(x: Tensor, w: Tensor, offs: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@operator(_grouped_gemm_forward_fake)
def grouped_gemm_forward(x: Tensor, w: Tensor, offs: Tensor, backend: str) -> Tensor:
    if check_values(x):
        validation.grouped_gemm_values(offs, x.shape[0])
    kernels = kernels_of(backend, "grouped_gemm_forward", x, w.dtype, w.shape[1])
    return kernels.grouped_gemm_forward(rows(x), matrices(w), offs.contiguous())


def _grouped_gemm_backward_fake(
    dy: Tensor, x: Tensor, w: Tensor, offs: Tensor, need_x: bool, need_w: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape) if need_x else _nothing(x)
    return dx, w.new_empty(w.shape) if need_w else _nothing(w)


@operator(_grouped_gemm_backward_fake)
def grouped_gemm_backward(
    dy: Tensor, x: Tensor, w: Tensor, offs: Tensor, need_x: bool, need_w: bool, backend: str
) -> tuple[Tensor, Tensor]:
    kernels = kernels_of(backend, "grouped_gemm_backward", x, w.dtype, w.shape[1])
    dx, dw = kernels.grouped_gemm_backward(rows(dy), rows(x), matrices(w), offs.contiguous(), need_x, need_w)
    return _or_nothing(dx, x), _or_nothing(dw, w)


class GroupedGemmFunction(torch.autograd.Function):
    """grouped_gemm_forward, differentiable in x and w; saves its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, offs: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x, w, offs)
        ctx.backend = backend
        return grouped_gemm_forward(x, w, offs, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, offs = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        dx, dw = grouped_gemm_backward(dy, x, w, offs, need_x, need_w, ctx.backend)
        return dx if need_x else None, dw if need_w else None, None, None


# ---- the experts --------------------------------------------------------------------------------------------------


def _moe_mlp_forward_fake(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    weights: Tensor,
    experts: Tensor,
    interleaved: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = experts.numel()
    return (
        x.new_empty(x.shape),
        x.new_empty(pairs, gate_up.shape[1]) if save else _nothing(x),
        x.new_empty(pairs, dtype=torch.int32),
        x.new_empty(experts.shape, dtype=torch.int32),
        x.new_empty(gate_up.shape[0], dtype=torch.int32),
    )


@operator(_moe_mlp_forward_fake)
def moe_mlp_forward(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    weights: Tensor,
    experts: Tensor,
    interleaved: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, then what the backward wants: h, and the routing."""
    E, _, F = down.shape
    if check_values(x):
        validation.moe_mlp_values(experts, E)
    kernels = kernels_of(backend, "moe_mlp_forward", x, down.dtype, F)
    if experts.dtype == torch.int64:  # beyond 32 bits is out of range too
        experts = experts.clamp(-1, E)
    experts = experts.to(torch.int32).contiguous()
    sorting = kernels_of(backend, "moe_sort", experts, weights.dtype, E)
    routing = Routing(*sorting.moe_sort(experts, E))
    y, h = kernels.moe_mlp_forward(
        rows(x),
        Expert(matrices(gate_up), dense(gate_up_scale)),
        Expert(matrices(down), dense(down_scale)),
        weights.to(accumulation_dtype(x.dtype)).contiguous(),
        routing,
        interleaved,
        save,
    )
    return y, _or_nothing(h, x), *routing


def _moe_mlp_backward_fake(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    h: Tensor,
    order: Tensor,
    position: Tensor,
    offs: Tensor,
    interleaved: bool,
    need_x: bool,
    need_gate_up: bool,
    need_down: bool,
    need_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = need_x, need_gate_up, need_down, need_weights
    dx, dgate_up, ddown, dweights = (
        t.new_empty(t.shape) if need else _nothing(t)
        for t, need in zip((x, gate_up, down, weights), needs, strict=True)
    )
    return dx, dgate_up, ddown, dweights


@operator(_moe_mlp_backward_fake)
def moe_mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    h: Tensor,
    order: Tensor,
    position: Tensor,
    offs: Tensor,
    interleaved: bool,
    need_x: bool,
    need_gate_up: bool,
    need_down: bool,
    need_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = kernels_of(backend, "moe_mlp_backward", x, down.dtype, down.shape[2])
    dx, dgate_up, ddown, dweights = kernels.moe_mlp_backward(
        rows(dy),
        rows(x),
        matrices(gate_up),
        matrices(down),
        weights.to(accumulation_dtype(x.dtype)).contiguous(),
        Routing(order, position, offs),
        h,
        interleaved,
        need_x,
        need_gate_up,
        need_down,
        need_weights,
    )
    if dweights is not None:
        dweights = dweights.to(weights.dtype)
    given = (dx, x), (dgate_up, gate_up), (ddown, down), (dweights, weights)
    return tuple(_or_nothing(*pair) for pair in given)  # type: ignore[return-value]


class MoeMlpFunction(torch.autograd.Function):
    """moe_mlp_forward, differentiable in x, gate_up, down and weights; saves its inputs, the pre-activation and the
    integers of the routing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        experts: Tensor,
        interleaved: bool,
        backend: str,
    ) -> Tensor:
        y, *kept = moe_mlp_forward(x, gate_up, None, down, None, weights, experts, interleaved, True, backend)
        ctx.save_for_backward(x, gate_up, down, weights, *kept)
        ctx.interleaved, ctx.backend = interleaved, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        grads = moe_mlp_backward(dy, *ctx.saved_tensors, ctx.interleaved, *needs, ctx.backend)  # type: ignore[call-arg]
        found = (dx if need else None for dx, need in zip(grads, needs, strict=True))
        return *found, None, None, None
