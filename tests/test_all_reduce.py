"""Sums over ranks in their order."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks_support import Received, run_ranks
from support import HALF, assert_same_bits, dtype_id
from torch import Tensor

from lightning_attn.distributed import RankError, all_reduce
from lightning_attn.distributed.all_reduce import in_order


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) * 1000
    return values.to(dtype)


def total(group: dist.ProcessGroup, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
    """The sum, and the bytes that came for it."""
    x = part(dist.get_rank(group), shape, dtype)
    before = x.clone()
    with Received(group) as received:
        y = all_reduce(x, group)
    assert_same_bits(x, before)
    return y, received.total


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF, torch.int64], ids=dtype_id)
def test_sum(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The same bits on all ranks: of one sum in the order of the ranks, rounded once."""
    for size in (1, 2, 5):
        want = in_order([part(rank, shape, dtype) for rank in range(size)]).to(dtype)
        share = -(-want.numel() // size)
        for y, received in run_ranks(size, total, shape, dtype):
            assert_same_bits(y, want)
            assert received == 2 * (size - 1) * share * dtype.itemsize


def differentiable(group: dist.ProcessGroup) -> str:
    x = torch.zeros(2, requires_grad=True)
    with torch.no_grad():
        assert not all_reduce(x, group).requires_grad
    try:
        all_reduce(x, group)
    except ValueError as error:
        return str(error)
    return ""


def test_no_gradient_is_lost() -> None:
    """What cannot be differentiated does not pretend to be."""
    for words in run_ranks(2, differentiable):
        assert words.startswith("all_reduce: expected x without requires_grad")


def unequal(group: dist.ProcessGroup) -> str:
    try:
        all_reduce(torch.zeros(2 + (dist.get_rank(group) == 1)), group)
    except RankError as error:
        return str(error)
    return ""


def test_other_shape() -> None:
    for words in run_ranks(3, unequal):
        assert words.startswith("all_reduce: expected the same shape on all 3 ranks")
