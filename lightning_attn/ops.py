"""The operators as torch.library knows them, and their gradients.

One operator per raw backend function (`backends/__init__.py`). Each checks the values that its kernel relies
on, chooses the backend, brings the tensors into the layout that kernels take, and makes one call. The choice
is made here because torch.compile does not look into operators: a compiled graph chooses when it runs, as
eager code does.
"""

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from . import backends, dispatch, validation
from .dispatch import accumulation_dtype

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("lightning_attn", "DEF")


def _operator(
    fake: Callable[P, R], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers the decorated function as the operator of its name and signature, for tensors of any device.

    `fake` gives the outputs' shapes and dtypes; outputs are contiguous and never alias an input.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        _library.define(
            torch.library.infer_schema(function, op_name=name, mutates_args=mutates),
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lightning_attn::{name}", fake, lib=_library)
        return cast(Callable[P, R], getattr(torch.ops.lightning_attn, name).default)

    return register


def _kernels(backend: str, op: str, x: Tensor, state_dtype: torch.dtype, V: int) -> ModuleType:
    """The backend that runs the raw function `op` on x [..., K]."""
    if backend == "auto":
        backend = os.environ.get("LIGHTNING_ATTN_BACKEND") or "auto"
    return _resolve(backend, dispatch.Spec(op, x.device.type, x.dtype, state_dtype, x.shape[-1], V))


@functools.lru_cache(maxsize=1024)
def _resolve(backend: str, spec: dispatch.Spec) -> ModuleType:
    return backends.load(dispatch.resolve(backend, spec, backends.supports))


def _check_values(x: Tensor) -> bool:
    # On a GPU the checks would wait for the device.
    return x.is_cpu or os.environ.get("LIGHTNING_ATTN_CHECK") == "1"


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension; kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


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


@_operator(_attention_forward_fake)
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
    if _check_values(q):
        validation.attention_values("lightning_attention", decay, cu_seqlens, q.shape[1])
    kernels = _kernels(backend, "attention_forward", q, accumulation_dtype(q.dtype), v.shape[3])
    o, state = kernels.attention_forward(
        _rows(q),
        _rows(k),
        _rows(v),
        _dense(decay),
        scale,
        _dense(initial_state),
        _dense(cu_seqlens),
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


@_operator(_attention_backward_fake)
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
    if _check_values(q):
        validation.attention_values("lightning_attention", decay, cu_seqlens, q.shape[1])
    kernels = _kernels(backend, "attention_backward", q, accumulation_dtype(q.dtype), v.shape[3])
    do, q, k, v = _rows(do), _rows(q), _rows(k), _rows(v)
    dq, dk, dv, dinitial_state = kernels.attention_backward(
        do, _dense(dstate), q, k, v, _dense(decay), scale, _dense(initial_state), _dense(cu_seqlens)
    )
    return dq, dk, dv, _no_state(q) if dinitial_state is None else dinitial_state


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


@_operator(_attention_decode_fake, mutates=("state",))
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
    if _check_values(q):
        validation.decode_values("lightning_attention_decode", decay, slots, state.shape[0])
    kernels = _kernels(backend, "attention_decode", q, state.dtype, v.shape[3])
    o = kernels.attention_decode(_rows(q), _rows(k), _rows(v), _dense(decay), state, _dense(slots), scale)
    if not state.is_inference():
        # A kernel writes through a raw pointer: tell autograd, which may have saved the state for a backward.
        torch.autograd.graph.increment_version(state)
    return o


def _gated_rms_norm_forward_fake(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))


@_operator(_gated_rms_norm_forward_fake)
def gated_rms_norm_forward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    kernels = _kernels(backend, "gated_rms_norm_forward", x, weight.dtype, x.shape[-1])
    return kernels.gated_rms_norm_forward(_rows(x), _rows(gate), _dense(weight), eps)


def _gated_rms_norm_backward_fake(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


@_operator(_gated_rms_norm_backward_fake)
def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels(backend, "gated_rms_norm_backward", x, weight.dtype, x.shape[-1])
    return kernels.gated_rms_norm_backward(_rows(dy), _rows(x), _rows(gate), _dense(weight), _dense(rstd))


class _NotTwice(torch.autograd.Function):
    """The first `count` tensors, gradients, as a function of all of them that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("lightning_attn: expected gradients to be taken once, got a second derivative")


def _once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
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
    @_once_differentiable
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


class GatedRMSNormFunction(torch.autograd.Function):
    """gated_rms_norm_forward, differentiable in x, gate and weight; saves its inputs and a number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
        y, rstd = gated_rms_norm_forward(x, gate, weight, eps, backend)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.backend = backend
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, rstd = ctx.saved_tensors
        dx, dgate, dweight = gated_rms_norm_backward(dy, x, gate, weight, rstd, ctx.backend)
        return dx, dgate, dweight, None, None
