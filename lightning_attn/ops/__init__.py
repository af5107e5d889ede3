"""The operators as torch.library knows them, and their gradients.

One operator per raw backend function (`backends/__init__.py`). Each checks the values that its kernel relies
on, chooses the backend, brings the tensors into the layout that kernels take, and makes one call.
"""

from .attention import (
    AttentionFunction,
    attention_backward,
    attention_decode,
    attention_forward,
    attention_history,
    attention_state,
)
from .moe import (
    GroupedGemmFunction,
    MoeMlpFunction,
    MoeRouteFunction,
    grouped_gemm_backward,
    grouped_gemm_forward,
    moe_mlp_backward,
    moe_mlp_forward,
    moe_route_backward,
    moe_route_forward,
)
from .norm import GatedRMSNormFunction, gated_rms_norm_backward, gated_rms_norm_forward
from .registry import _resolve, check_values

__all__ = [
    "AttentionFunction",
    "GatedRMSNormFunction",
    "GroupedGemmFunction",
    "MoeMlpFunction",
    "MoeRouteFunction",
    "_resolve",
    "attention_backward",
    "attention_decode",
    "attention_forward",
    "attention_history",
    "attention_state",
    "check_values",
    "gated_rms_norm_backward",
    "gated_rms_norm_forward",
    "grouped_gemm_backward",
    "grouped_gemm_forward",
    "moe_mlp_backward",
    "moe_mlp_forward",
    "moe_route_backward",
    "moe_route_forward",
]
