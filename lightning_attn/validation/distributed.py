"""The errors of what runs across ranks, and what the ranks must agree on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import _cu_seqlens, _decay_values, _initial_state, _tokens
from .common import dims, same_device


def lasp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor | None,
    cuts: Sequence[int],
    scale: float,
    initial_state: Tensor | None,
    rank: int,
    size: int,
) -> tuple[int, ...]:
    """All arguments of `lasp` on one rank -> the offsets of the documents on the host."""
    _tokens("lasp", q, k, v, decay, scale)
    if decay.is_cpu:
        _decay_values("lasp", decay)
    positions("lasp", cuts, size + 1)
    shard("lasp", q, cuts[rank + 1] - cuts[rank])
    documents = offsets("lasp", cu_seqlens, q, cuts[-1])
    if initial_state is not None:
        _, _, H, K = q.shape
        _initial_state(
            "lasp", "initial_state", initial_state, (len(documents) - 1, H, K, v.shape[3]), q.dtype
        )
        same_device("lasp", "initial_state", initial_state, "q", q)
    return documents


def positions(function: str, cuts: Sequence[int], count: int) -> None:
    """That cuts are `count` positions that start at 0 and do not decrease."""
    if not isinstance(cuts, Sequence) or isinstance(cuts, str):
        raise TypeError(f"{function}: expected cuts to be a list of int, got {type(cuts).__name__}")
    for i, cut in enumerate(cuts):
        if not isinstance(cut, int) or isinstance(cut, bool):
            raise TypeError(
                f"{function}: expected cuts to be a list of int, got {type(cut).__name__} at index {i}"
            )
    if len(cuts) != count:
        raise ValueError(f"{function}: expected {count} cuts, got {len(cuts)}")
    if cuts[0] != 0:
        raise ValueError(f"{function}: expected cuts to start at 0, got {cuts[0]}")
    for i in range(len(cuts) - 1):
        if cuts[i + 1] < cuts[i]:
            raise ValueError(
                f"{function}: expected cuts not to decrease, got {cuts[i]} then {cuts[i + 1]} at index {i}"
            )


def shard(function: str, q: Tensor, tokens: int) -> None:
    """That q [1, L, ...] has the tokens that this rank's cuts say."""
    if q.shape[:2] != (1, tokens):
        raise ValueError(
            f"{function}: expected q of shape [1, {tokens}, ...], what the cuts leave to this rank, got {dims(q)}"
        )


def offsets(function: str, cu_seqlens: Tensor | None, like: Tensor, T: int) -> tuple[int, ...]:
    """cu_seqlens on the host, checked. From a GPU that waits for the device; None is one document."""
    if cu_seqlens is None:
        return 0, T
    place = like if isinstance(cu_seqlens, Tensor) and not cu_seqlens.is_cpu else torch.empty(0)
    _cu_seqlens(function, cu_seqlens, place)
    found = tuple(cu_seqlens.tolist())
    if found[0] != 0:
        raise ValueError(f"{function}: expected cu_seqlens to start at 0, got {found[0]}")
    if found[-1] != T:
        raise ValueError(f"{function}: expected cu_seqlens to end where the cuts do, at {T}, got {found[-1]}")
    for i in range(len(found) - 1):
        if found[i + 1] < found[i]:
            raise ValueError(
                f"{function}: expected cu_seqlens not to decrease, got {found[i]} then {found[i + 1]} at index {i}"
            )
    return found
