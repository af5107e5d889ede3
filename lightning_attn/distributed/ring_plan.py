"""Varlen ring attention on the host: who holds what, who computes what, what travels where. Integers only.

Positions are global: token t of T. Rows count what a rank holds, in the order of the positions. A document's keys on a rank
are therefore neighbours there, whatever pieces it holds, and all of them before some query are one slice.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

Range = tuple[int, int]  # begin, end
Ranges = tuple[Range, ...]  # in order, not empty, apart from each other
Layout = tuple[Ranges, ...]  # by rank: the positions that it holds


def contiguous(cuts: Sequence[int]) -> Layout:
    """R + 1 cuts -> rank r holds [cuts[r], cuts[r + 1])."""
    return tuple(union([piece]) for piece in pairwise(cuts))


def zigzag(cuts: Sequence[int]) -> Layout:
    """2R + 1 cuts -> rank r holds piece r and piece 2R - 1 - r, so that early and late queries are on every rank."""
    pieces = list(pairwise(cuts))
    return tuple(union([pieces[r], pieces[-1 - r]]) for r in range(len(pieces) // 2))


def union(*several: Sequence[Range]) -> Ranges:
    """All that is in one of them, in order; neighbours become one range."""
    found: list[Range] = []
    for begin, end in sorted(one for ranges in several for one in ranges if one[0] < one[1]):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return tuple(found)


def length(ranges: Ranges) -> int:
    return sum(end - begin for begin, end in ranges)


def offset(ranges: Ranges, x: int) -> int:
    """How much of the ranges lies before x: where x stands if they are laid end to end."""
    return sum(min(end, x) - begin for begin, end in ranges if begin < x)


def within(outer: Ranges, inner: Ranges) -> Ranges:
    """Where `inner`, a part of `outer`, stands if the ranges of `outer` are laid end to end."""
    return union([(offset(outer, begin), offset(outer, begin) + end - begin) for begin, end in inner])


class Block(NamedTuple):
    """One piece of work: n queries from row q on see m keys from the owner's row k on; with causal, n = m and query i sees
    keys 0 ... i. So `times` times, each right behind the one before in queries and keys.
    """

    q: int
    k: int
    n: int
    m: int
    causal: bool
    times: int = 1


class Bytes(NamedTuple):
    """What a rank receives from others."""

    forward: int
    backward: int


class Plan:
    """For given layouts of queries and keys and given documents. A query at t sees the keys of its document at s <= t.

    j is the rank that owns keys, r one that sees them; h counts hops of the ring, j -> j + 1 -> ... (mod R).
    """

    def __init__(self, queries: Layout, keys: Layout, offsets: tuple[int, ...]) -> None:
        self.queries, self.keys, self.offsets, self.size = queries, keys, offsets, len(queries)
        self._begins = [[begin for begin, _ in ranges] for ranges in keys]
        self._rows = [[offset(ranges, begin) for begin, _ in ranges] for ranges in keys]
        self._fragments = [list(self._fragments_of(ranges)) for ranges in queries]
        self.held = tuple(union([(0, length(ranges))]) for ranges in keys)  # by rank: all its rows of keys
        self.needs = [
            [self._needs(j, r) for r in range(self.size)] for j in range(self.size)
        ]  # rows of j, for r
        self.hops = [self._hops(j) for j in range(self.size)]
        self.steps = max(self.hops)
        # Nothing else here is wanted by every rank.
        self.blocks, self.travels, self.carried = (
            cache(self._blocks),
            cache(self._travels),
            cache(self._carried),
        )

    def _fragments_of(self, ranges: Ranges) -> Iterator[tuple[int, int, int, int]]:
        """A rank's queries document by document: where the document begins, positions [a, b), the row of a."""
        row = 0
        for a, end in ranges:
            document = (
                bisect_right(self.offsets, a) - 1
            )  # the last that begins at or before a: not an empty one
            while a < end:
                b = min(end, self.offsets[document + 1])
                if a < b:
                    yield self.offsets[document], a, b, row
                row, a, document = row + b - a, b, document + 1

    def _row(self, j: int, position: int) -> int:
        """How many keys of j come before the position."""
        i = bisect_right(self._begins[j], position) - 1
        if i < 0:
            return 0
        begin, end = self.keys[j][i]
        return self._rows[j][i] + min(position, end) - begin

    def _needs(self, j: int, r: int) -> Ranges:
        return union([(self._row(j, start), self._row(j, b)) for start, _, b, _ in self._fragments[r]])

    def _hops(self, j: int) -> int:
        """How far the keys of j go: to the last rank that needs any."""
        return max((h for h in range(1, self.size) if self.needs[j][(j + h) % self.size]), default=0)

    def _travels(self, j: int, h: int) -> Ranges:
        """The rows of j in hop h: what its end and those behind it need."""
        return union(*(self.needs[j][(j + i) % self.size] for i in range(h, self.hops[j] + 1)))

    def _carried(self, j: int, h: int) -> Ranges:
        """The rows of j whose gradients have come together after hop h: what the ranks so far needed."""
        return union(*(self.needs[j][(j + i) % self.size] for i in range(1, h + 1)))

    def _blocks(self, r: int, j: int) -> tuple[Block, ...]:
        """What r computes with the keys of j: every pair that it sees once."""
        blocks: list[Block] = []

        def add(block: Block) -> None:
            if blocks and block.causal:  # equal documents, one behind the other
                last = blocks[-1]
                behind = last.q + last.times * last.n, last.k + last.times * last.m, *last[2:5]
                if behind == block[:5]:
                    blocks[-1] = last._replace(times=last.times + 1)
                    return
            blocks.append(block)

        for start, a, b, row in self._fragments[r]:
            first, here = self._row(j, start), self._row(j, a)
            if first < here:  # all before the first query
                add(Block(row, first, b - a, here - first, causal=False))
            for i in range(max(bisect_right(self._begins[j], a) - 1, 0), bisect_left(self._begins[j], b)):
                x, y = max(a, self.keys[j][i][0]), min(b, self.keys[j][i][1])
                if x < y:  # keys among the queries
                    add(Block(row + x - a, self._row(j, x), y - x, y - x, causal=True))
                    if y < b:
                        add(Block(row + y - a, self._row(j, x), b - y, y - x, causal=False))
        return tuple(blocks)

    def received(self, rank: int, method: str, *, width: int, itemsize: int, grad_itemsize: int) -> Bytes:
        """Bytes that a rank receives: width = G * (D + D_v) elements a row, of itemsize bytes for keys and values and of
        grad_itemsize (4, or 8 for float64) for their gradients.

        ring:       forward   sum_h |travels(rank - h, h)|                                       rows of keys and values
                    backward  the same, and sum_h |carried(rank - h, h - 1)| + |carried(rank, its hops)|  rows of gradients
        all_gather: forward   sum_j |needs(j, rank)|,      backward  the same, and sum_r |needs(rank, r)|
        """
        others = [r for r in range(self.size) if r != rank]
        if method == "ring":
            there = [(j, (rank - j) % self.size) for j in others]
            there = [(j, h) for j, h in there if h <= self.hops[j]]
            rows = sum(length(self.travels(j, h)) for j, h in there)
            grads = sum(length(self.carried(j, h - 1)) for j, h in there)
            grads += length(self.carried(rank, self.hops[rank]))
        else:
            rows = sum(length(self.needs[j][rank]) for j in others)
            grads = sum(length(self.needs[rank][r]) for r in others)
        forward = rows * width * itemsize
        return Bytes(forward, forward + grads * width * grad_itemsize)


@lru_cache(maxsize=64)
def plan(queries: Layout, keys: Layout, offsets: tuple[int, ...]) -> Plan:
    """The layers of a model share one."""
    return Plan(queries, keys, offsets)
