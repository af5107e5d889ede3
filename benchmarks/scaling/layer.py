"""What is planned, what comes of it for one operation, and what operations share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .rates import Array, Model, Rates


@dataclass(frozen=True)
class Layer:
    """What is planned: a model on R ranks that share a sequence of T tokens; experts over at most ep x etp ranks."""

    model: Model
    rates: Rates
    ranks: int
    tokens: int
    document: int | None = None  # tokens of each packed document, the last may be shorter; None: one document
    ep: int = 32
    etp: int = 8

    @property
    def own(self) -> int:
        """The most tokens of a rank."""
        return -(-self.tokens // self.ranks)

    @property
    def offsets(self) -> list[int]:
        """cu_seqlens."""
        return [*range(0, self.tokens, self.document or self.tokens), self.tokens]


@dataclass(frozen=True)
class Part:
    """The forward or the backward of an operation. Bytes by rank, [R], or [1] where all have the same."""

    received: Array
    near: Array  # of these, from ranks of the same node
    sent: Array
    messages: int  # one after another
    compute: float  # seconds of the busiest rank
    hides: float  # of these, what can run while bytes are on their way


Parts = tuple[Part, Part]  # the forward, the backward


class Impossible(ValueError):
    """Not on so many ranks."""


def even(layer: Layer, bytes_: int, messages: int, compute: float, hides: float) -> Part:
    """The same for every rank, from all others alike."""
    whole = np.array([bytes_], np.int64)
    return Part(whole, whole * layer.rates.near(layer.ranks), whole, messages, compute, hides)


def doublings(ranks: int) -> int:
    """Messages of an all-gather that doubles what each rank has."""
    return (ranks - 1).bit_length()
