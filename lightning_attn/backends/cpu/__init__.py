"""The C++ kernels of csrc/cpu: AVX-512 (with BF16), AVX2 or portable code, chosen at run time.

Any of float64, float32, bfloat16, float16, head dims 1 to 256, float32 accumulation (float64 for float64).
"""

import torch  # before _C, so that both use the libgomp that torch brings
from torch import Tensor

from lightning_attn import _C

from ...dispatch import Spec, accumulation_dtype
from .. import threads
from .launch import DTYPES
from .memory import empty
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
    "instruction_set",
    "moe_mlp_backward",
    "moe_mlp_forward",
    "moe_route_backward",
    "moe_route_forward",
    "moe_sort",
    "supports",
    "unavailable",
]

MAX_HEAD_DIM = 256


def instruction_set() -> str:
    """The instruction set that the kernels were chosen for on this machine."""
    return _C.instruction_set()


def unavailable() -> str | None:
    return None  # without its extension this module cannot be imported


def supports(spec: Spec) -> list[str]:
    """The reasons why these kernels cannot take `spec`; none: they can."""
    reasons = []
    if spec.device != "cpu":
        reasons.append(f"it runs on CPU tensors, not on {spec.device}")
    if spec.op != "moe_sort" and spec.dtype not in DTYPES:  # that is of integers
        reasons.append(f"it takes float64, float32, bfloat16 or float16, not {spec.dtype}")
    experts = spec.op.startswith(("grouped_gemm", "moe_mlp"))
    if experts and spec.state_dtype not in (spec.dtype, torch.int8):
        reasons.append(f"it takes expert matrices of the inputs' dtype or int8, not {spec.state_dtype}")
    if spec.op.startswith("attention"):
        for name, dim in (("K", spec.K), ("V", spec.V)):
            if not 1 <= dim <= MAX_HEAD_DIM:
                reasons.append(f"it takes {name} from 1 to {MAX_HEAD_DIM}, not {dim}")
    return reasons


def _operand(x: Tensor) -> tuple[int, int, int, int]:
    batch, token, head, _ = x.stride()
    return x.data_ptr(), batch, token, head


def _state(x: Tensor | None) -> tuple[int, int, int] | None:
    return None if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _shape(q: Tensor, v: Tensor, decay: Tensor, scale: float, cu_seqlens: Tensor | None) -> tuple:
    batch, tokens, heads, key_dim = q.shape
    sequences, offsets = (
        (batch, 0) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, cu_seqlens.data_ptr())
    )
    return (
        DTYPES[q.dtype], batch, tokens, heads, key_dim, v.shape[3],
        sequences, offsets, decay.data_ptr(), scale, threads(),
    )  # fmt: skip


def _int64(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64)


def _empty_like(x: Tensor) -> Tensor:
    return empty(x, *x.shape)


def _new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((sequences, q.shape[2], q.shape[3], v.shape[3]), dtype=accumulation_dtype(q.dtype))


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
    cu_seqlens = _int64(cu_seqlens)
    o = _empty_like(v)
    state = _new_state(q, v, cu_seqlens) if return_state else None
    _C.attention_forward(
        _shape(q, v, decay, scale, cu_seqlens),
        _operand(q), _operand(k), _operand(v), _operand(o), _state(initial_state), _state(state),
    )  # fmt: skip
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
    cu_seqlens = _int64(cu_seqlens)
    dq, dk, dv = _empty_like(q), _empty_like(k), _empty_like(v)
    dinitial = None if initial_state is None else _new_state(q, v, cu_seqlens)
    _C.attention_backward(
        _shape(q, v, decay, scale, cu_seqlens),
        _operand(q), _operand(k), _operand(v), _operand(do), _state(initial_state), _state(dstate),
        _operand(dq), _operand(dk), _operand(dv), _state(dinitial),
    )  # fmt: skip
    return dq, dk, dv, dinitial


def attention_state(
    k: Tensor, v: Tensor, decay: Tensor, scale: float, initial_state: Tensor | None, reverse: bool
) -> Tensor:
    state = _new_state(k, v, None)
    _C.attention_state(
        _shape(k, v, decay, scale, None),
        _operand(k),
        _operand(v),
        _state(initial_state),
        _state(state),
        reverse,
    )
    return state


def attention_history(
    x: Tensor, state: Tensor, decay: Tensor, scale: float, reverse: bool, out: Tensor
) -> None:
    _C.attention_history(
        _shape(x, out, decay, scale, None), _operand(x), _operand(out), _state(state), reverse
    )


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    slots = _int64(slots)
    o = _empty_like(v)
    _C.attention_decode(
        _shape(q, v, decay, scale, None),
        _operand(q), _operand(k), _operand(v), _operand(o),
        DTYPES[state.dtype], _state(state), state.shape[0], 0 if slots is None else slots.data_ptr(),
    )  # fmt: skip
    return o


def _matrix(x: Tensor) -> Tensor:
    """The rows of `x` as a matrix: a view wherever strides allow one."""
    return x.reshape(-1, x.shape[-1])


def _norm_arguments(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[tuple, Tensor, Tensor, Tensor]:
    x, gate, weight = _matrix(x), _matrix(gate), weight.to(accumulation_dtype(x.dtype))
    rows, dim = x.shape
    sizes = (DTYPES[x.dtype], rows, dim, x.stride(0), gate.stride(0), dim, eps, threads())
    return sizes, x, gate, weight


def gated_rms_norm_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = _empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))
    sizes, x, gate, weight = _norm_arguments(x, gate, weight, eps)
    _C.gated_rms_norm_forward(
        sizes, x.data_ptr(), gate.data_ptr(), weight.data_ptr(), y.data_ptr(), rstd.data_ptr()
    )
    return y, rstd


def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgate = _empty_like(x), _empty_like(x)
    dweight = x.new_empty(weight.shape, dtype=accumulation_dtype(x.dtype))
    weight_dtype = weight.dtype
    sizes, x, gate, weight = _norm_arguments(x, gate, weight, 0.0)
    dy = _matrix(dy)
    _C.gated_rms_norm_backward(
        sizes, dy.data_ptr(), dy.stride(0), x.data_ptr(), gate.data_ptr(), weight.data_ptr(), rstd.data_ptr(),
        dx.data_ptr(), dgate.data_ptr(), dweight.data_ptr(),
    )  # fmt: skip
    return dx, dgate, dweight.to(weight_dtype)
