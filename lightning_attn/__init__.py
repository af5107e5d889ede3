"""Lightning attention: linear attention with a fixed exponential decay per head."""

from . import decay
from .backends import available_backends
from .functional import gated_rms_norm, lightning_attention, lightning_attention_decode
from .nn import GatedRMSNorm, LightningAttention

__version__ = "0.1.0"

__all__ = [
    "GatedRMSNorm",
    "LightningAttention",
    "available_backends",
    "decay",
    "gated_rms_norm",
    "lightning_attention",
    "lightning_attention_decode",
]
