"""What a state adds to the tokens after it (or, in the backward, the gradient of a state to those before it), in place:

    out_t += scale * lambda^(t + 1)      S^T x_t        t counted from the first token, reverse = False
    out_t += scale * lambda^(T - 1 - t)  S^T x_t        reverse = True

On a CPU a head stops where the power of lambda is zero in the dtype of the sums: with the rates of MiniMax-01 most heads see a few
hundred tokens. On a GPU the rates are not read, as that would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends.raw import raw
from ..dispatch import accumulation_dtype

_TOKENS = 2048  # at a time: bounds the memory for what is held in float32


@raw
def add_history(x: Tensor, out: Tensor, state: Tensor, decay: Tensor, scale: float, reverse: bool) -> None:
    """x [1, T, H, K], out [1, T, H, V] of its dtype, any strides; state [H, K, V] in the accumulation dtype; decay [H]."""
    acc = accumulation_dtype(x.dtype)
    product = (
        acc if x.is_cpu else x.dtype
    )  # GPUs multiply 16 bits many times as fast, and round as their kernels do
    T = x.shape[1]
    rates = decay.to(acc)
    for heads, count in _reach(decay, T, acc):
        S = state[heads].to(product)  # [h, K, V]
        s = rates[heads]
        first, stop = (T - count, T) if reverse else (0, count)
        for begin in range(first, stop, _TOKENS):
            t = torch.arange(begin, min(begin + _TOKENS, stop), device=x.device)
            distance = T - 1 - t if reverse else t + 1
            weight = torch.exp(-s[:, None] * distance) * scale  # [h, n]
            rows = x[0, begin : begin + len(t)].transpose(0, 1)[heads]  # [h, n, K]
            added = (rows.to(acc) * weight[..., None]).to(product) @ S  # [h, n, V]
            into = out[0, begin : begin + len(t)].transpose(0, 1)
            into[heads] = (into[heads].to(acc) + added).to(out.dtype)


def _reach(decay: Tensor, T: int, acc: torch.dtype) -> Iterator[tuple[slice | list[int], int]]:
    """Heads that have about as far to go, with the number of tokens; on a CPU."""
    if T == 0:
        return
    if not decay.is_cpu:
        yield slice(None), T
        return
    least = math.log(torch.finfo(acc).smallest_normal * torch.finfo(acc).eps) - 1  # below it exp is zero
    groups: dict[int, list[int]] = {}
    for head, s in enumerate(decay.tolist()):
        count = T if s * T <= -least else max(math.ceil(-least / s), 1)
        groups.setdefault(count.bit_length(), []).append(head)
    for heads in groups.values():
        rate = min(decay[heads].tolist())
        count = T if rate * T <= -least else max(math.ceil(-least / rate), 1)
        yield heads, count
