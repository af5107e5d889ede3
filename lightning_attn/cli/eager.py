"""The plain PyTorch version of every op: the usual way to write it, differentiated by autograd.

In the inputs' own dtype: the baseline of the error rule, and the peer "eager-256" of `bench --compare`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_attn.backends.reference import block_form

# A version of an op, with the op's own signature; attention gives (o, state), every other op its one output.
Function = Callable[..., Any]

attention: Function = partial(block_form, block_size=256)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float,
) -> Tensor:
    """Token by token: `S = e^{-s} S + k v^T; o = scale * S^T q`; state [S, H, K, V] is updated in place."""
    real = slice(None) if slots is None else slots >= 0
    s = state if slots is None else state[slots[real]]  # [B, H, K, V]; with slots a copy
    carry = torch.exp(-decay.to(torch.promote_types(s.dtype, torch.float32)))[:, None, None]  # [H, 1, 1]
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        q_, k_, v_ = (x[real, t].to(s.dtype) for x in (q, k, v))  # [B, H, D]
        s.mul_(carry).add_(k_[..., None] * v_[..., None, :])
        o[real, t] = (scale * (q_[..., None, :] @ s)).squeeze(-2).to(o.dtype)
    if slots is not None:
        state[slots[real]] = s
    return o


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm(x) * weight * sigmoid(gate) over the last dim: the norm in float32, the rest in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype) * torch.sigmoid(gate)


def layer(
    x: Tensor,
    qkv_proj: Tensor,
    output_gate: Tensor,
    norm: Tensor,
    out_proj: Tensor,
    *,
    decay: Tensor,
    eps: float,
    attention: Function = attention,
    gated_rms_norm: Function = gated_rms_norm,
) -> Tensor:
    """The module LightningAttention: x [B, T, hidden], weights as in the checkpoint -> [B, T, hidden]."""
    qkv = F.silu(F.linear(x, qkv_proj)).unflatten(-1, (decay.numel(), -1))  # [B, T, H, 3D]
    o, _ = attention(*qkv.chunk(3, dim=-1), decay)
    o = gated_rms_norm(o.flatten(-2), F.linear(x, output_gate), norm, eps=eps)
    return F.linear(o, out_proj)
