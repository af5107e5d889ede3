"""The truth of the mixture of experts, given float64 inputs: as in `truth`, written otherwise than the plain versions.

Every sum of a product, in its gradients too, is made in two halves.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from . import moe_eager
from .moe_eager import Matrices, halves


def product(x: Tensor, w: Tensor) -> Tensor:
    """x w^T. Halves of the rows and of the columns too: in the gradients these are summed over."""
    return torch.cat([torch.cat([_sum(a, b) for b in w.tensor_split(2)], 1) for a in x.tensor_split(2)])


def _sum(x: Tensor, w: Tensor) -> Tensor:
    first, last = (a @ b.mT for a, b in zip(x.tensor_split(2, 1), w.tensor_split(2, 1), strict=True))
    return last + first


def route(logits: Tensor, top_k: int, *, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    largest, experts = (x[:, :top_k] for x in logits.sort(dim=-1, descending=True, stable=True))
    sums = torch.logsumexp(largest if renormalize else logits, -1, keepdim=True)
    return torch.exp(largest - sums), experts.to(torch.int32)


def grouped_gemm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    groups = zip(pairwise([0, *offs.tolist()]), w.unbind(), strict=True)
    return torch.cat([product(x[a:b], matrix) for (a, b), matrix in groups])


def moe_mlp(
    x: Tensor, gate_up: Matrices, down: Matrices, weights: Tensor, experts: Tensor, *, layout: str
) -> Tensor:
    """Pair by pair in the order of their numbers, not expert by expert."""
    gate_ups, downs = (
        w.unbind() if isinstance(w, Tensor) else (w[0] * w[1][..., None]) for w in (gate_up, down)
    )
    pairs = x.new_zeros(experts.numel(), x.shape[1])
    for e, (gate_up_, down_) in enumerate(zip(gate_ups, downs, strict=True)):
        (pair,) = torch.where(experts.flatten() == e)
        if len(pair):
            gate, up = halves(product(x[pair // experts.shape[1]], gate_up_), layout)
            pairs = pairs.index_copy(0, pair, product(up * (gate / (1 + torch.exp(-gate))), down_))
    return (pairs.view(*experts.shape, x.shape[1]) * weights[..., None]).sum(1)


moe: moe_eager.Function = partial(moe_eager.moe, route=route, moe_mlp=moe_mlp, linear=product)
