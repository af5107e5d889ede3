"""Sums over ranks in the order of the ranks: all get the same bits, every time, whatever the number of ranks or the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..dispatch import accumulation_dtype
from ..validation import types
from .comm import Ranks, call

_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


def all_reduce(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum of x over the ranks of a group, of which all call this. Not differentiable.

    Args:
        x: any shape, the same on all ranks; floating (summed in float32, float64 for float64, rounded once) or an integer.
        group: None is the default group.

    Returns:
        The sum in x's dtype, a new tensor. Each rank receives 2 (R - 1) / R of x's bytes.

    Raises:
        TypeError, ValueError: x is no tensor or of another dtype, or requires grad while grad mode is on.
        RankError: the ranks disagree about shape or dtype, or one does not come.
    """
    with call("all_reduce", group) as ranks:
        types("all_reduce", "auto", x=x)
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"all_reduce: expected x of a floating (16 bits or more) or integer dtype, got {x.dtype}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "all_reduce: expected x without requires_grad (the sum is not differentiable: detach it), got a tensor that "
                "requires grad"
            )
        ranks.agree({"shape": list(x.shape), "dtype": x.dtype}, x.device)
    return sum_over(ranks, x)


@torch.no_grad()
def sum_over(ranks: Ranks, x: Tensor) -> Tensor:
    """`all_reduce` within a call: each rank sums a part, and tells it to the others."""
    share = -(-x.numel() // ranks.size)
    padded = x.new_zeros(ranks.size, share)
    padded.view(-1)[: x.numel()] = x.reshape(-1)
    parts = ranks.all_to_all(padded.view(-1), [share] * ranks.size, [share] * ranks.size).wait()
    total = in_order(parts.view(ranks.size, share)).to(x.dtype)
    return ranks.all_gather(total).wait().view(-1)[: x.numel()].view(x.shape)


def in_order(parts: Tensor | Sequence[Tensor]) -> Tensor:
    """The sum of the parts in their order, in the dtype of accumulation; of integers in their own."""
    dtype = parts[0].dtype
    total = parts[0].to(accumulation_dtype(dtype) if dtype.is_floating_point else dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total
