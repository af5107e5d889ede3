"""The CUDA C++ kernels of csrc/cuda: the decode step, launched through CuPy on PyTorch's current stream and device.

Ahead-of-time code for sm_80 (and later 8.x), sm_90a and sm_100a if the build had nvcc. Otherwise, and on other
architectures, NVRTC compiles a kernel when it is first used, and CuPy keeps it on disk (~/.cupy/kernel_cache,
CUPY_CACHE_DIR). float32, bfloat16 and float16 inputs, float32 and bfloat16 states, head dims 1 to 256, any T. Sums are kept
in float32, with subnormals flushed to zero.

With LIGHTNING_ATTN_EMULATE_CUDA=1 the same source, compiled for the host, runs on CPU tensors thread by thread: slow, for
checking the kernels without a GPU.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dispatch import Spec

__all__ = ["attention_decode", "supports", "unavailable"]

EMULATED = os.environ.get("LIGHTNING_ATTN_EMULATE_CUDA") == "1"
MAX_HEAD_DIM = 256
CAPABILITY = (8, 0)
# Made by setup.py: the source, and machine code if there was nvcc.
CODE = Path(__file__).resolve().parent.parent / "_cuda"
SOURCE, FATBIN = CODE / "step.cu", CODE / "step.fatbin"
OPTIONS = ("-std=c++17", "-ftz=true")  # of setup.py too, so that either compiler gives the same bits

# As in step.cu.
THREADS, LANES, TOKENS = 256, 8, 8
VECTOR_BYTES = 16
ROWS = (1, 2, 4, 8)

GRID_LIMIT = 2**31 - 1
_NO_CODE = (200, 209)  # CUDA_ERROR_INVALID_IMAGE, CUDA_ERROR_NO_BINARY_FOR_GPU

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_STATES = (torch.float32, torch.bfloat16)

_OPERAND = np.dtype([("data", "u8"), ("batch", "i8"), ("token", "i8"), ("head", "i8")])
_DECODE = np.dtype(
    [(name, _OPERAND) for name in ("q", "k", "v", "o")]
    + [(name, "u8") for name in ("decay", "state")]
    + [(name, "i8") for name in ("state_row", "state_head", "state_rows")]
    + [("slots", "u8"), ("slot_bytes", "i8")]
    + [(name, "i8") for name in ("batch", "tokens", "heads", "key_dim", "value_dim")]
    + [("scale", "f8")]
)


def unavailable() -> str | None:
    """Why no call can run here, or None."""
    if EMULATED:
        from lightning_attn import _C

        return None if _C.can_emulate_cuda() else "this build has no emulator of CUDA"
    if torch.version.hip or not torch.cuda.is_available():
        return (
            "it needs an NVIDIA GPU (with LIGHTNING_ATTN_EMULATE_CUDA=1 an emulator runs it on CPU tensors)"
        )
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()  # fails where the driver is older than CuPy's CUDA
        if not FATBIN.exists():
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
    if spec.op != "attention_decode":
        return ["it has a kernel for lightning_attention_decode only"]
    reasons = []
    if spec.device != ("cpu" if EMULATED else "cuda"):
        emulated = " while it is emulated" if EMULATED else ""
        reasons.append(f"it runs on {'CPU' if EMULATED else 'CUDA'} tensors{emulated}, not on {spec.device}")
    # That of the current device: `spec` names none.
    elif not EMULATED and torch.cuda.get_device_capability() < CAPABILITY:
        reasons.append("it needs compute capability 8.0 or later")
    if spec.dtype not in _DTYPES:
        reasons.append(f"it takes float32, bfloat16 or float16, not {spec.dtype}")
    elif spec.state_dtype not in _STATES:
        reasons.append(f"it takes states in float32 or bfloat16, not {spec.state_dtype}")
    for name, dim in (("K", spec.K), ("V", spec.V)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            reasons.append(f"it takes {name} from 1 to {MAX_HEAD_DIM}, not {dim}")
    return reasons


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    B, T, H, K = q.shape
    V = v.shape[3]
    o = v.new_empty(v.shape)
    columns = VECTOR_BYTES // state.element_size()
    blocks = B * H * -(-V // (LANES * columns))
    if T == 0 or blocks == 0:
        return o
    parameters = np.array(
        (
            *map(_operand, (q, k, v, o)),
            *(decay.data_ptr(), state.data_ptr(), *state.stride()[:2], state.shape[0]),
            *((0, 0) if slots is None else (slots.data_ptr(), slots.element_size())),
            *(B, T, H, K, V, scale),
        ),
        _DECODE,
    )
    shared = min(T, TOKENS) * THREADS // 32 * LANES * columns * 4
    _launch(variant(q.dtype, state), min(blocks, GRID_LIMIT), shared, parameters, q.device)
    return o


def variant(dtype: torch.dtype, state: Tensor) -> tuple[str, ...]:
    """The arguments of STEP in step.cu, less the last: the kernel for inputs of `dtype` and this state [S, H, K, V]."""
    aligned = _aligned(state)
    row_threads = THREADS // LANES
    rows = next(n for n in ROWS if n * row_threads >= state.shape[2]) if aligned else ROWS[-1]
    return _DTYPES[dtype], _DTYPES[state.dtype], str(rows), "aligned" if aligned else "any"


def _aligned(state: Tensor) -> bool:
    """Whether every row of every [K, V] starts at a multiple of 16 bytes."""
    steps = [stride for stride, size in zip(state.stride()[:2], state.shape[:2], strict=True) if size > 1]
    return all(n * state.element_size() % VECTOR_BYTES == 0 for n in (*steps, state.shape[3])) and (
        state.data_ptr() % VECTOR_BYTES == 0
    )


def _operand(x: Tensor) -> tuple[int, int, int, int]:
    batch, token, head, _ = x.stride()
    return x.data_ptr(), batch, token, head


def _launch(
    variant: tuple[str, ...], blocks: int, shared: int, parameters: np.ndarray, device: torch.device
) -> None:
    if EMULATED:
        from lightning_attn import _C

        _C.emulate_cuda("_".join(("step", *variant)), blocks, shared, parameters.tobytes())
        return
    from cupy.cuda import Stream

    with torch.cuda.device(device):
        stream = Stream.from_external(_CurrentStream())
        kernel = _kernel(variant, torch.cuda.current_device())
        kernel((blocks,), (THREADS,), (parameters,), shared, stream)


class _CurrentStream:
    """PyTorch's, in the protocol that CuPy takes; a torch.cuda.Stream itself speaks it in new versions only."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


@functools.cache
def _kernel(variant: tuple[str, ...], device: int) -> Any:
    """The kernel, loaded on the current device, which is `device`."""
    import cupy
    from cupy_backends.cuda.api.driver import CUDADriverError

    name = "_".join(("step", *variant))
    if FATBIN.exists():
        try:
            return cupy.RawModule(path=str(FATBIN)).get_function(name).kernel
        except CUDADriverError as error:
            if error.status not in _NO_CODE:
                raise
    return cupy.RawModule(code=source(), options=(*OPTIONS, definition(variant))).get_function(name).kernel


def source() -> str:
    return SOURCE.read_text()


def definition(variant: tuple[str, ...]) -> str:
    """The option by which step.cu has this kernel only: NVRTC takes seconds for all of them."""
    aligned = "true" if variant[-1] == "aligned" else "false"
    return f"-DLIGHTNING_STEP={','.join((*variant, aligned))}"
