"""What the text model is given, checked before anything is taken for granted or a cache is touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_attn import available_backends

from .cache import Cache
from .config import TextConfig
from .context import ContextParallel


def check_types(
    input_ids: Any,
    inputs_embeds: Any,
    attention_mask: Any,
    cu_seqlens: Any,
    cache: Any,
    context: Any,
    backend: Any,
) -> None:
    """TypeError or ValueError for arguments that are none, or that exclude each other."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("TextModel: expected input_ids or inputs_embeds, got both or neither")
    tensors = {
        "input_ids": input_ids,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
    }
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"TextModel: expected {name} to be a torch.Tensor, got {type(value).__name__}")
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(
            f"TextModel: expected cache to be a Cache (model.new_cache), got {type(cache).__name__}"
        )
    if backend != "auto" and available_backends().get(backend) != "ok":
        raise ValueError(
            f"TextModel: expected a backend that can run, got {backend!r}: {available_backends()}"
        )
    if context is not None and not isinstance(context, ContextParallel):
        raise TypeError(
            f"TextModel: expected context to be a ContextParallel (models.context), got {type(context).__name__}"
        )
    if context is not None and any(x is not None for x in (attention_mask, cu_seqlens, cache)):
        raise ValueError("TextModel: expected context without attention_mask, cu_seqlens and cache, got both")


def check_shapes(
    x: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: Cache | None,
    config: TextConfig,
    dtype: torch.dtype,
    packed: bool,
) -> None:
    """ValueError or TypeError for embedded inputs x that are none of a model of this config and dtype, or for what comes beside
    them; packed: all documents are in one row.
    """
    if x.dim() != 3 or x.shape[2] != config.hidden_size:
        expected = f"[B, T, {config.hidden_size}]"
        raise ValueError(f"TextModel: expected inputs_embeds {expected}, got {list(x.shape)}")
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"TextModel: expected inputs_embeds of dtype {dtype}, got {x.dtype}")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(
            f"TextModel: expected attention_mask of the new tokens, {list(x.shape[:2])}, got {list(mask.shape)}"
        )
    if cu_seqlens is not None and (cache is not None or mask is not None):
        raise ValueError("TextModel: expected cu_seqlens without cache and attention_mask, got both")
    if packed and len(x) != 1:
        raise ValueError(f"TextModel: expected B = 1 with cu_seqlens or context, got {len(x)}")
    if cache is not None and cache.config != config:
        raise ValueError(
            "TextModel: expected a cache of this model (model.new_cache), got one of another config"
        )
    if cache is not None and cache.batch_size != len(x):
        raise ValueError(f"TextModel: expected a cache of {len(x)} rows, got {cache.batch_size}")
