"""The k largest of a token's logits, and their softmax:

    weights_j = e^{l_j - l_0} / sum          over the chosen ones with RENORMALIZE, else over all E

and its gradient, with m = sum_j weights_j dweights_j:

    dl_e = weights_e (dweights_e - m) for chosen e, else 0          (without RENORMALIZE p_e (dweights_e - m), p_e the softmax)

A program has whole rows of logits [BLOCK_T, BLOCK_E] and takes their largest k times, of equal ones that with the lowest
index. NaN counts as -inf, so k different indices below E come out of any row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import moe_config
from .config import Arch
from .launch import Launch
from .primitives import program_index


@triton.jit
def _logits(logits, row_stride, t, e, tokens, E: tl.constexpr):
    at = logits + t.to(tl.int64)[:, None] * row_stride + e[None, :]
    x = tl.load(at, mask=(t < tokens)[:, None] & (e < E)[None, :], other=float("-inf")).to(tl.float32)
    return tl.where(x != x, float("-inf"), x)  # noqa: PLR0124 - NaN


@triton.jit(do_not_specialize=["programs", "tokens"])
def moe_route_kernel(
    logits, row_stride,  # [T, E]
    weights, experts,  # [T, k] float32 and int32, written
    programs, tokens,
    E: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    t = index * BLOCK_T + tl.arange(0, BLOCK_T)
    e, j = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    x = _logits(logits, row_stride, t, e, tokens, E)  # [BLOCK_T, BLOCK_E]
    left = (e < E)[None, :] & (t >= 0)[:, None]
    chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    top = tl.full([BLOCK_T, BLOCK_K], float("-inf"), tl.float32)
    for n in range(TOP_K):
        largest = tl.max(tl.where(left, x, float("-inf")), 1)
        lowest = tl.min(tl.where(left & (x == largest[:, None]), e[None, :], BLOCK_E), 1)
        left = left & (e[None, :] != lowest[:, None])
        chosen = tl.where((j == n)[None, :], lowest[:, None], chosen)
        top = tl.where((j == n)[None, :], largest[:, None], top)
    first = tl.max(x, 1)[:, None]
    z = tl.exp(top - first)
    total = tl.sum(tl.where((j < TOP_K)[None, :], z, 0.0), 1) if RENORMALIZE else tl.sum(tl.exp(x - first), 1)
    at = t.to(tl.int64)[:, None] * TOP_K + j[None, :]
    mask = (t < tokens)[:, None] & (j < TOP_K)[None, :]
    tl.store(weights + at, z / total[:, None], mask=mask)
    tl.store(experts + at, chosen, mask=mask)


@triton.jit(do_not_specialize=["programs", "tokens"])
def moe_route_backward_kernel(
    dweights, dweights_stride,  # [T, k] float32
    logits, row_stride,  # [T, E]
    weights, experts,  # [T, k] float32 and int32
    dlogits,  # [T, E], written
    programs, tokens,
    E: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    t = index * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    pair, live = t.to(tl.int64) * TOP_K, t < tokens
    dw_at = dweights + t.to(tl.int64) * dweights_stride
    mean = tl.zeros([BLOCK_T], tl.float32)
    for n in range(TOP_K):
        w = tl.load(weights + pair + n, mask=live, other=0.0)
        mean += w * tl.load(dw_at + n, mask=live, other=0.0)
    if RENORMALIZE:
        dl = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    else:
        x = _logits(logits, row_stride, t, e, tokens, E)
        z = tl.exp(x - tl.max(x, 1)[:, None])
        dl = -mean[:, None] * (z / tl.sum(z, 1)[:, None])
    for n in range(TOP_K):
        w = tl.load(weights + pair + n, mask=live, other=0.0)
        dw = tl.load(dw_at + n, mask=live, other=0.0)
        if RENORMALIZE:
            dw -= mean
        chosen = tl.load(experts + pair + n, mask=live, other=-1)
        dl += tl.where(e[None, :] == chosen[:, None], (w * dw)[:, None], 0.0)
    at = dlogits + t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(at, dl.to(dlogits.dtype.element_ty), mask=live[:, None] & (e < E)[None, :])


def forward(logits: Tensor, weights: Tensor, experts: Tensor, renormalize: bool, arch: Arch) -> list[Launch]:
    T, E = logits.shape
    k = weights.shape[1]
    tiles = moe_config.route(E, arch)
    programs = -(-T // tiles.block)
    return [
        Launch(
            moe_route_kernel,
            programs,
            {
                "logits": logits,
                "row_stride": logits.stride(0),
                "weights": weights,
                "experts": experts,
                "programs": programs,
                "tokens": T,
            },
            {
                "E": E,
                "TOP_K": k,
                "RENORMALIZE": renormalize,
                "BLOCK_T": tiles.block,
                "BLOCK_E": tiles.key,
                "BLOCK_K": triton.next_power_of_2(k),
            },
            tiles,
            bytes=T * E * logits.element_size() + weights.nbytes + experts.nbytes,
            flops=T * E * (2 * k + 3),
        )
    ]


def backward(
    dweights: Tensor,
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    dlogits: Tensor,
    renormalize: bool,
    arch: Arch,
) -> list[Launch]:
    T, E = logits.shape
    tiles = moe_config.route(E, arch)
    programs = -(-T // tiles.block)
    read = 0 if renormalize else dlogits.nbytes
    return [
        Launch(
            moe_route_backward_kernel,
            programs,
            {
                "dweights": dweights,
                "dweights_stride": dweights.stride(0),
                "logits": logits,
                "row_stride": logits.stride(0),
                "weights": weights,
                "experts": experts,
                "dlogits": dlogits,
                "programs": programs,
                "tokens": T,
            },
            {
                "E": E,
                "TOP_K": weights.shape[1],
                "RENORMALIZE": renormalize,
                "BLOCK_T": tiles.block,
                "BLOCK_E": tiles.key,
            },
            tiles,
            bytes=3 * weights.nbytes + dlogits.nbytes + read,
            flops=T * E * 2 * weights.shape[1],
        )
    ]
