"""The launches of csrc/cuda/route.cu and csrc/cuda/sort.cu."""

import functools

import numpy as np
import torch
from torch import Tensor

from .launch import DTYPES, GRID_LIMIT, THREADS, WARPS, Kernel, Launch

PER_LANE = (1, 2, 4, 8, 16)  # experts, each with a kernel in route.cu
OWN, CHUNK = 2, 4096  # as in sort.cu: the experts of a thread, and the pairs of a block
MAX_EXPERTS = min(32 * PER_LANE[-1], OWN * THREADS)

ROUTE = np.dtype(
    [("logits", "u8"), ("row", "i8"), ("weights", "u8"), ("experts", "u8")]
    + [(name, "i8") for name in ("tokens", "num_experts", "top_k", "renormalize")]
    + [("dweights", "u8"), ("dweights_row", "i8"), ("dlogits", "u8")]
)
SORT = np.dtype(
    [(name, "u8") for name in ("experts", "order", "position", "offs", "counts")]
    + [(name, "i8") for name in ("pairs", "num_experts", "chunks")]
)


def forward(logits: Tensor, weights: Tensor, experts: Tensor, renormalize: bool) -> list[Launch]:
    return _route("forward", logits, weights, experts, renormalize, (0, 0, 0))


def backward(
    dweights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, dlogits: Tensor, renormalize: bool
) -> list[Launch]:
    gradients = dweights.data_ptr(), dweights.stride(0), dlogits.data_ptr()
    return _route("backward", logits, weights, experts, renormalize, gradients)


def _route(
    way: str,
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    renormalize: bool,
    gradients: tuple[int, int, int],
) -> list[Launch]:
    T, E = logits.shape
    if T == 0:
        return []
    tensors = logits.data_ptr(), logits.stride(0), weights.data_ptr(), experts.data_ptr()
    parameters = np.array((*tensors, T, E, weights.shape[1], renormalize, *gradients), ROUTE)
    blocks = min(-(-T // WARPS), GRID_LIMIT)
    return [Launch(route_kernel(way, logits.dtype, E), blocks, 0, parameters)]


@functools.cache
def route_kernel(way: str, dtype: torch.dtype, num_experts: int) -> Kernel:
    name, per = DTYPES[dtype], next(n for n in PER_LANE if 32 * n >= num_experts)
    return Kernel("route", f"route_{way}_{name}_{per}", f"ROUTE({way},{name},{per})")


def chunks_of(experts: Tensor) -> int:
    """How many blocks sort these pairs; there is one for none too, which writes offs."""
    return max(1, -(-experts.numel() // CHUNK))


def sort(
    experts: Tensor, order: Tensor, position: Tensor, offs: Tensor, counts: Tensor | None
) -> list[Launch]:
    """With `counts` [E, chunks + 1] to work in, if there are several chunks."""
    E, chunks = len(offs), chunks_of(experts)
    tensors = [0 if x is None else x.data_ptr() for x in (experts, order, position, offs, counts)]
    parameters = np.array((*tensors, experts.numel(), E, chunks), SORT)
    rows, sums = 4 * E, 4 * WARPS  # of shared memory: a number for each expert, and one for each warp
    if counts is None:
        return [Launch(sort_kernel("one_chunk"), 1, WARPS * rows + sums, parameters)]
    return [
        Launch(sort_kernel("count_chunk"), chunks, WARPS * rows, parameters),
        Launch(sort_kernel("sum_chunks"), E, sums, parameters),
        Launch(sort_kernel("place_chunk"), chunks, rows + sums, parameters),
    ]


@functools.cache
def sort_kernel(way: str) -> Kernel:
    return Kernel("sort", f"sort_{way}", f"SORT({way})")
