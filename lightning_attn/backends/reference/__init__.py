"""The definition, in plain PyTorch: any device, floating dtype, head dimension and decay.

    S_t = e^{-s} S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

(arXiv 2501.08313). `recurrence`, `quadratic` and `block_form` are the same function written three ways, each
differentiable by autograd:

    q, k [B, T, H, K], v [B, T, H, V], decay [H] float32, initial_state [N, H, K, V] float32 or None,
    cu_seqlens [N+1] or None (then N = B)  ->  o [B, T, H, V] in v's dtype, state [N, H, K, V] float32

with float64 in place of float32 for float64 inputs. The remaining functions are this backend's raw interface.
"""

import functools
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ...dispatch import Spec, accumulation_dtype
from ..raw import raw
from .moe import (
    grouped_gemm_backward,
    grouped_gemm_forward,
    moe_mlp_backward,
    moe_mlp_forward,
    moe_route_backward,
    moe_route_forward,
    moe_sort,
)

__all__ = [
    "attention_backward",
    "attention_decode",
    "attention_forward",
    "attention_history",
    "attention_state",
    "block_form",
    "gated_rms_norm_backward",
    "gated_rms_norm_forward",
    "grouped_gemm_backward",
    "grouped_gemm_forward",
    "moe_mlp_backward",
    "moe_mlp_forward",
    "moe_route_backward",
    "moe_route_forward",
    "moe_sort",
    "quadratic",
    "recurrence",
    "supports",
    "unavailable",
]

_BLOCK = 64  # of the raw functions, which compute in the accumulation dtype
_HISTORY = 2048  # tokens at a time: bounds the memory


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token, in the accumulation dtype."""
    return _per_document(_recurrence, q, k, v, decay, scale, initial_state, cu_seqlens, upcast=True)


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All pairs of tokens at once, in the accumulation dtype."""
    return _per_document(_quadratic, q, k, v, decay, scale, initial_state, cu_seqlens, upcast=True)


def block_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    block_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Block by block, the usual eager code: matmuls in the inputs' dtype, decays and state in float32."""
    blocks = functools.partial(_blocks, block_size=block_size)
    return _per_document(blocks, q, k, v, decay, scale, initial_state, cu_seqlens, upcast=False)


def unavailable() -> str | None:
    return None


def supports(spec: Spec) -> list[str]:
    return []


@raw
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    acc = accumulation_dtype(q.dtype)
    decay = decay.to(acc)
    o = v.new_empty(v.shape)
    state = _state(q, v, initial_state, cu_seqlens)
    for t, n in _batches(cu_seqlens):
        q_, k_, v_ = (x[:, t].to(acc) for x in (q, k, v))
        o[:, t], state[n] = _blocks(q_ * scale, k_, v_, decay, state[n], _BLOCK)
    return o, state if return_state else None


@raw
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    acc = accumulation_dtype(q.dtype)
    decay = decay.to(acc)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    state = _state(q, v, initial_state, cu_seqlens)
    dstate = _state(q, v, dstate, cu_seqlens)
    for t, n in _batches(cu_seqlens):
        q_, k_, v_, do_ = (x[:, t].to(acc) for x in (q, k, v, do))
        do_ = do_ * scale
        # dQ is the forward of (dO, V, K). dK and dV are forwards in reversed time, where the gradient of the
        # state stands at the token that reads it (lag 1): nothing is ever divided by a decay.
        dq[:, t], _ = _blocks(do_, v_, k_, decay, state[n].mT, _BLOCK)
        q_, k_, v_, do_ = (x.flip(1) for x in (q_, k_, v_, do_))
        reverse_dk, _ = _blocks(v_, do_, q_, decay, dstate[n].mT, _BLOCK, lag=1)
        reverse_dv, dstate[n] = _blocks(k_, q_, do_, decay, dstate[n], _BLOCK, lag=1)
        dk[:, t], dv[:, t] = reverse_dk.flip(1), reverse_dv.flip(1)
    return dq, dk, dv, None if initial_state is None else dstate


@raw
def attention_state(
    k: Tensor, v: Tensor, decay: Tensor, scale: float, initial_state: Tensor | None, reverse: bool
) -> Tensor:
    acc = accumulation_dtype(k.dtype)
    s = decay.to(acc)[:, None, None]
    state = _state(k, v, initial_state, None)
    starts = range(0, k.shape[1], _BLOCK)
    for start in reversed(starts) if reverse else starts:
        k_, v_ = (x[:, start : start + _BLOCK].to(acc).transpose(1, 2) for x in (k, v))  # [B, H, m, D]
        m = k_.shape[2]
        i = torch.arange(m, device=k.device)[:, None]
        weights = torch.exp(-s * (i + 1 if reverse else m - 1 - i))  # [H, m, 1]
        state = torch.exp(-s * m) * state + scale * ((k_ * weights).mT @ v_)
    return state


@raw
def attention_history(
    x: Tensor, state: Tensor, decay: Tensor, scale: float, reverse: bool, out: Tensor
) -> None:
    acc = accumulation_dtype(x.dtype)
    T, tiny = x.shape[1], torch.finfo(acc).smallest_normal
    for start in range(0, T, _HISTORY):
        t = torch.arange(start, min(start + _HISTORY, T), device=x.device)
        distance = T - 1 - t if reverse else t + 1
        weight = torch.exp(-decay.to(acc)[:, None] * distance)  # [H, n]
        weight = torch.where(
            weight < tiny, 0, weight
        )  # subnormal numbers are slow, and vanish beside a weight of 1
        tokens = slice(start, start + _HISTORY)
        rows = x[:, tokens].to(acc).transpose(1, 2) * (scale * weight[..., None])  # [B, H, n, K]
        out[:, tokens] = (out[:, tokens].to(acc) + (rows @ state).transpose(1, 2)).to(out.dtype)


