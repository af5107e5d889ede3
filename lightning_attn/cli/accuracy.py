"""The error rule, one home for `check` and `bench`.

The error of an output is its greatest absolute difference from the truth (float64 on the same rounded inputs)
over the greatest absolute value of the truth. It is allowed twice the error of the plain PyTorch version in
the same dtype plus one rounding, the eps of the output's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import FORWARD, Case, Tensors
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
        return math.inf if self.raised or math.isnan(self.error) else self.error / self.allowed

    def __str__(self) -> str:
        return self.raised or f"{self.output}: error {self.error:.2e}, allowed {self.allowed:.2e}"


def relative_error(x: Tensor, truth: Tensor) -> float:
    if x.shape != truth.shape:
        return math.inf
    if truth.numel() == 0:
        return 0.0
    largest = truth.abs().max().item()
    return (x.double() - truth).abs().max().item() / (largest or 1.0)


class Judge:
    """Knows the truth of one case and what it allows; both are worked out once, whoever is judged."""

    def __init__(self, case: Case, inputs: Tensors, pass_: str) -> None:
        self.case, self.inputs, self.pass_ = case, inputs, pass_
        sample = case.sample(inputs)
        self.truth = case.evaluate(case.truth, {name: _float64(name, t) for name, t in sample.items()}, pass_)
        self.plain = {
            name: (x.dtype, relative_error(x, self.truth[name]))
            for name, x in case.evaluate(case.plain, sample, pass_).items()
        }

    def verdicts(self, function: Function) -> list[Verdict]:
        """On a version of the op, output by output. One that raises fails, and stops nothing else."""
        try:
            outputs = self.case.sample(self.case.evaluate(function, self.inputs, self.pass_))
        except Exception as error:  # noqa: BLE001 - whatever a backend raises is its verdict
            return [Verdict("-", math.inf, 0.0, f"{type(error).__name__}: {error}")]
        return [self._verdict(name, x) for name, x in outputs.items()]

    def _verdict(self, name: str, x: Tensor) -> Verdict:
        dtype, plain = self.plain[name]
        error = relative_error(x, self.truth[name]) if x.dtype == dtype else math.inf
        return Verdict(name, error, (2 * plain if math.isfinite(plain) else 0.0) + torch.finfo(dtype).eps)


def of_pass(verdicts: list[Verdict], pass_: str, case: Case) -> list[Verdict]:
    """The verdicts that decide on a pass: the forward pass answers for the outputs, not for the gradients."""
    return [v for v in verdicts if pass_ != FORWARD or v.output not in case.gradients]


def _float64(name: str, t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() and name != "decay" else t
