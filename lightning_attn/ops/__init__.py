"""The operators as torch.library knows them, and their gradients.

One operator per raw backend function (`backends/__init__.py`). Each checks the values that its kernel relies
on, chooses the backend, brings the tensors into the layout that kernels take, and makes one call.
"""

from .attention import AttentionFunction, attention_backward, attention_decode, attention_forward
from .norm import GatedRMSNormFunction, gated_rms_norm_backward, gated_rms_norm_forward
from .registry import _resolve

__all__ = [
    "AttentionFunction",
    "GatedRMSNormFunction",
    "_resolve",
    "attention_backward",
    "attention_decode",
    "attention_forward",
    "gated_rms_norm_backward",
    "gated_rms_norm_forward",
]
