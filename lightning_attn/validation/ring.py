"""The errors of attention across ranks."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from .common import dims, floating, number, same_device, tensor
from .distributed import documents, integer, not_decreasing, positions

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
    return documents(function, cu_seqlens, like)


def ring_cuts(function: str, cuts: Sequence[int], zigzag: bool, ranks: int) -> tuple[int, ...]:
    """The cuts, one more than there are pieces."""
    if not isinstance(zigzag, bool):
        raise TypeError(f"{function}: expected zigzag to be a bool, got {type(zigzag).__name__}")
    return positions(function, cuts, 2 * ranks if zigzag else ranks)


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
                integer(function, what, bound)
        bounds = [bound for one in ranges for bound in one]
        not_decreasing(function, f"the bounds of a rank's {name}", [0, *bounds])
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
