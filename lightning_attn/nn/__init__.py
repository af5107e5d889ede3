"""The layers, with the parameter names of the released MiniMax checkpoints."""

from .attention import LightningAttention
from .moe import SparseMoE
from .norm import GatedRMSNorm

__all__ = ["GatedRMSNorm", "LightningAttention", "SparseMoE"]
