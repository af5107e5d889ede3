"""A stable counting sort of pairs by expert, without atomics and without the host:

    position of pair p = how many pairs have a lower expert + how many before p have the same one

The pairs are cut in parts. One kernel counts the experts in each part, the other adds up the counts, which are few, and places
the pairs of a part, a block at a time. One part is counted by the program that places it: one launch for a decode step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import moe_config
from .config import Arch
from .launch import Launch
from .primitives import program_index


@triton.jit
def _experts_of(experts, p, end, E: tl.constexpr):
    """The experts of pairs p, -1 for pairs from `end` on and for what is no expert."""
    e = tl.load(experts + p, mask=p < end, other=-1)
    return tl.where((e >= 0) & (e < E), e, -1)


@triton.jit
def _count(experts, begin, end, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """How often each expert occurs in pairs [begin, end), [BLOCK_E]."""
    e = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for first in range(begin, end, BLOCK):
        found = _experts_of(experts, first + tl.arange(0, BLOCK), end, E)
        counts += tl.sum((found[:, None] == e[None, :]).to(tl.int32), 0)
    return counts


@triton.jit(do_not_specialize=["pairs", "share"])
def moe_count_kernel(
    experts,  # [pairs] int32
    counts,  # [parts, BLOCK_E] int32, written
    pairs, share,  # the pairs of a part, a multiple of BLOCK
    E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    part = program_index()
    begin = part * share
    end = tl.minimum(begin + share, pairs)
    found = _count(experts, begin, end, E, BLOCK, BLOCK_E)
    tl.store(counts + part * BLOCK_E + tl.arange(0, BLOCK_E), found)


@triton.jit(do_not_specialize=["pairs", "share", "parts"])
def moe_place_kernel(
    experts,  # [pairs] int32
    counts,  # [parts, BLOCK_E] int32, or None if there is one part
    order, position,  # [pairs] int32, written
    offs,  # [E] int32, written
    pairs, share, parts,
    E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part = program_index()
    begin = part * share
    end = tl.minimum(begin + share, pairs)
    e = tl.arange(0, BLOCK_E)
    before = tl.zeros([BLOCK_E], tl.int32)  # in the parts before this one
    if counts is None:
        total = _count(experts, begin, end, E, BLOCK, BLOCK_E)
    else:
        total = tl.zeros([BLOCK_E], tl.int32)
        for first in range(0, parts, PARTS):
            q = first + tl.arange(0, PARTS)
            c = tl.load(counts + q[:, None] * BLOCK_E + e[None, :], mask=(q < parts)[:, None], other=0)
            total += tl.sum(c, 0)
            before += tl.sum(tl.where((q < part)[:, None], c, 0), 0)
    ends = tl.cumsum(total, 0)
    if part == 0:
        tl.store(offs + e, ends, mask=e < E)
    place = ends - total + before  # of the next pair of each expert
    i = tl.arange(0, BLOCK)
    for first in range(begin, end, BLOCK):
        p = first + i
        found = _experts_of(experts, p, end, E)
        mine = found[:, None] == e[None, :]
        same = (found[:, None] == found[None, :]) & (i[None, :] < i[:, None])
        at = tl.sum(tl.where(mine, place[None, :], 0), 1) + tl.sum(same.to(tl.int32), 1)
        real = found >= 0
        tl.store(order + at, p.to(tl.int32), mask=real)
        tl.store(position + p, tl.where(real, at, -1), mask=p < end)
        place += tl.sum(mine.to(tl.int32), 0)


def launches(experts: Tensor, order: Tensor, position: Tensor, offs: Tensor, arch: Arch) -> list[Launch]:
    pairs, E = experts.numel(), offs.shape[0]
    tiles, share = moe_config.sort(E, pairs, arch)
    parts = max(1, -(-pairs // share))  # one at least, for the offsets
    constants = {"E": E, "BLOCK": tiles.block, "BLOCK_E": tiles.key}
    counts = None
    found = []
    if parts > 1:
        counts = experts.new_empty((parts, tiles.key), dtype=torch.int32)
        found.append(
            Launch(
                moe_count_kernel,
                parts,
                {"experts": experts, "counts": counts, "pairs": pairs, "share": share},
                constants,
                tiles,
                bytes=experts.nbytes + counts.nbytes,
            )
        )
    found.append(
        Launch(
            moe_place_kernel,
            parts,
            {
                "experts": experts,
                "counts": counts,
                "order": order,
                "position": position,
                "offs": offs,
                "pairs": pairs,
                "share": share,
                "parts": parts,
            },
            constants | {"PARTS": tiles.value},
            tiles,
            bytes=3 * experts.nbytes + offs.nbytes + (0 if counts is None else counts.nbytes),
            again=experts.nbytes if counts is None else (parts - 1) * counts.nbytes,
        )
    )
    return found
