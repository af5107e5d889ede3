"""Who else does the same: the providers that `bench --compare` puts beside ours."""

from __future__ import annotations

import importlib
import importlib.util

from .cases import LAYERS, Case, Layer, as_function
from .eager import Function

OURS, EAGER, TRANSFORMERS = "lightning_attn", "eager-256", "transformers"
TRANSFORMERS_MODULE = "transformers.models.minimax.modeling_minimax"


def peers(case: Case) -> dict[str, Function]:
    """By name, the other versions of a case's op that are installed."""
    found = {EAGER: case.plain}
    if isinstance(case, Layer) and not missing_peers():
        found[TRANSFORMERS] = _transformers_layer(case)
    return found


def missing_peers() -> list[str]:
    """Peers that are not there, and why."""
    if importlib.util.find_spec("transformers") is None:
        return ["transformers is not installed: its layer is not compared"]
    try:
        importlib.import_module(TRANSFORMERS_MODULE)
    except ImportError as error:
        return [f"transformers' MiniMax layer is not compared: {error}"]
    return []


def _transformers_layer(case: Layer) -> Function:
    """transformers' MiniMax layer; at layer 0 its slopes are ours."""
    modeling = importlib.import_module(TRANSFORMERS_MODULE)
    config = modeling.MiniMaxConfig(
        hidden_size=case.hidden,
        num_attention_heads=case.H,
        num_key_value_heads=case.H,
        head_dim=case.D,
        num_hidden_layers=LAYERS,
        layer_types=["linear_attention"] * LAYERS,
    )
    module = modeling.MiniMaxLightningAttention(config, layer_idx=0).to(case.dtype)
    return as_function(module, position_embeddings=None, attention_mask=None)
