"""The errors of attention across ranks."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .common import dims, floating, index, number, same_device, tensor

_METHODS = ("ring", "all_gather")


def ring_types(function: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Comes before everything that takes the types for granted."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        tensor(function, name, x)


def ring_tensors(function: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, method: str) -> None:
    """The structure of one rank's arguments."""
    for name, x, shape in (("q", q, "[1, L, H, D]"), ("k", k, "[1, L, G, D]"), ("v", v, "[1, L, G, D_v]")):
        floating(function, name, x)
        if x.dim() != 4 or x.shape[0] != 1 or 0 in x.shape[2:]:
            raise ValueError(f"{function}: expected {name} of shape {shape}, got {dims(x)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{function}: expected {name} of q's dtype {q.dtype}, got {x.dtype}")
        same_device(function, name, x, "q", q)
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"{function}: expected k of q's D = {q.shape[3]}, got {dims(k)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{function}: expected v of k's [1, L, G] = {dims(k)[:3]}, got {dims(v)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{function}: expected G that divides H = {q.shape[2]} in k of shape [1, L, G, D], got {dims(k)}"
        )
    if scale is not None:
        number(function, "scale", scale)
    if not isinstance(method, str):
        raise TypeError(f"{function}: expected method to be a str, got {type(method).__name__}")
    if method not in _METHODS:
        raise ValueError(f"{function}: expected method {' or '.join(map(repr, _METHODS))}, got {method!r}")


def ring_documents(function: str, cu_seqlens: Tensor | None, end: int, like: Tensor) -> tuple[int, ...]:
    """The offsets of the documents; without cu_seqlens of the one that ends at `end`."""
    if cu_seqlens is None:
        return (0, end)
    tensor(function, "cu_seqlens", cu_seqlens)
    if cu_seqlens.device.type != "cpu":
        index(function, "cu_seqlens", cu_seqlens, like)
    elif cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: expected cu_seqlens of dtype int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{function}: expected cu_seqlens of shape [N + 1], got {dims(cu_seqlens)}")
    offsets = tuple(cu_seqlens.tolist())
    if offsets[0] != 0:
        raise ValueError(f"{function}: expected cu_seqlens to start at 0, got {offsets[0]}")
    _not_decreasing(function, "cu_seqlens", offsets)
    return offsets


def ring_cuts(function: str, cuts: Sequence[int], zigzag: bool, ranks: int) -> tuple[int, ...]:
    """The cuts, one more than there are pieces."""
    if not isinstance(zigzag, bool):
        raise TypeError(f"{function}: expected zigzag to be a bool, got {type(zigzag).__name__}")
    if not isinstance(cuts, (list, tuple)):
        raise TypeError(f"{function}: expected cuts to be a list of int, got {type(cuts).__name__}")
    for cut in cuts:
        _int(function, "cuts to be a list of int", cut)
    count = (2 * ranks if zigzag else ranks) + 1
    if len(cuts) != count:
        kind = "2R + 1" if zigzag else "R + 1"
        raise ValueError(f"{function}: expected {kind} = {count} cuts for R = {ranks} ranks, got {len(cuts)}")
    if cuts[0] != 0:
        raise ValueError(f"{function}: expected cuts to start at 0, got {cuts[0]}")
    _not_decreasing(function, "cuts", cuts)
    return tuple(cuts)


def ring_layout(
    function: str, name: str, layout: Sequence[Sequence[tuple[int, int]]], ranks: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """A layout: ranges in order on every rank, and no position on two of them."""
    what = f"{name} to be a sequence of (begin, end) for each rank"
    if not isinstance(layout, (list, tuple)):
        raise TypeError(f"{function}: expected {what}, got {type(layout).__name__}")
    if len(layout) != ranks:
        raise ValueError(f"{function}: expected {name} for R = {ranks} ranks, got {len(layout)}")
    for ranges in layout:
        if not isinstance(ranges, (list, tuple)):
            raise TypeError(f"{function}: expected {what}, got {type(ranges).__name__} in it")
        for one in ranges:
            if not isinstance(one, (list, tuple)) or len(one) != 2:
                raise TypeError(f"{function}: expected {what}, got {one!r} in it")
            for bound in one:
                _int(function, what, bound)
        bounds = [bound for one in ranges for bound in one]
        _not_decreasing(function, f"the bounds of a rank's {name}", [0, *bounds])
    held = sorted((begin, end) for ranges in layout for begin, end in ranges if begin < end)
    for (_, end), (begin, _) in pairwise(held):
        if begin < end:
            raise ValueError(f"{function}: expected {name} to hold no position twice, got {begin} twice")
    return tuple(tuple((begin, end) for begin, end in ranges) for ranges in layout)


def ring_rows(function: str, name: str, x: Tensor, rank: int, held: int) -> None:
    """A shard is as long as the layout says."""
    if x.shape[1] != held:
        raise ValueError(
            f"{function}: expected {name} of {held} tokens on rank {rank}, as the layout says, got {dims(x)}"
        )


def ring_end(function: str, name: str, end: int, total: int, exact: bool) -> None:
    """The last position, against the end of the last document."""
    if end != total if exact else end > total:
        raise ValueError(
            f"{function}: expected {name} to end at {'' if exact else 'most '}T = {total}, got {end}"
        )


def _int(function: str, what: str, x: object) -> None:
    if not isinstance(x, int) or isinstance(x, bool):
        raise TypeError(f"{function}: expected {what}, got {type(x).__name__} in it")


def _not_decreasing(function: str, name: str, values: Sequence[int]) -> None:
    for i, (one, next_) in enumerate(pairwise(values)):
        if next_ < one:
            raise ValueError(
                f"{function}: expected {name} not to decrease, got {one} then {next_} at index {i}"
            )
