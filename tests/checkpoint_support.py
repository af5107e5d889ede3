"""Checkpoints written out by hand, to be loaded, saved and compared."""

import json
from pathlib import Path

import torch
from models_support import tiny_config
from safetensors.torch import load_file, save_file

from models.config import TextConfig
from models.shards import SINGLE

Tensors = dict[str, torch.Tensor]
LAYERS = {"num_hidden_layers": 2, "attn_type_list": (0, 1)}
CONFIG = tiny_config(1, **LAYERS, hidden_size=24)


def stored(directory: Path) -> Tensors:
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def write(directory: Path, tensors: Tensors, config: TextConfig) -> Path:
    """A checkpoint as someone else may have it, in one file."""
    directory.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / SINGLE, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    return directory


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        t.dtype == b[n].dtype and torch.equal(t.view(torch.uint8), b[n].view(torch.uint8))
        for n, t in a.items()
    )


def released(config: TextConfig) -> Tensors:
    """Tensors by the released names, written out; each its own numbers."""
    D, F, H = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    G = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (D,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (config.vocab_size, D))
    for i, kind in enumerate(config.attn_type_list):
        p = f"model.layers.{i}."
        shapes |= {f"{p}input_layernorm.weight": (D,), f"{p}post_attention_layernorm.weight": (D,)}
        if kind == 0:
            of = {"qkv_proj": (3 * H, D), "output_gate": (H, D), "norm": (H,), "out_proj": (D, H)}
        else:
            of = {"q_proj": (H, D), "k_proj": (G, D), "v_proj": (G, D), "o_proj": (D, H)}
        shapes |= {f"{p}self_attn.{name}.weight": shape for name, shape in of.items()}
        shapes[f"{p}block_sparse_moe.gate.weight"] = (config.num_local_experts, D)
        for e in range(config.num_local_experts):
            of = {"w1": (F, D), "w2": (D, F), "w3": (F, D)}
            shapes |= {f"{p}block_sparse_moe.experts.{e}.{n}.weight": s for n, s in of.items()}
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) * 0.15 for n, s in shapes.items()}