@raw
def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    acc = accumulation_dtype(q.dtype)
    o = v.new_zeros(v.shape)
    if slots is None:
        rows = slots = torch.arange(q.shape[0], device=q.device)
    else:
        rows = ((slots >= 0) & (slots < state.shape[0])).nonzero().squeeze(1)  # padding has no row
        slots = slots[rows]
    q_, k_, v_ = (x[rows].to(acc) for x in (q, k, v))
    o_, state_ = _recurrence(q_ * scale, k_, v_, decay.to(acc), state[slots].to(acc))
    o[rows] = o_.to(o.dtype)
    state[slots] = state_.to(state.dtype)
    return o


@raw
def gated_rms_norm_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(x.dtype)
    x_ = x.to(acc)
    rstd = torch.rsqrt(x_.square().mean(-1) + eps)
    y = x_ * rstd.unsqueeze(-1) * weight.to(acc) * gate.to(acc).sigmoid()
    return y.to(x.dtype).contiguous(), rstd


@raw
def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(x.dtype)
    dy_, w, g = dy.to(acc), weight.to(acc), gate.to(acc).sigmoid()
    r = rstd.unsqueeze(-1)
    n = x.to(acc) * r  # normalised rows
    dn = dy_ * w * g
    dx = r * (dn - n * (dn * n).mean(-1, keepdim=True))
    dgate = dn * n * (1 - g)
    dweight = (dy_ * n * g).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dgate.to(gate.dtype).contiguous(), dweight.to(weight.dtype)


def _recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One dense batch in the accumulation dtype."""
    carry = torch.exp(-decay)[:, None, None]  # [H, 1, 1]
    outputs = []
    for t in range(q.shape[1]):
        state = carry * state + k[:, t, :, :, None] * v[:, t, :, None, :]  # [B, H, K, V]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))  # [B, H, V]
    o = torch.stack(outputs, 1) if outputs else torch.zeros_like(v)
    return o, state


def _quadratic(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One dense batch in the accumulation dtype."""
    T = q.shape[1]
    i = torch.arange(T, device=q.device)
    s = decay[:, None]
    pairs = torch.exp(-s[:, None] * (i[:, None] - i).clamp(min=0)).tril()  # [H, T, T]
    o = torch.einsum("bihk,bjhk,hij,bjhv->bihv", q, k, pairs, v)
    o = o + torch.einsum("bihk,hi,bhkv->bihv", q, torch.exp(-s * (i + 1)), state)
    new = torch.einsum("bjhk,hj,bjhv->bhkv", k, torch.exp(-s * (T - 1 - i)), v)
    return o, torch.exp(-s * T)[..., None] * state + new


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, block_size: int, lag: int = 0
) -> tuple[Tensor, Tensor]:
    """One dense batch in blocks: matmuls in q's dtype, decay and state in the accumulation dtype.

    lag 0: `state` stands before the first token, which reads it through e^{-s}. lag 1 (the backward): `state`
    stands at the first token, which reads it whole; what the block adds to it is decayed once more instead.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    T, C = q.shape[2], max(min(block_size, q.shape[2]), 1)

    # Distances are integers and every exponent is <= 0: nothing overflows, whatever the decay.
    i = torch.arange(C, device=q.device)
    s = decay[:, None, None]
    pairs = torch.exp(-s * (i[:, None] - i).clamp(min=0)).tril().to(q.dtype)  # [H, C, C]
    to_state = torch.exp(-s * (i[:, None] + 1 - lag)).to(q.dtype)  # [H, C, 1]
    from_key = torch.exp(-s * (C - 1 - i[:, None] + lag)).to(q.dtype)  # [H, C, 1]

    outputs = [v[:, :, :0]]
    for start in range(0, T, C):
        q_, k_, v_ = (x[:, :, start : start + C] for x in (q, k, v))
        m = q_.shape[2]  # C, or fewer in the last block
        inner = ((q_ @ k_.mT) * pairs[:, :m, :m]) @ v_
        outputs.append(inner + (q_ * to_state[:, :m]) @ state.to(q.dtype))
        state = torch.exp(-s * m) * state + (k_ * from_key[:, C - m :]).mT @ v_
    return torch.cat(outputs, 2).transpose(1, 2), state


def _per_document(
    form: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    upcast: bool,
) -> tuple[Tensor, Tensor]:
    """`form`, which knows dense batches only, over every document."""
    acc, dtype = accumulation_dtype(q.dtype), v.dtype
    decay = decay.to(acc)
    if upcast:
        q, k, v = (x.to(acc) for x in (q, k, v))
    if scale != 1:
        q = q * scale
    state = _state(q, v, initial_state, cu_seqlens)
    if cu_seqlens is None:
        o, state = form(q, k, v, decay, state)
        return o.to(dtype), state
    outputs, states = [v[:, :0]], [state[:0]]  # so that there is something to concatenate when N = 0
    for t, n in _batches(cu_seqlens):
        o, last = form(q[:, t], k[:, t], v[:, t], decay, state[n])
        outputs.append(o)
        states.append(last)
    return torch.cat(outputs, 1).to(dtype), torch.cat(states)


def _batches(cu_seqlens: Tensor | None) -> list[tuple[slice, slice]]:
    """For each document, or for a whole dense batch: the slice of its tokens, and that of its states."""
    if cu_seqlens is None:
        return [(slice(None), slice(None))]
    return [(slice(a, b), slice(n, n + 1)) for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))]


def _state(q: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """A state of our own to start from: a copy of `state`, or zeros."""
    acc = accumulation_dtype(q.dtype)
    if state is not None:
        return state.to(acc, copy=True)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_zeros(N, q.shape[2], q.shape[3], v.shape[3], dtype=acc)
