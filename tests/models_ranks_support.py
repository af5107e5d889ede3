"""A small text model with all that is parallel in it, on ranks: worlds, twins and gradients."""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import Any

import torch
from models_support import randomize, tokens
from torch import Tensor

from models.config import LIGHTNING, SOFTMAX, TextConfig
from models.parallel import Sizes, World
from models.text import CausalLM
from models.training import Alone, Side

RANKS = 4
CONFIG = TextConfig(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rotary_dim=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    attn_type_list=(LIGHTNING, SOFTMAX, LIGHTNING),
    rope_theta=1e4,
)
# All ways to share out four ranks.
SHARES = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4))  # ep, etp
SIZES = [Sizes(cp, ep, etp) for cp in (1, 2, 4) for ep, etp in SHARES]


@functools.cache
def world_of(sizes: Sizes) -> World:
    """Made once in each rank, by all of them."""
    return World(sizes)


def dense_model(dtype: torch.dtype = torch.float64, config: TextConfig = CONFIG) -> CausalLM:
    """The same on every rank, with weights large enough that every part matters."""
    model = CausalLM(config, dtype=dtype)
    randomize(model)
    return model


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    return [tokens(n, seed=seed + i).tolist() for i, n in enumerate(lengths)]


def offsets(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def gradients(side: Side, batch: Tensor, balance: float, factor: float) -> dict[str, Any]:
    """Of one step with factor times the loss: what is minimised, the cross-entropy and the clipped gradients of the dense model, by
    name. Its parameters are replaced by them.
    """
    for p in side.model.parameters():
        p.grad = None
    total, entropy = side.loss(batch, balance)
    (factor * total).backward()
    side.finish()
    with torch.no_grad():
        for p in side.model.parameters():
            assert p.grad is not None
            p.copy_(p.grad)
    return {"total": total.detach(), "entropy": entropy.detach(), "gradients": side.whole().state_dict()}


@functools.cache
def alone(rows: int, length: int, balance: float, factor: float) -> dict[str, Any]:
    """The same in one process, and the norm of the gradient before it was clipped."""
    side = Alone(dense_model())
    batch = tokens(rows, length + 1)
    total, _ = side.loss(batch, balance)
    grads = torch.autograd.grad(factor * total, list(side.model.parameters()))
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt().item()
    return {"norm": norm, **gradients(side, batch, balance, factor)}
