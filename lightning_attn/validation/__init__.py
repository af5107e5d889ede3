"""Every input error, in the form "function: expected ..., got ...".

The public functions check the structure of their arguments: types, dtypes, shapes, devices and strides. The
functions named `*_values` read tensors; operators call them, so that they also hold under torch.compile.
"""

from .attention import attention, attention_values, decode, decode_values, layer
from .common import types
from .distributed import lasp
from .moe import (
    expert_sizes,
    finite_expert,
    grouped_gemm,
    grouped_gemm_values,
    load_balancing_loss,
    moe_mlp,
    moe_mlp_values,
    moe_route,
    moe_route_values,
    quantize_experts,
    router_logits,
    sparse_moe,
)
from .norm import gated_rms_norm

__all__ = [
    "attention",
    "attention_values",
    "decode",
    "decode_values",
    "expert_sizes",
    "finite_expert",
    "gated_rms_norm",
    "grouped_gemm",
    "grouped_gemm_values",
    "lasp",
    "layer",
    "load_balancing_loss",
    "moe_mlp",
    "moe_mlp_values",
    "moe_route",
    "moe_route_values",
    "quantize_experts",
    "router_logits",
    "sparse_moe",
    "types",
]
