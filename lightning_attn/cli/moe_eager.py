"""The mixture of experts in plain PyTorch: a loop over the experts that have tokens, as it is usually written
(transformers' `MiniMaxExperts`), differentiated by autograd. It is the baseline of the error rule, and a peer.

An expert that is not in the range, which only a sample has (`moe_cases`), adds nothing.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_attn.dispatch import accumulation_dtype

from .eager import Function

Matrices = Tensor | tuple[Tensor, Tensor]  # of each expert; or int8 with a scale for each row


def route(logits: Tensor, top_k: int, *, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    p = torch.softmax(logits.to(accumulation_dtype(logits.dtype)), -1)
    weights, experts = torch.topk(p, top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, experts.to(torch.int32)


def route_stable(logits: Tensor, top_k: int, *, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """The same where logits are equal, of which topk may take any."""
    p = torch.softmax(logits.to(accumulation_dtype(logits.dtype)), -1)
    weights, experts = (x[:, :top_k] for x in p.sort(dim=-1, descending=True, stable=True))
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, experts.to(torch.int32)


def grouped_gemm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    groups = zip(pairwise([0, *offs.tolist()]), w.unbind(), strict=True)
    return torch.cat([F.linear(x[a:b], matrix) for (a, b), matrix in groups])


def moe_mlp(
    x: Tensor, gate_up: Matrices, down: Matrices, weights: Tensor, experts: Tensor, *, layout: str
) -> Tensor:
    y = torch.zeros_like(x)
    pairs = zip(_each(gate_up, x.dtype), _each(down, x.dtype), strict=True)
    for e, (gate_up_, down_) in enumerate(pairs):
        token, j = torch.where(experts == e)
        if not len(token):
            continue
        gate, up = halves(F.linear(x[token], gate_up_()), layout)
        z = F.linear(F.silu(gate) * up, down_()) * weights[token, j, None]
        y.index_add_(0, token, z.to(y.dtype))
    return y


def moe(
    x: Tensor,
    gate: Tensor,
    gate_up: Matrices,
    down: Matrices,
    *,
    top_k: int,
    number: Tensor | None = None,
    route: Function = route,
    moe_mlp: Function = moe_mlp,
    linear: Function = F.linear,
) -> Tensor:
    """The module SparseMoE: gate, routing, experts. `number` [E], in a sample: where each expert's matrices are."""
    weights, experts = route(linear(x, gate), top_k)
    if number is not None:
        experts = number[experts.long()]
    return moe_mlp(x, gate_up, down, weights, experts, layout="concatenated")


def halves(h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Of the gate and of the up projection."""
    if layout == "interleaved":
        return h[..., 0::2], h[..., 1::2]
    gate, up = h.chunk(2, -1)
    return gate, up


def _each(w: Matrices, dtype: torch.dtype) -> list[Function]:
    """Gives the matrix of each expert, int8 ones by their scales, rounded to `dtype`."""
    if isinstance(w, Tensor):
        return [lambda m=m: m for m in w.unbind()]
    wide = w[1].to(accumulation_dtype(dtype))
    return [lambda q=q, s=s: (q * s[:, None]).to(dtype) for q, s in zip(w[0], wide, strict=True)]
