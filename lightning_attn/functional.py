"""The public functions: validate, then call one operator."""

import torch
from torch import Tensor

from . import ops, validation
from .autocast import autocast


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention with a fixed exponential decay per head (lightning attention, arXiv 2501.08313).

        S_t = e^{-s} S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

    so a token at distance n weighs e^{-s n} and the current token 1. Differentiable once in q, k, v and
    initial_state, through o and the state; nothing but the inputs is kept for the backward. Inputs are taken to
    be finite: a NaN or an infinity may also reach the outputs of earlier tokens of its block of 64.

    Args:
        q, k: [B, T, H, K], float32, bfloat16, float16 or float64. Any strides; a copy is made only if the
            last dimension is not contiguous.
        v: [B, T, H, V], of q's dtype.
        decay: [H] float32, finite and >= 0: the rate s of each head, a constant (see `lightning_attn.decay`).
        scale: a finite number.
        initial_state: [N, H, K, V] float32 (float64 with float64 inputs), any strides; None is zero. Never
            written to, nor aliased by the state that is returned.
        return_state: also return the state after the last token.
        cu_seqlens: [N + 1] int32 or int64, with B = 1: the token offsets of N packed sequences, each with its
            own state, from 0 to T and not decreasing (equal offsets: an empty sequence). Without it N = B.
        backend: "reference", "cpu", "triton" or "cuda", which runs or raises; or "auto", which means the
            backend in the environment variable LIGHTNING_ATTN_BACKEND, and without it the best that can run.

    Returns:
        o [B, T, H, V] in v's dtype; with return_state, (o, state) with state [N, H, K, V] as initial_state.

    Under autocast q, k and v are cast to its dtype (float64 is left alone); decay and states stay float32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, a decay that requires grad, a backend that cannot run. The
            values of decay and cu_seqlens are read on a CPU only, as reading waits for a device; elsewhere
            too if the environment variable LIGHTNING_ATTN_CHECK is 1.
    """
    validation.types("lightning_attention", backend, q=q, k=k, v=v, decay=decay)
    q, k, v = autocast(q, k, v)
    validation.attention(q, k, v, decay, scale, initial_state, cu_seqlens)
    if torch.compiler.is_compiling():  # it cannot trace an autograd.Function that is given one tensor twice
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
    arguments = q, k, v, decay, scale, initial_state, cu_seqlens, return_state, backend
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (initial_state is not None and initial_state.requires_grad)
    ):
        o, state = ops.AttentionFunction.apply(*arguments)
    else:
        o, state = ops.attention_forward(*arguments)
    return (o, state) if return_state else o


def lightning_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """`lightning_attention` for few new tokens (T = 1 typically), with the state updated in place.

        S_t = e^{-s} S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

    Not differentiable.

    Args:
        q, k, v, decay, scale, backend: as for `lightning_attention`.
        state: [S, H, K, V] float32 or bfloat16 (float64 with float64 inputs), read and written once
            whatever T is. Its [K, V] matrices are dense and do not overlap; the strides of S and H are free.
        slots: [B] int32 or int64, the row of `state` that belongs to each sequence, none twice. -1: padding,
            whose output is zero and which touches no state. None: row b belongs to sequence b, and S = B.

    Returns:
        o [B, T, H, V] in v's dtype.

    Raises:
        TypeError, ValueError: as for `lightning_attention`, with the state untouched; also if an input
            requires grad while grad mode is on.
    """
    validation.types("lightning_attention_decode", backend, q=q, k=k, v=v, decay=decay)
    q, k, v = autocast(q, k, v)
    validation.decode(q, k, v, decay, state, slots, scale)
    return ops.attention_decode(q, k, v, decay, state, slots, scale, backend)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """RMS norm over the last dimension with a sigmoid gate, the output norm of a lightning attention layer.

        y = x * rsqrt(mean(x^2) + eps) * weight * sigmoid(gate)

    computed in float32 (float64 for float64 inputs) and rounded once. Differentiable once in x, gate and
    weight.

    Args:
        x: [..., D], float32, bfloat16, float16 or float64.
        gate: x's shape and dtype.
        weight: [D], in x's dtype or float32.
        eps: a finite number > 0.
        backend: as for `lightning_attention`.

    Returns:
        y of x's shape and dtype. Under autocast x, gate and a 16-bit weight are cast to its dtype first.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or device; a backend that cannot run.
    """
    validation.types("gated_rms_norm", backend, x=x, gate=gate, weight=weight)
    x, gate = autocast(x, gate)
    if weight.dtype != torch.float32:
        (weight,) = autocast(weight)
    validation.gated_rms_norm(x, gate, weight, eps)
    if torch.compiler.is_compiling() and gate is x:  # as in lightning_attention
        gate = gate.view_as(gate)
    if torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad or weight.requires_grad):
        return ops.GatedRMSNormFunction.apply(x, gate, weight, eps, backend)
    return ops.gated_rms_norm_forward(x, gate, weight, eps, backend)[0]
