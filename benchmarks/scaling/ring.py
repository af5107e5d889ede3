"""The rows that every rank receives in ring attention, for thousands of ranks: `ring_plan.Plan.received` in O(R).

A piece [a, b) of the sequence is wanted beyond b by one document at most, the one that crosses b: of the piece its last rows,
from that document's start on, by every piece from there to the one where the document ends. So a piece is a number of rows
and at most two intervals of ranks, and the sums of the plan are sums over intervals. tests/test_scaling.py compares the two.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .rates import Array

Interval = tuple[int, int]  # of ranks, both ends in it


@dataclass(frozen=True)
class Rows:
    """Of keys and values (forward, and again in the backward) and of their gradients (backward), by rank: int64 [R].
    `near`: of what is received, what comes from a rank of the same node. `messages`: of the forward, one after another.
    """

    received: Array
    near: Array
    sent: Array
    gradients: Array
    gradients_near: Array
    gradients_sent: Array
    messages: int

    def bytes(self, width: int, itemsize: int, grad_itemsize: int) -> tuple[Array, Array]:
        """Received in the forward and in the backward, by rank: as `ring_plan.Plan.received` has it."""
        forward = self.received * width * itemsize
        return forward, forward + self.gradients * width * grad_itemsize


def rows(cuts: Sequence[int], offsets: Sequence[int], *, zigzag: bool, method: str, node: int) -> Rows:
    """For strictly increasing cuts, R + 1 of them or with zigzag 2R + 1, in nodes of `node` ranks."""
    R = (len(cuts) - 1) // (2 if zigzag else 1)
    wanted = _all_wanted(tuple(cuts), tuple(offsets), R, zigzag)
    return _ring(wanted, R, node) if method == "ring" else _all_gather(wanted, R, node)


Wanted = list[tuple[int, list[Interval]]]  # rows of a rank's piece, and the other ranks that want them


@lru_cache(maxsize=4)
def _all_wanted(cuts: tuple[int, ...], offsets: tuple[int, ...], R: int, zigzag: bool) -> list[Wanted]:
    return [_wanted(cuts, offsets, j, R, zigzag) for j in range(R)]


def _wanted(cuts: Sequence[int], offsets: Sequence[int], j: int, R: int, zigzag: bool) -> Wanted:
    found: Wanted = []
    for piece in (j, 2 * R - 1 - j) if zigzag else (j,):
        begin, end = cuts[piece], cuts[piece + 1]
        document = bisect_right(offsets, end) - 1
        if document == len(offsets) - 1 or offsets[document] == end:
            continue  # no document crosses the end of the piece
        last = bisect_right(cuts, offsets[document + 1] - 1) - 1
        mirror = 2 * R - 1 - last  # the rank of the last piece, if that is a rank's second
        if not zigzag or last < R:
            ranks = [(j + 1, last)]
        elif piece < R:
            ranks = [(min(j + 1, mirror), j - 1), (j + 1, R - 1)]
        else:
            ranks = [(mirror, j - 1)]
        if ranks := [(low, high) for low, high in ranks if low <= high]:
            found.append((end - max(begin, offsets[document]), ranks))
    return found


def _ring(wanted: list[Wanted], R: int, node: int) -> Rows:
    """Rows go from rank to rank as far as they are wanted; their gradients one step behind, from the first rank that made
    some to the last of the owner's, and from there home.
    """
    along, gradients = _Sums(R), _Sums(R)
    home, home_near, home_sent = (np.zeros(R, np.int64) for _ in range(3))
    messages = 0
    for j, pieces in enumerate(wanted):
        hops = [
            [(low - j) % R for low, _ in ranks] + [(high - j) % R for _, high in ranks] for _, ranks in pieces
        ]
        last = max((max(far) for far in hops), default=0)
        messages = max(messages, last)
        for (n, _), far in zip(pieces, hops, strict=True):
            along.add(j + 1, max(far), n)
            gradients.add(j + min(far) + 1, last - min(far), n)
            home[j] += n
        if last:
            to = (j + last) % R
            home_sent[to] += home[j]
            home_near[j] = home[j] * (to // node == j // node)
    inside = np.arange(R) % node > 0  # the rank before is in the same node
    inside[0] = R <= node
    came, gradients_came = along.total(), gradients.total()
    return Rows(
        received=came,
        near=came * inside,
        sent=np.roll(came, -1),
        gradients=gradients_came + home,
        gradients_near=gradients_came * inside + home_near,
        gradients_sent=np.roll(gradients_came, -1) + home_sent,
        messages=messages,
    )


def _all_gather(wanted: list[Wanted], R: int, node: int) -> Rows:
    """Rows go straight to the ranks that want them, and gradients straight back."""
    received, near = _Sums(R), _Sums(R)
    sent, sent_near = np.zeros(R, np.int64), np.zeros(R, np.int64)
    for j, pieces in enumerate(wanted):
        first = j - j % node
        for n, ranks in pieces:
            for low, high in ranks:
                a, b = max(low, first), min(high, first + node - 1)
                received.add(low, high - low + 1, n)
                near.add(a, b - a + 1, n)
                sent[j] += n * (high - low + 1)
                sent_near[j] += n * max(b - a + 1, 0)
    came = received.total()
    messages = R - 1 if came.any() else 0
    return Rows(came, near.total(), sent, sent, sent_near, came, messages)


class _Sums:
    """Numbers [R] to which a value is added on intervals of ranks, round the ring."""

    def __init__(self, R: int) -> None:
        self.R, self.steps = R, np.zeros(2 * R + 1, np.int64)

    def add(self, first: int, count: int, value: int) -> None:
        if count > 0:
            first %= self.R
            self.steps[first] += value
            self.steps[first + count] -= value

    def total(self) -> Array:
        turns = self.steps.cumsum()[: 2 * self.R]
        return turns[: self.R] + turns[self.R :]


def pairs(cuts: Sequence[int], offsets: Sequence[int], *, zigzag: bool) -> Array:
    """Of query and key that each rank computes, [R]: token t of a document that begins at s sees t - s + 1 keys."""
    R = (len(cuts) - 1) // (2 if zigzag else 1)
    bounds = np.unique(np.concatenate([np.asarray(cuts, np.int64), np.asarray(offsets, np.int64)]))
    begin, end = bounds[:-1], bounds[1:]
    start = np.asarray(offsets, np.int64)[np.searchsorted(offsets, begin, "right") - 1]
    piece = np.searchsorted(cuts, begin, "right") - 1
    rank = np.minimum(piece, 2 * R - 1 - piece) if zigzag else piece
    found = np.zeros(R, np.int64)
    np.add.at(found, rank, (end - begin) * (begin + end - 2 * start + 1) // 2)
    return found
