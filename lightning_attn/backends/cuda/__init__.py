"""The CUDA C++ kernels of csrc/cuda: the decode step, the router and the sort by experts, launched through CuPy on PyTorch's
current stream and device.

Ahead-of-time code for sm_80 (and later 8.x), sm_90a and sm_100a if the build had nvcc. Otherwise, and on other
architectures, NVRTC compiles a kernel when it is first used, and CuPy keeps it on disk (~/.cupy/kernel_cache,
CUPY_CACHE_DIR). float32, bfloat16 and float16 inputs; float32 and bfloat16 states, head dims 1 to 256, any T; 1 to 512
experts, any of them a token's. Sums are kept in float32, with subnormals flushed to zero.

With LIGHTNING_ATTN_EMULATE_CUDA=1 the same source, compiled for the host, runs on CPU tensors thread by thread: slow, for
checking the kernels without a GPU.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ...dispatch import Spec
from . import decode, launch, route

__all__ = [
    "attention_decode",
    "moe_route_backward",
    "moe_route_forward",
    "moe_sort",
    "supports",
    "unavailable",
]

EMULATED = os.environ.get("LIGHTNING_ATTN_EMULATE_CUDA") == "1"
MAX_HEAD_DIM = 256
CAPABILITY = (8, 0)

_STATES = (torch.float32, torch.bfloat16)


def unavailable() -> str | None:
    """Why no call can run here, or None."""
    if EMULATED:
        return None if launch.can_emulate() else "this build has no emulator of CUDA"
    if torch.version.hip or not torch.cuda.is_available():
        return (
            "it needs an NVIDIA GPU (with LIGHTNING_ATTN_EMULATE_CUDA=1 an emulator runs it on CPU tensors)"
        )
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()  # fails where the driver is older than CuPy's CUDA
        if not all(launch.fatbin(file).exists() for file in launch.FILES):
            cupy.cuda.nvrtc.getVersion()  # fails where there is no NVRTC
    except ModuleNotFoundError:
        return "CuPy is not installed (it comes with the extra `gpu`)"
    except Exception as error:  # noqa: BLE001 - as it makes its cache directory, an import can fail in many ways
        return f"CuPy does not work: {error}"
    if not hasattr(cupy.cuda.Stream, "from_external"):
        return f"it needs CuPy 14 or later, not {cupy.__version__}"
    return None


def supports(spec: Spec) -> list[str]:
    """The reasons why these kernels cannot take `spec`; none: they can."""
    taken = {
        "attention_decode": _takes_decode,
        "moe_route_forward": _takes_route,
        "moe_route_backward": _takes_route,
        "moe_sort": _takes_sort,
    }
    if spec.op not in taken:
        return ["it has kernels for lightning_attention_decode, moe_route and moe_sort only"]
    reasons = []
    if spec.device != ("cpu" if EMULATED else "cuda"):
        emulated = " while it is emulated" if EMULATED else ""
        reasons.append(f"it runs on {'CPU' if EMULATED else 'CUDA'} tensors{emulated}, not on {spec.device}")
    # That of the current device: `spec` names none.
    elif not EMULATED and torch.cuda.get_device_capability() < CAPABILITY:
        reasons.append("it needs compute capability 8.0 or later")
    return reasons + taken[spec.op](spec)


def _takes_decode(spec: Spec) -> list[str]:
    reasons = _takes_dtype(spec)
    if not reasons and spec.state_dtype not in _STATES:
        reasons.append(f"it takes states in float32 or bfloat16, not {spec.state_dtype}")
    for name, dim in (("K", spec.K), ("V", spec.V)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            reasons.append(f"it takes {name} from 1 to {MAX_HEAD_DIM}, not {dim}")
    return reasons


def _takes_route(spec: Spec) -> list[str]:
    return _takes_dtype(spec) + _takes_experts(spec.K)


def _takes_sort(spec: Spec) -> list[str]:
    wrong = spec.dtype != torch.int32
    return ([f"it takes experts in int32, not {spec.dtype}"] if wrong else []) + _takes_experts(spec.V)


def _takes_dtype(spec: Spec) -> list[str]:
    return [] if spec.dtype in launch.DTYPES else [f"it takes float32, bfloat16 or float16, not {spec.dtype}"]


def _takes_experts(count: int) -> list[str]:
    fits = 1 <= count <= route.MAX_EXPERTS
    return [] if fits else [f"it takes 1 to {route.MAX_EXPERTS} experts, not {count}"]


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    o = v.new_empty(v.shape)
    _run(decode.launches(q, k, v, o, decay, state, slots, scale), q.device)
    return o


def moe_route_forward(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    size = logits.shape[0], top_k
    weights, experts = (logits.new_empty(size, dtype=dtype) for dtype in (torch.float32, torch.int32))
    _run(route.forward(logits, weights, experts, renormalize), logits.device)
    return weights, experts


def moe_route_backward(
    dweights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, renormalize: bool
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    _run(route.backward(dweights, logits, weights, experts, dlogits, renormalize), logits.device)
    return dlogits


def moe_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, position = experts.new_empty(experts.numel()), experts.new_empty(experts.shape)
    offs = experts.new_empty(num_experts)
    chunks = route.chunks_of(experts)
    counts = experts.new_empty(num_experts, chunks + 1) if chunks > 1 else None
    _run(route.sort(experts, order, position, offs, counts), experts.device)
    return order, position, offs


def _run(launches: list[launch.Launch], device: torch.device) -> None:
    if EMULATED:
        launch.emulate(launches)
    elif launches:
        launch.run(launches, device)
