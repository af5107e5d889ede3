"""What the cases have in common that multiply by matrices of experts: cold matrices, CUDA graphs, what they need."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch

from . import cases
from .case import FORWARD, GRAPH, TRAIN, Case, Tensors
from .eager import Function
from .graph import Replayed
from .timing import synchronize

LARGE = (
    2**28
)  # numbers in the matrices: beyond, only some experts are checked, for all in float64 would not fit


@dataclass(frozen=True)
class Weighted(Case):
    """Base of what multiplies by matrices of E experts, `names` among the inputs, each [E, N, K]."""

    E: int
    possible_passes = (*Case.possible_passes, GRAPH)

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]: ...

    @property
    @abstractmethod
    def numbers(self) -> int:
        """In the matrices of one expert."""

    @property
    @abstractmethod
    def used(self) -> int:
        """How many experts have rows."""

    @property
    @abstractmethod
    def checked(self) -> int:
        """How many are checked, if not all are."""

    @property
    def expert_bytes(self) -> int:
        """The matrices of one expert."""
        return self.numbers * self.dtype.itemsize

    @property
    def large(self) -> bool:
        return self.E * self.numbers > LARGE

    @property
    def needed_bytes(self) -> int:
        """The matrices, their copies, gradients and truth."""
        checked = self.checked if self.large else self.E
        train = self.fullest_pass == TRAIN
        copies = self._cold_copies + (2 if train else 0)
        truth = checked * self.numbers * (8 + self.dtype.itemsize) * (2 if train else 1)
        return self.E * self.expert_bytes * copies + truth

    def evaluate(self, function: Function, inputs: Tensors, pass_: str) -> Tensors:
        """GRAPH: of the last call in a replay of the very graph that is timed."""
        if pass_ != GRAPH:
            return super().evaluate(function, inputs, pass_)
        replayed = self._replayed(function, inputs)
        outputs = replayed()
        synchronize(inputs["x"].device)  # a graph is not to go while it runs
        return outputs

    def step(self, function: Function, inputs: Tensors, pass_: str) -> Callable[[], object]:
        """In a model the matrices of all other layers pass through the caches between two calls, so those of a forward
        pass go round enough copies of the matrices to meet each one cold. GRAPH: one round.
        """
        if pass_ == GRAPH:
            return self._replayed(function, inputs)
        if pass_ != FORWARD:
            return super().step(function, inputs, pass_)
        copies = cycle(self._copies(inputs, self._cold_copies))
        return lambda: self.evaluate(function, next(copies), FORWARD)

    def calls_per_step(self, pass_: str) -> int:
        return min(self._cold_copies, cases.GRAPH_CALLS) if pass_ == GRAPH else 1

    @property
    def _cold_copies(self) -> int:
        """How many copies of the matrices no cache holds together, as far as they are read."""
        read = self.used * self.expert_bytes
        return -(-cases.COLD_BYTES // read) if read else 1

    def _copies(self, inputs: Tensors, copies: int) -> list[Tensors]:
        return [inputs, *(inputs | {n: inputs[n].clone() for n in self.names} for _ in range(copies - 1))]

    def _replayed(self, function: Function, inputs: Tensors) -> Replayed[Tensors]:
        copies = self._copies(inputs, self.calls_per_step(GRAPH))

        @torch.no_grad()
        def round_() -> Tensors:
            return [self.call(function, copy) for copy in copies][-1]

        return Replayed(round_, inputs["x"].device)
