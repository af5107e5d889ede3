"""Blocks of softmax attention, each with the logarithm of its sum, and what becomes of several of them.

    s_ij = scale * q_i . k_j      lse_i = log sum_j e^{s_ij}      o_i = sum_j e^{s_ij - lse_i} v_j

Over disjoint sets of keys lse = log sum_b e^{lse_b} and o = sum_b e^{lse_b - lse} o_b (as in ring attention, arXiv 2310.01889,
and FlashAttention-2, arXiv 2307.08691). With the lse and o of all keys the gradients of each set are exact by themselves:

    p_ij = e^{s_ij - lse_i}      ds_ij = p_ij (do_i . v_j - do_i . o_i)
    dq_i = scale * sum_j ds_ij k_j      dk_j = scale * sum_i ds_ij q_i      dv_j = sum_i p_ij do_i
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends.raw import raw
from ..dispatch import accumulation_dtype

_aten = torch.ops.aten
_TILE = 2**24  # scores at a time where no fused kernel is


@raw
def attend(
    o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, count: int
) -> None:
    """Adds the keys of a block to what its queries have seen: o [count * n, H, D_v] and lse [count * n, H], in the dtype of
    accumulation; at first o = 0 and lse = -inf. q [count * n, H, D], k [count * m, G, D], v [count * m, G, D_v].
    """
    groups, width = k.shape[1], _width(q, v)
    q, k, v = (_pad(x, width) for x in (q, k, v))
    for to_o, to_lse, q_, k_, v_ in _calls(count, groups, o, lse, q, k, v):
        block_o, block_lse = _forward(q_, _spread(k_, q_), _spread(v_, q_), causal, scale)
        both = torch.logaddexp(to_lse, block_lse)
        to_o.mul_((to_lse - both).exp_()[..., None])
        to_o.addcmul_(block_o[..., : o.shape[-1]].to(o.dtype), (block_lse - both).exp_()[..., None])
        to_lse.copy_(both)


@raw
def attend_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    causal: bool, scale: float, count: int,
) -> None:  # fmt: skip
    """Adds the gradients of a block to dq, dk and dv, in the dtype of accumulation and of the shapes of q, k and v; o and lse
    are those of all keys.
    """
    groups, width = k.shape[1], _width(q, v)
    do, q, k, v, o = (_pad(x, width) for x in (do, q, k, v, o))
    for to_dq, to_dk, to_dv, do_, q_, k_, v_, o_, lse_ in _calls(
        count, groups, dq, dk, dv, do, q, k, v, o, lse
    ):
        grads = _backward(do_, q_, _spread(k_, q_), _spread(v_, q_), o_, lse_, causal, scale)
        to_dq.add_(grads[0][..., : dq.shape[-1]])
        for to, x in ((to_dk, grads[1]), (to_dv, grads[2])):
            to.add_(x[..., : to.shape[-1]].sum(1, keepdim=True, dtype=to.dtype))


def _calls(count: int, groups: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """[count * n, G * M, ...] -> views [batch, M, n, ...] of kernel calls in which a batch has one head of keys: the G heads
    of one document, or the same head of all documents. (For one call the strides of both cannot be had.)
    """
    split = [x.unflatten(1, (groups, -1)) for x in tensors]  # [count * n, G, M, ...]
    if count == 1:
        yield tuple(x.movedim(0, 2) for x in split)
        return
    documents = [x.unflatten(0, (count, -1)) for x in split]  # [count, n, G, M, ...]
    for g in range(groups):
        yield tuple(x[:, :, g].movedim(1, 2) for x in documents)


def _spread(x: Tensor, q: Tensor) -> Tensor:
    """One head of keys or values for every query head of its group, without copies."""
    return x.expand(-1, q.shape[1], -1, -1)


def _width(q: Tensor, v: Tensor) -> int:
    """Of the heads that the fused kernel wants: one for q, k and v; on a GPU, multiples of 8. 0: as they are."""
    kernel, widest = _kernel(q, v), max(q.shape[-1], v.shape[-1])
    if kernel is None:
        return 0
    return -(-widest // 8) * 8 if kernel == "cuda" else widest


def _pad(x: Tensor, width: int) -> Tensor:
    return pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def _kernel(q: Tensor, v: Tensor) -> str | None:
    """PyTorch's fused kernel for such tensors, if there is one."""
    if q.device.type == "cpu":
        return "cpu"
    fits = q.dtype in (torch.bfloat16, torch.float16) and max(q.shape[-1], v.shape[-1]) <= 256
    if q.device.type == "cuda" and fits and torch.cuda.get_device_capability(q.device) >= (8, 0):
        return "cuda"
    return None


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """[batch, heads, n, D] -> o [batch, heads, n, D_v], lse [batch, heads, n]."""
    if scale <= 0:
        return _forward(q * _sign(scale), k, v, causal, abs(scale) or 1.0)
    kernel = _kernel(q, v)
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if kernel == "cuda":
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return _forward_tiles(q, k, v, causal, scale)


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, heads, ...] -> dq, dk, dv, each query head with its own dk and dv."""
    if scale <= 0:
        sign = _sign(scale)
        dq, dk, dv = _backward(do, q * sign, k, v, o, lse, causal, abs(scale) or 1.0)
        return dq * sign, dk, dv
    kernel = _kernel(q, v)
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, causal, scale=scale
        )
    if kernel == "cuda":
        n, m = q.shape[2], k.shape[2]
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of dropout
        return _aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse.contiguous(), None, None, n, m, 0.0, causal, unused, unused, scale=scale
        )
    return _backward_tiles(do, q, k, v, o, lse, causal, scale)


def _sign(scale: float) -> int:
    """The fused kernels multiply by the scale after masking with -inf, so only a positive one is given to them."""
    return (scale > 0) - (scale < 0)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """s for some rows at a time, [batch, heads, rows, m], in the dtype of accumulation; what a row does not see is -inf."""
    n, m, dtype = q.shape[2], k.shape[2], accumulation_dtype(q.dtype)
    rows = max(_TILE // (q.shape[0] * q.shape[1] * m), 1)
    for i in range(0, n, rows):
        tile = slice(i, min(i + rows, n))
        s = q[:, :, tile].to(dtype) @ k.to(dtype).mT * scale
        if causal:
            future = torch.ones(s.shape[2:], dtype=torch.bool, device=q.device).triu_(i + 1)
            s.masked_fill_(future, -torch.inf)
        yield tile, s


def _forward_tiles(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    o = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    for tile, s in _scores(q, k, causal, scale):
        lse[:, :, tile] = s.logsumexp(-1)
        o[:, :, tile] = (s - lse[:, :, tile, None]).exp_() @ v.to(dtype)
    return o, lse


def _backward_tiles(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in (q, k, v))
    for tile, s in _scores(q, k, causal, scale):
        p = (s - lse[:, :, tile, None]).exp_()
        do_, o_ = do[:, :, tile].to(dtype), o[:, :, tile].to(dtype)
        ds = p * (do_ @ v.to(dtype).mT - (do_ * o_).sum(-1, keepdim=True)) * scale
        dq[:, :, tile] = ds @ k.to(dtype)
        dk += ds.mT @ q[:, :, tile].to(dtype)
        dv += p.mT @ do_
    return dq, dk, dv
