"""Lightning attention, linear attention with a fixed exponential decay per head, and the mixture of experts beside it."""

import importlib
import types

from . import decay
from .backends import available_backends
from .functional import gated_rms_norm, lightning_attention, lightning_attention_decode
from .moe import (
    grouped_gemm,
    load_balancing_loss,
    moe_mlp,
    moe_route,
    quantize_experts,
    router_z_loss,
)
from .nn import GatedRMSNorm, LightningAttention, SparseMoE

__version__ = "0.1.0"

__all__ = [
    "GatedRMSNorm",
    "LightningAttention",
    "SparseMoE",
    "available_backends",
    "decay",
    "gated_rms_norm",
    "grouped_gemm",
    "lightning_attention",
    "lightning_attention_decode",
    "load_balancing_loss",
    "moe_mlp",
    "moe_route",
    "quantize_experts",
    "router_z_loss",
]


def __getattr__(name: str) -> types.ModuleType:
    """`lightning_attn.distributed` is imported when it is first asked for."""
    if name == "distributed":
        return importlib.import_module(f"{__name__}.distributed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
