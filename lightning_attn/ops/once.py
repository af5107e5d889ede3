"""Gradients that can be taken once, and say so when they are taken twice."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _NotTwice(torch.autograd.Function):
    """The first `count` tensors, gradients, as a function of all of them that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("lightning_attn: expected gradients to be taken once, got a second derivative")


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """PyTorch's decorator of this name looks at the incoming gradients only: of o.sum() they are constants,
    and a gradient penalty would silently be left out. This one looks at the saved tensors too.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        sources = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        found = [x for x in outputs if x is not None]
        marked = iter(_NotTwice.apply(len(found), *found, *sources))
        return tuple(x if x is None else next(marked) for x in outputs)

    return run
