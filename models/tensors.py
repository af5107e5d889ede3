"""Where the tensors of a released checkpoint lie in a model: the one map for loading, saving, placing and describing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attn import SparseMoE

from .config import TextConfig, VLConfig
from .quantize import Int8Linear, quantize_rows
from .text import CausalLM

Index = tuple[Any, ...]  # ints and slices

_QUANTIZABLE = re.compile(
    r"((language_model\.)?model\.)?layers\.\d+\.(self_attn\.\w+|block_sparse_moe\.experts\.\d+\.\w+)\.weight"
)


@dataclass(frozen=True)
class Entry:
    """A tensor of the released checkpoint, and the part of which parameter (or int8 buffer) of the model it is."""

    name: str
    shape: tuple[int, ...]
    module: nn.Module
    attribute: str
    scale: str | None = None  # the buffer of its scales, where the model is quantised
    part: Index = ()

    @property
    def view(self) -> Tensor:
        """Of the model's own memory, as it is now."""
        whole = getattr(self.module, self.attribute).detach()
        return whole[self.part] if self.part else whole

    @property
    def quantizable(self) -> bool:
        """Whether `quantize` makes it int8."""
        return len(self.shape) == 2 and _QUANTIZABLE.fullmatch(self.name) is not None

    def nbytes(self, int8: bool = False) -> int:
        """In the model's dtype, or as `quantize` would leave it: a byte for a number, four for a row's scale."""
        if self.scale is not None or int8 and self.quantizable:
            return math.prod(self.shape) + 4 * self.shape[0]
        return math.prod(self.shape) * self.view.element_size()

    @torch.no_grad()
    def write(self, tensor: Tensor) -> None:
        """Copies a tensor of any floating dtype from any device, quantising it where the model is quantised; does nothing
        on the meta device. Raises ValueError for what is not finite, where int8 or float16 can not hold it.
        """
        view = self.view
        if view.is_meta:
            return
        if self.scale is not None:
            try:
                q, scale = quantize_rows(tensor.to(view.device))
            except ValueError as error:
                raise ValueError(f"{self.name}: expected finite numbers to quantise, got {error}") from None
            view.copy_(q)
            getattr(self.module, self.scale)[self.part or ...] = scale
            return
        view.copy_(tensor)
        if view.dtype == torch.float16 != tensor.dtype and not view.isfinite().all():
            raise ValueError(
                f"{self.name}: expected numbers below 65504 for float16, got larger ones: load it with "
                "dtype=torch.bfloat16"
            )


def entries(model: nn.Module) -> dict[str, Entry]:
    """By released name, every tensor of the checkpoint of `model` (any of this package, quantised or not, on any device)."""
    found: dict[str, Entry] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, SparseMoE):
            for entry in _experts(prefix, module):
                found[entry.name] = entry
            continue
        named = [*module.named_parameters(recurse=False)]
        if isinstance(module, Int8Linear):
            named = [("weight", module.weight)]
        for attribute, tensor in named:
            scale = "scale" if isinstance(module, Int8Linear) else None
            name = prefix + attribute
            found[name] = Entry(name, tuple(tensor.shape), module, attribute, scale)
    return found


def _experts(prefix: str, moe: SparseMoE) -> list[Entry]:
    D, F = moe.hidden_size, moe.intermediate_size
    up, down = ("gate_up_scale", "down_scale") if moe.quantized else (None, None)
    found = []
    for e in range(moe.num_experts):
        name = f"{prefix}experts.{e}."
        found += [
            Entry(f"{name}w1.weight", (F, D), moe, "gate_up_proj", up, (e, slice(0, F))),
            Entry(f"{name}w2.weight", (D, F), moe, "down_proj", down, (e,)),
            Entry(f"{name}w3.weight", (F, D), moe, "gate_up_proj", up, (e, slice(F, 2 * F))),
        ]
    return found


def expert_parts(name: str, moe: SparseMoE) -> list[tuple[str, Index]]:
    """Of transformers' fused "gate_up_proj" [E, 2F, D] or "down_proj" [E, D, F]: the parts, by released names in the block."""
    E, F = moe.num_experts, moe.intermediate_size
    if name == "down_proj":
        return [(f"experts.{e}.w2.weight", (e,)) for e in range(E)]
    halves = (("w1", slice(0, F)), ("w3", slice(F, 2 * F)))
    return [(f"experts.{e}.{part}.weight", (e, rows)) for e in range(E) for part, rows in halves]


def skeleton(
    config: TextConfig | VLConfig,
    *,
    dtype: torch.dtype | None = None,
    head: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """The model of a config on the meta device: no memory, no weights. `head`: what to build in place of `CausalLM`."""
    kind: Callable[..., nn.Module] = head or CausalLM
    if head is None and isinstance(config, VLConfig):
        from .vl import VLForConditionalGeneration  # needs Pillow, which text does not

        kind = VLForConditionalGeneration
    return kind(config, device="meta", dtype=dtype)
