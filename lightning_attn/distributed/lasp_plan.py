"""What each rank does in LASP+ (arXiv 2501.08313), from `cu_seqlens` and `cuts` alone: no tensor, no communication.

Rank r holds the tokens from cuts[r] to cuts[r + 1]. A document that goes on beyond a cut crosses it: its last tokens before the
cut leave the state E, and its first tokens after the cut are entered by it. Per head, with lambda = e^{-s}:

    S(r) = sum over j of lambda^(cuts[r] - cuts[j + 1]) E(j)        the state that enters rank r; of the ranks j < r that hold
                                                                    tokens of the document that crosses cuts[r]
    G(r) = sum over j of lambda^(cuts[j] - cuts[r + 1]) D(j)        the gradient of the state that leaves rank r; of the ranks
                                                                    j > r that hold tokens of the document that crosses
                                                                    cuts[r + 1]

with E(j) what the last fragment of j leaves, from zero or its document's initial state, and D(j) the gradient of what enters
the first fragment of j. These are the recurrences S <- c_j S + E_j and G <- c_j G + D_j, c_j = 0 where a document starts in j,
else lambda^(L_j), written out: what is multiplied by zero there is never touched, be it NaN.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Terms = tuple[tuple[int, int], ...]  # (rank, distance)


@dataclass(frozen=True)
class Fragment:
    """The tokens [begin, end) of the shard that belong to one document, with whether it starts and ends here."""

    document: int
    begin: int
    end: int
    starts: bool
    ends: bool


@dataclass(frozen=True)
class Shard:
    """One rank's part of the sequence. `entering` and `leaving`: (rank, distance) of the sums S and G above, in the order of
    the ranks; empty where no document crosses that end of the shard, or it has no tokens.
    """

    fragments: tuple[Fragment, ...]
    entering: Terms
    leaving: Terms

    @property
    def offsets(self) -> list[int]:
        """cu_seqlens of the shard, [fragments + 1]."""
        return [0, *(f.end for f in self.fragments)]


@lru_cache(maxsize=256)
def shard(cu_seqlens: tuple[int, ...], cuts: tuple[int, ...], rank: int) -> Shard:
    """The plan of one rank. Both sequences do not decrease and go from 0 to T.

    A document belongs to the ranks that hold a token of it; an empty one to the rank that holds the token at its place, at
    the end of the sequence to the last rank: each document starts on one rank and ends on one.
    """
    begin, end = cuts[rank], cuts[rank + 1]
    last = rank == len(cuts) - 2
    # Documents before `first` end at or before the shard's first token, unless they are empty and stand there.
    first = max(bisect_right(cu_seqlens, begin) - 1, 0)
    while first and cu_seqlens[first - 1] == begin == cu_seqlens[first]:
        first -= 1
    fragments = []
    for n in range(first, len(cu_seqlens) - 1):
        s, e = cu_seqlens[n], cu_seqlens[n + 1]
        if s >= end and not (last and s == e):
            break
        held = max(s, begin) < min(e, end) if s < e else begin <= s < end or (last and s == end)
        if held:
            fragments.append(
                Fragment(n, max(s, begin) - begin, min(e, end) - begin, starts=s >= begin, ends=e <= end)
            )
    entering: Terms = ()
    leaving: Terms = ()
    if begin < end and (left := _crossing(cu_seqlens, begin)) is not None:
        before = _holders(cu_seqlens[left], begin, cuts)
        entering = tuple((j, begin - cuts[j + 1]) for j in before)
    if begin < end and (right := _crossing(cu_seqlens, end)) is not None:
        after = _holders(end, cu_seqlens[right + 1], cuts)
        leaving = tuple((j, cuts[j] - end) for j in after)
    return Shard(tuple(fragments), entering, leaving)


def _crossing(cu_seqlens: Sequence[int], cut: int) -> int | None:
    """The document with tokens on both sides of a cut."""
    n = bisect_right(cu_seqlens, cut) - 1
    if 0 <= n < len(cu_seqlens) - 1 and cu_seqlens[n] < cut < cu_seqlens[n + 1]:
        return n
    return None


def _holders(begin: int, end: int, cuts: Sequence[int]) -> list[int]:
    """The ranks that hold tokens of [begin, end)."""
    return [j for j in range(len(cuts) - 1) if max(begin, cuts[j]) < min(end, cuts[j + 1])]


def even_cuts(tokens: int, ranks: int) -> list[int]:
    """R + 1 positions that share `tokens` among `ranks`; where they do not divide, the first ranks have one token more."""
    base, more = divmod(tokens, ranks)
    return [r * base + min(r, more) for r in range(ranks + 1)]


def lasp_bytes(ranks: int, heads: int, key_dim: int, value_dim: int, itemsize: int = 4) -> int:
    """What each rank receives in the forward of `lasp`, and again in its backward: a state of each other rank, however long
    the sequence is.
    """
    return (ranks - 1) * heads * key_dim * value_dim * itemsize
