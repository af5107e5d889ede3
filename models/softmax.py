"""The softmax attention of every eighth layer: grouped queries, RoPE on half of a head, causal."""

from __future__ import annotations

import importlib.util
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TextConfig
from .rows import Rows
from .step import Step

_MASK_ELEMENTS = 1 << 24  # of a tile of queries: bounds the memory of a prefill at any length


class SoftmaxAttention(nn.Module):
    """o_proj(softmax(q k^T / sqrt(D)) v), query head h reading key head h // (heads / kv heads)."""

    def __init__(
        self,
        config: TextConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.sliding_window
        hidden, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        grouped = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, inner, bias=False, device=device, dtype=dtype)
        self.k_proj = nn.Linear(hidden, grouped, bias=False, device=device, dtype=dtype)
        self.v_proj = nn.Linear(hidden, grouped, bias=False, device=device, dtype=dtype)
        self.o_proj = nn.Linear(inner, hidden, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, step: Step, cached: Rows | None = None) -> Tensor:
        """x [B, T, hidden] -> y [B, T, hidden]; `cached`, if any, takes the new keys (turned) and values, [B, T, 2, G, D]."""
        q, k, v = self.project(x, step)
        aligned = step.uniform and (cached is None or cached.level)
        if cached is None:
            positions = _own_positions(step)
        else:
            cached.write(torch.stack([k, v], dim=2), step)
            k, v = cached.view(step.ends).unbind(2)  # [B, L, G, D]
            positions = cached.positions(step.ends)
        o = attend(q, k, v, step, positions, aligned, self.window)  # [B, T, H, D]
        return self.o_proj(o.flatten(2))

    def project(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k and v [B, T, G, D], q and k turned to their positions."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, step), rotate(k, step), v


def rotate(x: Tensor, step: Step) -> Tensor:
    """RoPE on the first rotary_dim dimensions of x [B, T, H, D], pairs (i, i + rotary_dim / 2); the others pass."""
    half = step.cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = step.cos[:, :, None], step.sin[:, :, None]  # [B, T, 1, rotary_dim / 2]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


def _own_positions(step: Step) -> Tensor:
    """The positions of keys that are this step's own tokens, with padding where no query sees it."""
    if step.mask is None:
        return step.positions
    return step.positions.masked_fill(~step.mask, torch.iinfo(torch.int64).max)


def attend(
    q: Tensor, k: Tensor, v: Tensor, step: Step, key_positions: Tensor, aligned: bool, window: int | None
) -> Tensor:
    """Causal attention of the step's queries q [B, T, H, D] over keys and values [B, L, G, D] -> [B, T, H, D].

    A query at position p sees the keys at positions (p - window, p]; key_positions [B, L]. aligned: there is no padding, and
    in each row the last key belongs to the last query.
    """
    flash = _flash_attn() if _takes_flash_attn(q) else None
    if flash is not None and (aligned or step.cu_seqlens is not None):
        return _with_flash_attn(flash, q, k, v, step, window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, tokens, D]
    if step.cu_seqlens is None:
        o = _attend(q, k, v, step.positions, key_positions, window, aligned)
    else:
        parts = [q[:, :, :0]]
        for a, b in pairwise(step.bounds):
            qd, kd, vd = (x[:, :, a:b] for x in (q, k, v))
            positions, theirs = (x[:, a:b] for x in (step.positions, key_positions))
            parts.append(_attend(qd, kd, vd, positions, theirs, window, True))
        o = torch.cat(parts, dim=2)
    return o.transpose(1, 2)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    key_positions: Tensor,
    window: int | None,
    aligned: bool,
) -> Tensor:
    """[B, heads, tokens, D]; as `attend`, without documents."""
    T, L = q.shape[2], k.shape[2]
    if aligned and (window is None or L <= window) and (T == L or T == 1):
        return _sdpa(q, k, v) if T == 1 else _sdpa(q, k, v, causal=True)
    tile = max(1, _MASK_ELEMENTS // max(k.shape[0] * L, 1))
    if aligned and window is not None:
        tile = min(tile, max(window, 256))  # keys before the first window of a tile are left out
    tiles = []
    for start in range(0, T, tile):
        end = min(start + tile, T)
        first = max(L - T + start - window + 1, 0) if aligned and window is not None else 0
        keys = slice(first, L - T + end if aligned else L)
        p, kp = positions[:, start:end, None], key_positions[:, None, keys]
        visible = kp <= p  # [B, tile, L]
        if window is not None:
            visible &= kp > p - window
        tiles.append(_sdpa(q[:, :, start:end], k[:, :, keys], v[:, :, keys], visible[:, None]))
    return torch.cat(tiles, dim=2) if tiles else torch.empty_like(q)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    if q.shape[2] != 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    # The heads of a group as rows of one product: keys and values are read once, not once a head.
    B, H, _, D = q.shape
    q = q.reshape(B, k.shape[1], -1, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, 1, D)


def _with_flash_attn(flash: Any, q: Tensor, k: Tensor, v: Tensor, step: Step, window: int | None) -> Tensor:
    """flash-attn aligns the last key with the last query, as the cache does."""
    left = (-1, -1) if window is None else (window - 1, 0)
    if step.cu_seqlens is None:
        return flash.flash_attn_func(q, k, v, causal=True, window_size=left)
    longest = max(b - a for a, b in pairwise(step.bounds))
    offsets = step.cu_seqlens.to(torch.int32)
    o = flash.flash_attn_varlen_func(
        q[0], k[0], v[0], offsets, offsets, longest, longest, causal=True, window_size=left
    )
    return o[None]


def _takes_flash_attn(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


@cache
def _flash_attn() -> Any:
    return importlib.import_module("flash_attn") if importlib.util.find_spec("flash_attn") else None
