"""The error rule, one home for `check` and `bench`.

The error of an output is its greatest absolute difference from the truth (float64 on the same rounded inputs)
over the greatest absolute value of the truth. It is allowed twice the error of the plain PyTorch version in
the same dtype plus one rounding, the eps of the output's dtype. Of whole numbers the error is the share of those
that are wrong, and none is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import BACKWARD, FORWARD, GRAPH, TRAIN, Case, Tensors
from .eager import Function


@dataclass(frozen=True)
class Verdict:
    """One output of one op: error and bound relative to the truth, or what the op raised in its stead."""

    output: str
    error: float
    allowed: float
    raised: str | None = None

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # false when the error is NaN

    @property
    def strain(self) -> float:
        """The share of the allowance that is used up, for finding the worst of many."""
        if self.raised or math.isnan(self.error) or not self.allowed:
            return 0.0 if self.ok and not self.raised else math.inf
        return self.error / self.allowed

    def __str__(self) -> str:
        return self.raised or f"{self.output}: error {self.error:.2e}, allowed {self.allowed:.2e}"


def relative_error(x: Tensor, truth: Tensor) -> float:
    if x.shape != truth.shape:
        return math.inf
    if truth.numel() == 0:
        return 0.0
    if not truth.is_floating_point():
        return (x != truth).double().mean().item()
    largest = truth.abs().max().item()
    return (x.double() - truth).abs().max().item() / (largest or 1.0)


RAISED_CHARACTERS = 2000  # a compiler may have a lot to say
# The passes that give the outputs of others by the shortest way, for the truth.
SHORTEST = {BACKWARD: TRAIN, GRAPH: FORWARD}


class Judge:
    """Knows the truth of one case and what it allows; both are worked out once, whoever is judged. `pass_` is one
    that has all the outputs that will be judged.
    """

    def __init__(self, case: Case, inputs: Tensors, pass_: str) -> None:
        self.case, self.inputs, self.pass_ = case, inputs, pass_
        sample, shortest = case.sample(inputs), SHORTEST.get(pass_, pass_)
        wide = {name: _float64(name, t) for name, t in sample.items()}
        self.truth = case.judged(case.evaluate(case.truth, wide, shortest))
        self.plain = {
            name: (x.dtype, relative_error(x, self.truth[name]))
            for name, x in case.judged(case.evaluate(case.plain, sample, shortest)).items()
        }

    def verdicts(self, function: Function, pass_: str | None = None) -> list[Verdict]:
        """On a version of the op at a pass, output by output. One that raises fails, and stops nothing else."""
        try:
            outputs = self.case.evaluate(function, self.inputs, pass_ or self.pass_)
            return [self._verdict(name, x) for name, x in self.case.judged(self.case.sample(outputs)).items()]
        except Exception as error:  # noqa: BLE001 - whatever a backend raises is its verdict
            return [failed(error)]

    def _verdict(self, name: str, x: Tensor) -> Verdict:
        dtype, plain = self.plain[name]
        error = relative_error(x, self.truth[name]) if x.dtype == dtype else math.inf
        if not dtype.is_floating_point:
            return Verdict(name, error, 0.0)
        return Verdict(name, error, (2 * plain if math.isfinite(plain) else 0.0) + torch.finfo(dtype).eps)


def failed(error: Exception) -> Verdict:
    """On what raised."""
    return Verdict("-", math.inf, 0.0, f"{type(error).__name__}: {error}"[:RAISED_CHARACTERS])


def _float64(name: str, t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() and name != "decay" else t
