"""Weight-only int8 for inference: the layers' linears and experts. Embeddings, heads, routers, norms and all that belongs to
pictures stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attn import SparseMoE, quantize_experts

from .text import DecoderLayer

Model = TypeVar("Model", bound=nn.Module)

_FEW_ROWS = 64  # up to which PyTorch's int8 product on a CPU is faster than to dequantise first
_ALIGNED = 64  # bytes, and columns: with odd ones that product crashes or is wrong (PyTorch 2.13)


class Int8Linear(nn.Module):
    """y = x (scale q)^T without a bias: weight q [out, in] int8, scale [out] float32 whatever dtype the module is cast to.

    For x [..., in] of any floating dtype; y [..., out] has it too. Nothing but x is differentiable.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        self.register_buffer("weight", torch.zeros(shape, device=device, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features, device=device))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Raises ValueError for a linear with a bias, and as `quantize_rows`."""
        if linear.bias is not None:
            raise ValueError(f"Int8Linear: expected a linear without bias, got {linear}")
        module = cls(linear.in_features, linear.out_features, device="meta")
        module.weight, module.scale = quantize_rows(linear.weight.detach())
        return module

    def forward(self, x: Tensor) -> Tensor:
        if not _has_fast_product(x, self.weight):
            return F.linear(x, self.dequantized(x.dtype))
        # It wants scales of x's dtype: ones, or the scales would be rounded.
        ones = x.new_ones(self.out_features)
        y = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), self.weight, ones) * self.scale
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that this stands for, rounded to dtype once."""
        wide = torch.promote_types(dtype, torch.float32)
        return self.weight.to(wide).mul_(self.scale[:, None]).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != before.dtype:  # .to(dtype) would round it
            device = self.scale.device
            self.scale = torch.empty_like(before, device=device) if before.is_meta else before.to(device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def _has_fast_product(x: Tensor, weight: Tensor) -> bool:
    """float32 gains little from it, float16 loses; autograd and the compiler do not know it."""
    K = weight.shape[1]
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or K % _ALIGNED or torch.compiler.is_compiling():
        return False
    differentiated = x.requires_grad and torch.is_grad_enabled()
    aligned = x.is_contiguous() and x.data_ptr() % _ALIGNED == weight.data_ptr() % _ALIGNED == 0
    return 0 < x.numel() <= _FEW_ROWS * K and aligned and not differentiated


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] floating -> (int8 [N, K], float32 [N]), as `quantize_experts` does for each expert.

    Raises ValueError for a w on a CPU that is not finite.
    """
    (q, scale), _ = quantize_experts(w[None], w[None, :0])
    return q[0], scale[0]


@torch.no_grad()
def quantize(model: Model) -> Model:
    """The attention's linears and the experts of every decoder layer in int8, in place, for inference: no parameter requires
    a gradient any more. On the meta device this only changes the structure, which `load` then fills. Returns the model.
    """
    for layer in model.modules():
        if not isinstance(layer, DecoderLayer):
            continue
        if not isinstance(layer.block_sparse_moe, SparseMoE):
            raise TypeError("quantize: expected a dense model, got parallel experts: quantise it before")
        layer.block_sparse_moe.quantize()
        for name, child in list(layer.self_attn.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer.self_attn, name, Int8Linear.from_linear(child))
    return model.requires_grad_(False)
