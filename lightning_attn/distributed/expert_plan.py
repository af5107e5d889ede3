"""Which rows go where when experts are spread over ranks: pure functions of counts and shapes.

The ranks stand in a grid of EP x ETP; `Place` is one of them. Rank (e, t) holds the experts [e E / EP, (e + 1) E / EP), of
each the slice t of the intermediate dimension. A row is the hidden state of a pair (token, expert). The table of a token
group, [EP, ETP, E], counts the pairs of each rank's own tokens by expert; from it every rank knows all of these numbers:

    dispatch        (e, t) -> (e', t)       all-to-all of the rows, to the ranks that hold their experts
    all-gather      (e, t) -> (e, t')       every slice of an expert wants all rows of it
    reduce-scatter  (e, t) -> (e, t')       of what the slices made of them, back to where the all-gather took them from
    combine         (e, t) -> (e', t)       all-to-all, back to their tokens

The backward sends the gradients of the rows on the same ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .lasp_plan import even_cuts


@dataclass(frozen=True)
class Place:
    """A rank's coordinates in EP x ETP."""

    ep: int
    etp: int
    e: int
    t: int

    def experts(self, E: int) -> slice:
        """Those that the rank holds, of E."""
        each = E // self.ep
        return slice(self.e * each, (self.e + 1) * each)

    def columns(self, F: int) -> slice:
        """Its part of an intermediate dimension of F."""
        each = F // self.etp
        return slice(self.t * each, (self.t + 1) * each)


# ---- rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The rows of one token group that a rank sends and receives, and the bytes of them that come from other ranks: rows of
    D elements, of `itemsize` bytes each.
    """

    place: Place
    send: list[int]  # [EP] to each rank of the dispatch; the combine brings as many back
    receive: list[int]  # [EP] from each rank of the dispatch; the combine returns as many
    gathered: list[int]  # [ETP] what the dispatch brings to each rank of the all-gather

    @property
    def rows(self) -> int:
        """That the rank's experts compute."""
        return sum(self.gathered)

    def dispatch_bytes(self, D: int, itemsize: int) -> int:
        return (sum(self.receive) - self.receive[self.place.e]) * D * itemsize

    def all_gather_bytes(self, D: int, itemsize: int) -> int:
        return (self.rows - self.gathered[self.place.t]) * D * itemsize

    def reduce_scatter_bytes(self, D: int, itemsize: int) -> int:
        return (self.place.etp - 1) * self.gathered[self.place.t] * D * itemsize

    def combine_bytes(self, D: int, itemsize: int) -> int:
        return (sum(self.send) - self.send[self.place.e]) * D * itemsize

    def forward_bytes(self, D: int, itemsize: int) -> int:
        """Without the counts."""
        there = self.dispatch_bytes(D, itemsize) + self.all_gather_bytes(D, itemsize)
        return there + self.reduce_scatter_bytes(D, itemsize) + self.combine_bytes(D, itemsize)

    def backward_bytes(self, D: int, itemsize: int, need_x: bool = True, need_experts: bool = True) -> int:
        """As in the forward; nothing comes back if x needs no gradient, and nothing goes if the experts need none either."""
        if need_x:
            return self.forward_bytes(D, itemsize)
        there = self.dispatch_bytes(D, itemsize) + self.all_gather_bytes(D, itemsize)
        return there if need_experts else 0


def plan(table: Tensor, place: Place) -> Plan:
    """What the rank at `place` sends and receives of a token group, from its table of counts [EP, ETP, E] on the host."""
    EP, _, E = table.shape
    held = table[:, :, place.experts(E)].sum(
        2
    )  # [EP, ETP] rows of the rank's own experts, by where they are from
    mine = table[place.e, place.t].view(EP, E // EP).sum(1)
    return Plan(place, mine.tolist(), held[:, place.t].tolist(), held.sum(0).tolist())


def counts_bytes(place: Place, groups: int, E: int) -> int:
    """Received to know the tables of all token groups, int32."""
    return (place.ep * place.etp - 1) * groups * E * 4


def arrivals(table: Tensor, place: Place, rows: int) -> Tensor:
    """The expert of each of the `rows` rows that the rank computes, int32 [rows], numbered from its first, in the order in
    which they come: by rank of the all-gather, by rank of the dispatch, by expert. table as for `plan`, on any device.
    """
    EP, ETP, E = table.shape
    counts = table[:, :, place.experts(E)].transpose(0, 1).reshape(-1)  # [ETP * EP * E / EP]
    experts = torch.arange(E // EP, dtype=torch.int32, device=table.device).repeat(ETP * EP)
    return torch.repeat_interleave(experts, counts, output_size=rows)


def token_groups(tokens: int, groups: int) -> list[tuple[int, int]]:
    """Contiguous parts of nearly equal size, some empty if there are fewer tokens than groups."""
    return list(pairwise(even_cuts(tokens, groups)))


# ---- matrices -----------------------------------------------------------------------------------------------------


def shard(name: str, w: Tensor, place: Place) -> Tensor:
    """A copy of the part of a matrix of SparseMoE, or of its int8 scales, that the rank at `place` holds."""
    if name.startswith("gate"):
        if name == "gate.weight":
            return w.detach().clone()
        halves = w.detach()[place.experts(len(w))].unflatten(1, (2, -1))  # gate and up
        return (
            halves[:, :, place.columns(halves.shape[2])]
            .flatten(1, 2)
            .clone(memory_format=torch.contiguous_format)
        )
    w = w.detach()[place.experts(len(w))]
    if name == "down_proj":
        w = w[:, :, place.columns(w.shape[2])]
    return w.clone(memory_format=torch.contiguous_format)  # a scale of down belongs to all slices


def join(name: str, slices: Tensor) -> Tensor:
    """The slices [ETP, E / EP, ...] of the same experts -> their whole matrices, as `shard` cut them."""
    if name.startswith("gate_up"):
        return slices.unflatten(2, (2, -1)).movedim(0, 2).flatten(1, 3)
    if name == "down_proj":
        return slices.movedim(0, 2).flatten(2, 3)
    return slices[0]
