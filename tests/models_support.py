"""Tiny models of random shapes, and their twins in transformers."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import LIGHTNING, SOFTMAX, TextConfig
from models.text import CausalLM

VOCAB = 97


def tiny_config(seed: int = 0, **fields: Any) -> TextConfig:
    """Of the released layout: lightning layers first, a softmax layer after them; more than once where there is room."""
    draw = random.Random(seed)
    layers = draw.choice([4, 6, 8])
    heads = draw.choice([2, 4, 8])
    experts = draw.choice([3, 4, 8])
    head_dim = draw.choice([8, 16, 32])
    period = draw.choice([2, layers])
    kinds = tuple(SOFTMAX if (i + 1) % period == 0 else LIGHTNING for i in range(layers))
    chosen: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": draw.choice([24, 40, 64]),
        "intermediate_size": draw.choice([16, 48]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, 2, heads]),
        "head_dim": head_dim,
        "rotary_dim": head_dim // 2,
        "num_local_experts": experts,
        "num_experts_per_tok": draw.choice([1, 2]),
        "attn_type_list": kinds,
        "rope_theta": draw.choice([1e4, 1e7]),
        "layernorm_full_attention_alpha": draw.uniform(0.5, 3),
        "layernorm_linear_attention_alpha": draw.uniform(0.5, 3),
        "layernorm_mlp_alpha": draw.uniform(0.5, 3),
        "layernorm_full_attention_beta": draw.uniform(0.5, 1.5),
        "layernorm_linear_attention_beta": draw.uniform(0.5, 1.5),
        "layernorm_mlp_beta": draw.uniform(0.5, 1.5),
    }
    return TextConfig(**{**chosen, **fields})


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that every part matters, norms other than one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.normal_(std=1.0 if "embed" in name else 0.15, generator=generator)
        else:
            p.uniform_(0.5, 1.5, generator=generator)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> CausalLM:
    model = CausalLM(tiny_config(seed, **fields)).to(dtype).eval()
    randomize(model, seed)
    return model


def tokens(*shape: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers holds them in memory."""
    names = {
        "block_sparse_moe.gate_up_proj": "mlp.experts.gate_up_proj",
        "block_sparse_moe.down_proj": "mlp.experts.down_proj",
        "block_sparse_moe.gate.": "mlp.gate.",
    }
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def twin(model: torch.nn.Module, config: TextConfig, head: str = "MiniMaxForCausalLM", **fields: Any) -> Any:
    """transformers' model with the same weights, RoPE turning half of a head as here."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, head)(transformers.MiniMaxConfig(**config.to_transformers(), **fields))
    state = transformers_names(model.state_dict())  # copied by load_state_dict
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    buffers = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    assert not unexpected and all(name.endswith(buffers) for name in missing), (missing, unexpected)
    turn_half(theirs, config)
    return theirs.eval()


@torch.no_grad()
def turn_half(theirs: Any, config: TextConfig) -> None:
    """Makes transformers' RoPE turn the first rotary_dim dimensions of a head, as the released network does, not all.

    It turns the pairs (i, i + D/2). So those dimensions are moved there, in q and k alike, which leaves their products
    as they are, and the other pairs get a frequency of zero.
    """
    D, r = config.head_dim, config.rotary_dim
    first, second, rest = (list(range(*ends)) for ends in ((r // 2,), (r // 2, r), (r, D)))
    order = first + rest[: (D - r) // 2] + second + rest[(D - r) // 2 :]
    inner = theirs.model if hasattr(theirs, "model") else theirs
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, r, 2) / max(r, 1))
    inner.rotary_emb.inv_freq = torch.cat([frequency, torch.zeros((D - r) // 2)])
    for layer in inner.layers:
        for projection in (getattr(layer.self_attn, name, None) for name in ("q_proj", "k_proj")):
            if projection is not None:
                rows = projection.weight.view(-1, D, config.hidden_size)
                projection.weight.copy_(rows[:, order].flatten(0, 1))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
