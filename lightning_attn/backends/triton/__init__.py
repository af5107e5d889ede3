"""Triton kernels for NVIDIA and AMD GPUs; on CPU tensors in Triton's interpreter, for checking them without a GPU.

float32 (products in IEEE float32, not TF32), bfloat16 and float16, head dims 1 to 256, float32 accumulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
except ModuleNotFoundError as error:
    raise ImportError("Triton is not installed (it comes with the extra `gpu`)") from error
except ImportError as error:
    raise ImportError(f"Triton does not load: {error}") from error
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(f"it needs Triton 3.6 or later, not {triton.__version__}")

from ...dispatch import Spec, accumulation_dtype
from . import attention, decode, gated_rms_norm
from .config import device_arch
from .launch import run_all
from .moe import (
    grouped_gemm_backward,
    grouped_gemm_forward,
    moe_mlp_backward,
    moe_mlp_forward,
    moe_route_backward,
    moe_route_forward,
    moe_sort,
)

__all__ = [
    "attention_backward",
    "attention_decode",
    "attention_forward",
    "attention_history",
    "attention_state",
    "gated_rms_norm_backward",
    "gated_rms_norm_forward",
    "grouped_gemm_backward",
    "grouped_gemm_forward",
    "moe_mlp_backward",
    "moe_mlp_forward",
    "moe_route_backward",
    "moe_route_forward",
    "moe_sort",
    "supports",
    "unavailable",
]

MAX_HEAD_DIM = 256
MAX_NORM_DIM = 16384
MAX_EXPERTS = 512
INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels were decorated

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why no call can run here, or None."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return (
        "it needs a CUDA or ROCm device (with TRITON_INTERPRET=1 Triton's interpreter runs it on CPU tensors)"
    )


def supports(spec: Spec) -> list[str]:
    """The reasons why these kernels cannot take `spec`; none: they can."""
    reasons = []
    if spec.device != "cuda" and not (spec.device == "cpu" and INTERPRETED):
        interpreter = " (on CPU tensors only with TRITON_INTERPRET=1)" if spec.device == "cpu" else ""
        reasons.append(f"it runs on CUDA tensors, not on {spec.device}{interpreter}")
    if spec.op == "moe_sort":
        if spec.V > MAX_EXPERTS:
            reasons.append(f"it takes at most {MAX_EXPERTS} experts, not {spec.V}")
    elif spec.dtype not in _DTYPES:
        reasons.append(f"it takes float32, bfloat16 or float16, not {spec.dtype}")
    elif INTERPRETED and spec.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter gets products of bfloat16 wrong")
    if spec.op.startswith("attention"):
        for name, dim in (("K", spec.K), ("V", spec.V)):
            if not 1 <= dim <= MAX_HEAD_DIM:
                reasons.append(f"it takes {name} from 1 to {MAX_HEAD_DIM}, not {dim}")
    elif spec.op.startswith("moe_route") and spec.K > MAX_EXPERTS:
        reasons.append(f"it takes at most {MAX_EXPERTS} experts, not {spec.K}")
    elif spec.op.startswith("gated_rms_norm") and spec.K > MAX_NORM_DIM:
        reasons.append(f"it takes a last dimension of at most {MAX_NORM_DIM}, not {spec.K}")
    return reasons


def _call(q: Tensor, decay: Tensor, scale: float, cu_seqlens: Tensor | None) -> attention.Call:
    B, T, H, _ = q.shape
    return attention.Call(decay, scale, cu_seqlens, (B, T, H), device_arch(q.device))


def _new_state(q: Tensor, v: Tensor, call: attention.Call) -> Tensor:
    size = (call.sequences, q.shape[2], q.shape[3], v.shape[3])
    return q.new_empty(size, dtype=accumulation_dtype(q.dtype))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    call = _call(q, decay, scale, cu_seqlens)
    o = v.new_empty(v.shape)
    state = _new_state(q, v, call) if return_state else None
    run_all(attention.forward(q, k, v, o, initial_state, state, call), q.device)
    return o, state


def attention_backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    call = _call(q, decay, scale, cu_seqlens)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dinitial = None if initial_state is None else _new_state(q, v, call)
    run_all(attention.backward(q, k, v, do, dq, dk, dv, initial_state, dstate, dinitial, call), q.device)
    return dq, dk, dv, dinitial


def attention_state(
    k: Tensor, v: Tensor, decay: Tensor, scale: float, initial_state: Tensor | None, reverse: bool
) -> Tensor:
    call = _call(k, decay, scale, None)
    if not k.shape[1]:
        return _new_state(k, v, call).zero_() if initial_state is None else initial_state.clone()
    launches, states = attention.state_alone(k, v, initial_state, reverse, call)
    run_all(launches, k.device)
    return states[:, -1].clone()  # not a view, which would keep the others


def attention_history(
    x: Tensor, state: Tensor, decay: Tensor, scale: float, reverse: bool, out: Tensor
) -> None:
    if x.numel() and out.numel():
        run_all(attention.history(x, state, out, reverse, _call(x, decay, scale, None)), x.device)


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    o = v.new_empty(v.shape)
    run_all(decode.launches(q, k, v, o, decay, state, slots, scale, device_arch(q.device)), q.device)
    return o


def gated_rms_norm_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))
    run_all(gated_rms_norm.forward(x, gate, weight, y, rstd, eps, device_arch(x.device)), x.device)
    return y, rstd


def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgate, dweight = x.new_empty(x.shape), x.new_empty(x.shape), weight.new_empty(weight.shape)
    arch = device_arch(x.device)
    run_all(gated_rms_norm.backward(dy, x, gate, weight, rstd, dx, dgate, dweight, arch), x.device)
    return dx, dgate, dweight
