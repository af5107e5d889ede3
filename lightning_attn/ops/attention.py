"""Attention and decode as torch.library knows them, and the gradients of attention."""

from typing import Any

import torch
from torch import Tensor

from .. import validation
from ..dispatch import accumulation_dtype
from .once import once_differentiable
from .registry import check_values, dense, kernels_of, operator, rows


def _state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((N, q.shape[2], q.shape[3], v.shape[3]), dtype=accumulation_dtype(q.dtype))


def _no_state(q: Tensor) -> Tensor:
    """Stands for a state that was not asked for: an operator returns tensors only."""
    return q.new_empty(0, dtype=accumulation_dtype(q.dtype))


def _attention_forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _state(q, v, cu_seqlens) if return_state else _no_state(q)


@operator(_attention_forward_fake)
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if check_values(q):
        validation.attention_values("lightning_attention", decay, cu_seqlens, q.shape[1])
    kernels = kernels_of(backend, "attention_forward", q, accumulation_dtype(q.dtype), v.shape[3])
    o, state = kernels.attention_forward(
        rows(q),
        rows(k),
        rows(v),
        dense(decay),
        scale,
        dense(initial_state),
        dense(cu_seqlens),
        return_state,
    )
    return o, _no_state(q) if state is None else state


def _attention_backward_fake(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dinitial_state = _no_state(q) if initial_state is None else _state(q, v, cu_seqlens)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dinitial_state


@operator(_attention_backward_fake)
def attention_backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if check_values(q):
        validation.attention_values("lightning_attention", decay, cu_seqlens, q.shape[1])
    kernels = kernels_of(backend, "attention_backward", q, accumulation_dtype(q.dtype), v.shape[3])
    do, q, k, v = rows(do), rows(q), rows(k), rows(v)
    dq, dk, dv, dinitial_state = kernels.attention_backward(
        do, dense(dstate), q, k, v, dense(decay), scale, dense(initial_state), dense(cu_seqlens)
    )
    return dq, dk, dv, _no_state(q) if dinitial_state is None else dinitial_state


def _attention_state_fake(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> Tensor:
    return _state(k, v, None)


@operator(_attention_state_fake)
def attention_state(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> Tensor:
    if check_values(k):
        validation.attention_values("lightning_attention", decay, None, k.shape[1])
    kernels = kernels_of(backend, "attention_state", k, accumulation_dtype(k.dtype), v.shape[3])
    return kernels.attention_state(rows(k), rows(v), dense(decay), scale, dense(initial_state), reverse)


def _attention_history_fake(
    x: Tensor, state: Tensor, decay: Tensor, scale: float, reverse: bool, out: Tensor, backend: str
) -> None:
    return None


@operator(_attention_history_fake, mutates=("out",))
def attention_history(
    x: Tensor, state: Tensor, decay: Tensor, scale: float, reverse: bool, out: Tensor, backend: str
) -> None:
    """`out` has a contiguous last dimension, and any other strides."""
    if check_values(x):
        validation.attention_values("lightning_attention", decay, None, x.shape[1])
    kernels = kernels_of(backend, "attention_history", x, accumulation_dtype(x.dtype), out.shape[3])
    kernels.attention_history(rows(x), state.contiguous(), dense(decay), scale, reverse, out)
    if not out.is_inference():  # as in attention_decode
        torch.autograd.graph.increment_version(out)


def _attention_decode_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    return v.new_empty(v.shape)


@operator(_attention_decode_fake, mutates=("state",))
def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    if check_values(q):
        validation.decode_values("lightning_attention_decode", decay, slots, state.shape[0])
    kernels = kernels_of(backend, "attention_decode", q, state.dtype, v.shape[3])
    o = kernels.attention_decode(rows(q), rows(k), rows(v), dense(decay), state, dense(slots), scale)
    if not state.is_inference():
        # A kernel writes through a raw pointer: tell autograd, which may have saved the state for a backward.
        torch.autograd.graph.increment_version(state)
    return o


class AttentionFunction(torch.autograd.Function):
    """attention_forward, differentiable in q, k, v and initial_state; saves nothing but inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        scale: float,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, decay, initial_state, cu_seqlens)
        ctx.scale, ctx.return_state, ctx.backend = scale, return_state, backend
        return attention_forward(q, k, v, decay, scale, initial_state, cu_seqlens, return_state, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, decay, initial_state, cu_seqlens = ctx.saved_tensors
        if do is None:
            do = v.new_zeros(v.shape)
        if not ctx.return_state:  # torch.compile may give the empty stand-in for the state a gradient
            dstate = None
        dq, dk, dv, dinitial_state = attention_backward(
            do, dstate, q, k, v, decay, ctx.scale, initial_state, cu_seqlens, ctx.backend
        )
        dinitial = dinitial_state if initial_state is not None else None
        return dq, dk, dv, None, None, dinitial, None, None, None
