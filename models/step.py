"""What one forward pass knows about its tokens, computed once for all layers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .context import ContextParallel


@dataclass(frozen=True)
class Step:
    """B rows of T new tokens. A token's position is the number of real tokens before it in its sequence, wherever padding
    stands; a document of a packed row is a sequence of its own.
    """

    positions: Tensor  # [B, T] int64; of padding: any position that is in range
    cos: Tensor  # [B, T, rotary_dim / 2] float32
    sin: Tensor
    mask: Tensor | None  # [B, T] bool, True for real tokens; None if all are
    slots: Tensor | None  # [B] int64, the row itself or -1 for padding; for T = 1 with a mask
    cu_seqlens: Tensor | None
    bounds: tuple[int, ...]  # cu_seqlens on the host
    starts: tuple[int, ...]  # [B] how many tokens of each row came before
    ends: tuple[int, ...]  # [B] and how many there are after it
    context: ContextParallel | None = None  # of a sequence that lies on several ranks

    @property
    def uniform(self) -> bool:
        """Each row's tokens stand at the same positions, one after the other."""
        return self.mask is None and self.cu_seqlens is None and len(set(self.starts)) <= 1

    def to(self, device: torch.device) -> Step:
        if device == self.positions.device:
            return self
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: t.to(device) for n, t in values.items() if isinstance(t, Tensor)}
        return replace(self, **moved)


def build(
    B: int,
    T: int,
    rotary_dim: int,
    rope_theta: float,
    *,
    device: torch.device,
    starts: tuple[int, ...] | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Step:
    """starts: how many tokens each row's cache holds. Waits for the device where there is a mask or cu_seqlens."""
    starts = starts or (0,) * B
    bounds: tuple[int, ...] = ()
    slots, counts = None, [T] * B
    if mask is not None:
        mask = mask.to(device) != 0
        counts = mask.sum(1).tolist()
        if min(counts, default=T) == T:
            mask = None
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        if T == 1:
            slots = torch.where(mask[:, 0], torch.arange(B, device=device), -1)
    elif cu_seqlens is not None:
        bounds = tuple(cu_seqlens.tolist())
        if bounds[:1] != (0,) or bounds[-1] != T or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(
                f"TextModel: expected cu_seqlens from 0 to T = {T}, not decreasing, got {list(bounds)}"
            )
        lengths = cu_seqlens.diff().long()
        positions = torch.arange(T, device=device) - torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
        positions = positions[None]
    else:
        positions = torch.arange(T, device=device).expand(B, T)
    if any(starts):
        positions = positions + torch.tensor(starts, device=device)[:, None]
    cos, sin = rotary(positions, rotary_dim, rope_theta)
    ends = tuple(start + n for start, n in zip(starts, counts, strict=True))
    return Step(positions, cos, sin, mask, slots, cu_seqlens, bounds, starts, ends)


def rotary(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [*positions.shape, rotary_dim / 2] float32 of the angles p theta^(-2i / rotary_dim) (arXiv 2104.09864).

    The frequencies are rounded to float32, as in the released code; the angles are not: at four million tokens float32
    is off by a quarter of a radian.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / max(
        rotary_dim, 1
    )
    frequency = 1.0 / theta**exponent
    angle = positions[..., None].double() * frequency.double()
    return angle.cos().float(), angle.sin().float()
