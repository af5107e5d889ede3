"""Keys and values on their way from rank to rank, and their gradients on their way home."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .comm import Ranks
from .ring_plan import Plan, Ranges, length, within


class Rows:
    """Rows of keys and values of one rank, k [rows, G, D] and v [rows, G, D_v], in one message."""

    def __init__(self, rows: Ranges, message: Tensor, like_k: Tensor, like_v: Tensor) -> None:
        self.rows, self.message, count = rows, message, length(rows)
        k, v = message.split([count * math.prod(like_k.shape[1:]), count * math.prod(like_v.shape[1:])])
        self.k, self.v = k.view(count, *like_k.shape[1:]), v.view(count, *like_v.shape[1:])

    @staticmethod
    def empty(rows: Ranges, k: Tensor, v: Tensor) -> Rows:
        return Rows(rows, k.new_empty(length(rows) * _width(k, v)), k, v)

    @staticmethod
    def zeros(rows: Ranges, k: Tensor, v: Tensor) -> Rows:
        return Rows(rows, k.new_zeros(length(rows) * _width(k, v)), k, v)

    def add(self, other: Rows) -> None:
        """Where `other`, a part of these rows, belongs."""
        start = 0
        for begin, end in within(self.rows, other.rows):
            self.k[begin:end] += other.k[start : start + end - begin]
            self.v[begin:end] += other.v[start : start + end - begin]
            start += end - begin


def _width(k: Tensor, v: Tensor) -> int:
    return math.prod(k.shape[1:]) + math.prod(v.shape[1:])


def _packed(rows: Ranges, k: Tensor, v: Tensor) -> Tensor:
    """The message of these rows."""
    parts = [x[begin:end].flatten() for x in (k, v) for begin, end in rows]
    return torch.cat(parts) if parts else k.new_empty(0)


class Piece(NamedTuple):
    """Keys and values of one rank, those of its rows that are here."""

    owner: int
    rows: Ranges
    k: Tensor
    v: Tensor


def pieces(method: str, ranks: Ranks, plan: Plan, k: Tensor, v: Tensor) -> Iterator[Piece]:
    """First this rank's own, then what comes from the others, on its way while the caller is at work on the one before."""
    own = Piece(ranks.rank, plan.held[ranks.rank], k, v)
    return (_ring if method == "ring" else _exchanged)(ranks, plan, own)


def _ring(ranks: Ranks, plan: Plan, own: Piece) -> Iterator[Piece]:
    piece, before, behind = own, (ranks.rank - 1) % ranks.size, (ranks.rank + 1) % ranks.size
    for step in range(1, plan.steps + 2):
        onward = within(piece.rows, plan.travels(piece.owner, step))
        owner = (piece.owner - 1) % ranks.size
        coming = Rows.empty(plan.travels(owner, step), own.k, own.v)
        pending = ranks.pass_on([(behind, _packed(onward, piece.k, piece.v))], [(before, coming.message)])
        yield piece
        pending.wait()
        piece = Piece(owner, coming.rows, coming.k, coming.v)


def _exchanged(ranks: Ranks, plan: Plan, own: Piece) -> Iterator[Piece]:
    if not plan.steps:  # on every rank
        yield own
        return
    needs = [() if j == ranks.rank else plan.needs[j][ranks.rank] for j in range(ranks.size)]
    needed = [() if r == ranks.rank else plan.needs[ranks.rank][r] for r in range(ranks.size)]
    send, receive = ([length(rows) * _width(own.k, own.v) for rows in them] for them in (needed, needs))
    pending = ranks.all_to_all(torch.cat([_packed(rows, own.k, own.v) for rows in needed]), send, receive)
    yield own
    came = pending.wait().split(receive)
    for owner in _others(ranks):
        there = Rows(needs[owner], came[owner], own.k, own.v)
        yield Piece(owner, there.rows, there.k, there.v)


def _others(ranks: Ranks) -> list[int]:
    """The owners in the order of the ring."""
    return [(ranks.rank - h) % ranks.size for h in range(1, ranks.size)]


class RingReturns:
    """Gradients follow the keys and values one step behind, each rank adding its own, and go home from the last.

    At step s this rank is at work for the owner rank - s, and what it made at step s - 1 is on its way.
    """

    def __init__(self, ranks: Ranks, plan: Plan, k: Tensor, v: Tensor) -> None:
        self.ranks, self.plan, self.like = ranks, plan, (k, v)
        self.own = self.made = Rows.zeros(plan.held[ranks.rank], k, v)
        self.home: Rows | None = None

    def begin(self, step: int, owner: int) -> Rows:
        """Where the gradients of this step are added up."""
        self._exchange(step)
        if step > 0:
            rows = self.plan.carried(owner, step) if step <= self.plan.hops[owner] else ()
            self.made = Rows.zeros(rows, *self.like)
        return self.made

    def end(self) -> None:
        self.pending.wait()
        self.made.add(self.arrived)

    def finish(self) -> Rows:
        self._exchange(self.plan.steps + 1)
        self.pending.wait()
        if self.home is not None:
            self.own.add(self.home)
        return self.own

    def _exchange(self, step: int) -> None:
        rank, size, hops = self.ranks.rank, self.ranks.size, self.plan.hops
        send, receive = [], []
        last, owner = (rank - step + 1) % size, (rank - step) % size
        if 1 <= step - 1 <= hops[last]:
            send.append(((rank + 1) % size if step <= hops[last] else last, self.made.message))
        follows = 2 <= step <= hops[owner]
        self.arrived = Rows.empty(self.plan.carried(owner, step - 1) if follows else (), *self.like)
        receive.append(((rank - 1) % size, self.arrived.message))
        if hops[rank] and step == hops[rank] + 1:
            self.home = Rows.empty(self.plan.carried(rank, hops[rank]), *self.like)
            receive.append(((rank + hops[rank]) % size, self.home.message))
        self.pending = self.ranks.pass_on(send, receive)


class ExchangedReturns:
    """Gradients go home in one exchange at the end and are added by the owner, in the order of the ranks."""

    def __init__(self, ranks: Ranks, plan: Plan, k: Tensor, v: Tensor) -> None:
        self.ranks, self.plan, self.like = ranks, plan, (k, v)
        self.made: dict[int, Rows] = {}

    def begin(self, step: int, owner: int) -> Rows:
        rank = self.ranks.rank
        rows = self.plan.held[rank] if owner == rank else self.plan.needs[owner][rank]
        self.made[owner] = Rows.zeros(rows, *self.like)
        return self.made[owner]

    def end(self) -> None:
        pass

    def finish(self) -> Rows:
        own = self.made.pop(self.ranks.rank)
        if not self.plan.steps:
            return own
        made = [self.made[j].message if j in self.made else own.message[:0] for j in range(self.ranks.size)]
        needed = [
            () if r == self.ranks.rank else rows for r, rows in enumerate(self.plan.needs[self.ranks.rank])
        ]
        receive = [length(rows) * _width(*self.like) for rows in needed]
        came = self.ranks.all_to_all(torch.cat(made), [len(x) for x in made], receive).wait().split(receive)
        for rows, message in zip(needed, came, strict=True):
            own.add(Rows(rows, message, *self.like))
        return own


def returns(method: str, ranks: Ranks, plan: Plan, k: Tensor, v: Tensor) -> RingReturns | ExchangedReturns:
    """How the gradients of what `pieces` gives go home; k and v: like them, without rows."""
    return (RingReturns if method == "ring" else ExchangedReturns)(ranks, plan, k, v)
