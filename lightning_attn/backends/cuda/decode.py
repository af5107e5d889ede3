"""The launch of csrc/cuda/step.cu."""

import functools

import numpy as np
import torch
from torch import Tensor

from .launch import DTYPES, GRID_LIMIT, THREADS, WARPS, Kernel, Launch

# As in step.cu.
LANES, TOKENS = 8, 8
VECTOR_BYTES = 16
ROWS = (1, 2, 4, 8)

_OPERAND = np.dtype([("data", "u8"), ("batch", "i8"), ("token", "i8"), ("head", "i8")])
PARAMETERS = np.dtype(
    [(name, _OPERAND) for name in ("q", "k", "v", "o")]
    + [(name, "u8") for name in ("decay", "state")]
    + [(name, "i8") for name in ("state_row", "state_head", "state_rows")]
    + [("slots", "u8"), ("slot_bytes", "i8")]
    + [(name, "i8") for name in ("batch", "tokens", "heads", "key_dim", "value_dim")]
    + [("scale", "f8")]
)


def launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    decay: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
) -> list[Launch]:
    B, T, H, K = q.shape
    V = v.shape[3]
    columns = VECTOR_BYTES // state.element_size()
    blocks = B * H * -(-V // (LANES * columns))
    if T == 0 or blocks == 0:
        return []
    parameters = np.array(
        (
            *map(_operand, (q, k, v, o)),
            *(decay.data_ptr(), state.data_ptr(), *state.stride()[:2], state.shape[0]),
            *((0, 0) if slots is None else (slots.data_ptr(), slots.element_size())),
            *(B, T, H, K, V, scale),
        ),
        PARAMETERS,
    )
    shared = min(T, TOKENS) * WARPS * LANES * columns * 4
    return [Launch(kernel(*variant(q.dtype, state)), min(blocks, GRID_LIMIT), shared, parameters)]


def variant(dtype: torch.dtype, state: Tensor) -> tuple[str, str, str, str]:
    """The arguments of STEP in step.cu, less the last: the kernel for inputs of `dtype` and this state [S, H, K, V]."""
    aligned = _aligned(state)
    row_threads = THREADS // LANES
    rows = next(n for n in ROWS if n * row_threads >= state.shape[2]) if aligned else ROWS[-1]
    return DTYPES[dtype], DTYPES[state.dtype], str(rows), "aligned" if aligned else "any"


@functools.cache
def kernel(dtype: str, state: str, rows: str, access: str) -> Kernel:
    aligned = "true" if access == "aligned" else "false"
    return Kernel(
        "step", f"step_{dtype}_{state}_{rows}_{access}", f"STEP({dtype},{state},{rows},{access},{aligned})"
    )


def _aligned(state: Tensor) -> bool:
    """Whether every row of every [K, V] starts at a multiple of 16 bytes."""
    steps = [stride for stride, size in zip(state.stride()[:2], state.shape[:2], strict=True) if size > 1]
    return all(n * state.element_size() % VECTOR_BYTES == 0 for n in (*steps, state.shape[3])) and (
        state.data_ptr() % VECTOR_BYTES == 0
    )


def _operand(x: Tensor) -> tuple[int, int, int, int]:
    batch, token, head, _ = x.stride()
    return x.data_ptr(), batch, token, head
