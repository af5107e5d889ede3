"""The kernels of the mixture of experts as real calls launch them, as `catalogue` has those of attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import Expert, Routing
from . import counting_sort, grouped_gemm, moe, moe_route
from .catalogue import Entry, empty
from .config import Arch
from .launch import Launch
from .operands import Rows

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 6144, 9216, 32, 2  # of MiniMax-Text-01
TOKENS = {"T=8192": 8192, "T=32": 32, "T=1": 1}  # one of each way of `moe_config.product`


def catalogue(dtype: torch.dtype, arch: Arch) -> Iterator[Entry]:
    """Every kernel at the shape of MiniMax-Text-01, as each way to call an operation specialises it; some twice over."""
    for variant, T in TOKENS.items():
        for launch in mlp_forward(T, dtype, arch, saved=T == 8192):
            yield Entry("moe_mlp", variant, launch)
        for launch in mlp_forward(T, dtype, arch, int8=True):
            yield Entry("moe_mlp", f"{variant}, int8", launch)
        for launch in [*routing(T, dtype, arch), *sorting(T, arch)]:
            yield Entry("moe_route", variant, launch)
    for launch in mlp_forward(8192, dtype, arch, saved=True, interleaved=True):
        yield Entry("moe_mlp", "T=8192, interleaved", launch)
    for variant, interleaved in {"T=8192": False, "T=8192, interleaved": True}.items():
        for launch in mlp_backward(8192, dtype, arch, interleaved=interleaved):
            yield Entry("moe_mlp backward", variant, launch)
    for launch in gemm_backward(8192, dtype, arch):
        yield Entry("grouped_gemm backward", "T=8192", launch)


def mlp_forward(
    T: int,
    dtype: torch.dtype,
    arch: Arch,
    *,
    saved: bool = False,
    int8: bool = False,
    interleaved: bool = False,
) -> list[Launch]:
    """Of `moe_mlp`, without the sorting; `saved` keeps what a backward needs."""
    x, y = (empty(T, HIDDEN, dtype=dtype) for _ in range(2))
    h = empty(T * TOP_K, 2 * INTERMEDIATE, dtype=dtype) if saved else None
    gate_up, down = (
        Expert(empty(*shape, dtype=torch.int8), empty(*shape[:2]))
        if int8
        else Expert(empty(*shape, dtype=dtype))
        for shape in _shapes()
    )
    weights, routing_ = _routing(T)
    return moe.mlp_forward(x, gate_up, down, weights, routing_, interleaved, h, y, arch)


def mlp_backward(T: int, dtype: torch.dtype, arch: Arch, *, interleaved: bool = False) -> list[Launch]:
    """Of all its gradients."""
    dy, x, dx = (empty(T, HIDDEN, dtype=dtype) for _ in range(3))
    gate_up, down, dgate_up, ddown = (empty(*shape, dtype=dtype) for shape in 2 * _shapes())
    h = empty(T * TOP_K, 2 * INTERMEDIATE, dtype=dtype)
    weights, routing_ = _routing(T)
    dweights = empty(T, TOP_K)
    return moe.mlp_backward(
        dy, x, gate_up, down, weights, routing_, h, interleaved, dx, dgate_up, ddown, dweights, arch
    )


def gemm_backward(T: int, dtype: torch.dtype, arch: Arch) -> list[Launch]:
    """Of `grouped_gemm` with the down matrices, T * k rows."""
    rows = T * TOP_K
    dy, x, dx = (empty(rows, n, dtype=dtype) for n in (HIDDEN, INTERMEDIATE, INTERMEDIATE))
    w, dw = (empty(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype) for _ in range(2))
    offs = empty(EXPERTS, dtype=torch.int32)
    return [
        grouped_gemm.gemm(Rows(dy), Expert(w.mT), offs, dx, arch),
        grouped_gemm.weight_gradient(Rows(dy), Rows(x), offs, dw, rows, arch),
    ]


def routing(T: int, dtype: torch.dtype, arch: Arch) -> list[Launch]:
    """Of `moe_route` and its gradient, each with and without renormalising."""
    logits, dlogits = (empty(T, EXPERTS, dtype=dtype) for _ in range(2))
    weights, dweights = (empty(T, TOP_K) for _ in range(2))
    experts = empty(T, TOP_K, dtype=torch.int32)
    launches = []
    for renormalize in (True, False):
        launches += moe_route.forward(logits, weights, experts, renormalize, arch)
        launches += moe_route.backward(dweights, logits, weights, experts, dlogits, renormalize, arch)
    return launches


def sorting(T: int, arch: Arch) -> list[Launch]:
    order, position = (empty(T * TOP_K, dtype=torch.int32) for _ in range(2))
    offs = empty(EXPERTS, dtype=torch.int32)
    return counting_sort.launches(empty(T, TOP_K, dtype=torch.int32), order, position, offs, arch)


def _shapes() -> list[tuple[int, int, int]]:
    return [(EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)]


def _routing(T: int) -> tuple[torch.Tensor, Routing]:
    order, position = empty(T * TOP_K, dtype=torch.int32), empty(T, TOP_K, dtype=torch.int32)
    return empty(T, TOP_K), Routing(order, position, empty(EXPERTS, dtype=torch.int32))
