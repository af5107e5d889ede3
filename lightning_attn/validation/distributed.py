"""The errors of what runs across ranks, and what the ranks must agree on."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from .attention import _decay_values, _initial_state, _tokens
from .common import dims, index, same_device, tensor


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
    positions("lasp", cuts, size)
    shard("lasp", q, cuts[rank + 1] - cuts[rank])
    offsets = (0, cuts[-1]) if cu_seqlens is None else documents("lasp", cu_seqlens, q)
    if offsets[-1] != cuts[-1]:
        raise ValueError(f"lasp: expected cuts to end at T = {offsets[-1]}, got {cuts[-1]}")
    if initial_state is not None:
        _, _, H, K = q.shape
        _initial_state("lasp", "initial_state", initial_state, (len(offsets) - 1, H, K, v.shape[3]), q.dtype)
        same_device("lasp", "initial_state", initial_state, "q", q)
    return offsets


def positions(function: str, cuts: Sequence[int], pieces: int) -> tuple[int, ...]:
    """cuts, one more than there are pieces: they start at 0 and do not decrease."""
    what = "cuts to be a list of int"
    if not isinstance(cuts, (list, tuple)):
        raise TypeError(f"{function}: expected {what}, got {type(cuts).__name__}")
    for cut in cuts:
        integer(function, what, cut)
    if len(cuts) != pieces + 1:
        raise ValueError(f"{function}: expected {pieces + 1} cuts for {pieces} pieces, got {len(cuts)}")
    if cuts[0] != 0:
        raise ValueError(f"{function}: expected cuts to start at 0, got {cuts[0]}")
    not_decreasing(function, "cuts", cuts)
    return tuple(cuts)


def shard(function: str, q: Tensor, tokens: int) -> None:
    """That q [1, L, ...] has the tokens that this rank's cuts say."""
    if q.shape[:2] != (1, tokens):
        raise ValueError(
            f"{function}: expected q of shape [1, {tokens}, ...], what the cuts leave to this rank, got {dims(q)}"
        )


def documents(function: str, cu_seqlens: Tensor, like: Tensor) -> tuple[int, ...]:
    """The offsets of the documents on the host: from `like`'s device that waits for it."""
    tensor(function, "cu_seqlens", cu_seqlens)
    index(function, "cu_seqlens", cu_seqlens, cu_seqlens if cu_seqlens.is_cpu else like)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{function}: expected cu_seqlens of shape [N + 1], got {dims(cu_seqlens)}")
    offsets = tuple(cu_seqlens.tolist())
    if offsets[0] != 0:
        raise ValueError(f"{function}: expected cu_seqlens to start at 0, got {offsets[0]}")
    not_decreasing(function, "cu_seqlens", offsets)
    return offsets


def integer(function: str, what: str, x: object) -> None:
    """That x, in something that is to be `what`, is an int."""
    if not isinstance(x, int) or isinstance(x, bool):
        raise TypeError(f"{function}: expected {what}, got {type(x).__name__} in it")


def not_decreasing(function: str, name: str, values: Sequence[int]) -> None:
    for i, (one, other) in enumerate(pairwise(values)):
        if other < one:
            raise ValueError(
                f"{function}: expected {name} not to decrease, got {one} then {other} at index {i}"
            )
