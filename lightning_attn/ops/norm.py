"""The gated RMS norm as torch.library knows it, and its gradients."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype
from .once import once_differentiable
from .registry import dense, kernels_of, operator, rows


def _gated_rms_norm_forward_fake(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))


@operator(_gated_rms_norm_forward_fake)
def gated_rms_norm_forward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    kernels = kernels_of(backend, "gated_rms_norm_forward", x, weight.dtype, x.shape[-1])
    return kernels.gated_rms_norm_forward(rows(x), rows(gate), dense(weight), eps)


def _gated_rms_norm_backward_fake(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


@operator(_gated_rms_norm_backward_fake)
def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = kernels_of(backend, "gated_rms_norm_backward", x, weight.dtype, x.shape[-1])
    return kernels.gated_rms_norm_backward(rows(dy), rows(x), rows(gate), dense(weight), dense(rstd))


class GatedRMSNormFunction(torch.autograd.Function):
    """gated_rms_norm_forward, differentiable in x, gate and weight; saves its inputs and a number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
        y, rstd = gated_rms_norm_forward(x, gate, weight, eps, backend)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, rstd = ctx.saved_tensors
        dx, dgate, dweight = gated_rms_norm_backward(dy, x, gate, weight, rstd, ctx.backend)
        return dx, dgate, dweight, None, None
