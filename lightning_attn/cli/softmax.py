"""Softmax attention: what the yardstick "sdpa" computes, and how that is judged.

It is not the op, but the quadratic attention that the op stands in for, at the same shapes and passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .case import Tensors
from .cases import Attention
from .eager import Function

JUDGED = 256  # tokens


@dataclass(frozen=True)
class Softmax(Attention):
    """The same inputs, whose truth is causal softmax attention.

    Judged on the last tokens: their outputs and dq depend on all that comes before, and nothing comes after
    that would add to their dk and dv. So the truth has no more than some rows of the T x T matrix.
    """

    @property
    def plain(self) -> Function:
        return last_rows

    @property
    def truth(self) -> Function:
        return last_rows

    def judged(self, outputs: Tensors) -> Tensors:
        return {name: x[:, -JUDGED:] for name, x in outputs.items()}


def last_rows(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, *, scale: float) -> Tensor:
    """In the inputs' dtype, as one writes it; before the last tokens the output is zero. The decay is not used."""
    T = q.shape[1]
    first = max(T - JUDGED, 0)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q[:, first:], k, v))  # [B, H, T, D]
    i = torch.arange(T, device=q.device)
    scores = (scale * (q_ @ k_.mT)).masked_fill(i > i[first:, None], -torch.inf)  # [B, H, JUDGED, T]
    o = (torch.softmax(scores, -1) @ v_).transpose(1, 2)
    return torch.cat([v.new_zeros(v[:, :first].shape), o], 1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, *, scale: float) -> Tensor:
    """PyTorch's own, on CUDA with FlashAttention and nothing else. The decay is not used."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {"is_causal": True, "scale": scale}
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
