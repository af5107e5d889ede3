"""What the cases of the mixture of experts are fed: experts of tokens, rows of groups, logits, matrices.

The experts are drawn on the CPU, whatever the device, for the bytes of a case depend on them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .case import Normal

# How tokens are spread over the experts: evenly; most on the first ones; every one on the expert in the middle; none on
# those of odd numbers.
SPREADS = ("balanced", "skewed", "one", "idle")
MARGIN = 1.25  # at least, between the logits of a token's experts and all others
STEP = 0.25  # at least, between the logits of a token's experts


@lru_cache(maxsize=64)
def experts(spread: str, T: int, E: int, k: int) -> Tensor:
    """[T, k] int32, those of a token all different."""
    if spread == "idle" and k > (E + 1) // 2:
        raise ValueError(f"expected at most {(E + 1) // 2} experts a token, for the others are idle, got {k}")
    shares = torch.tensor(_shares(spread, E)).clamp_(min=1e-30)
    noise = torch.rand(T, E, generator=_generator()).clamp_(min=1e-6)
    # The k largest of share / -log(noise): drawn without replacement, with the chances of the shares.
    return (shares.log() - (-noise.log()).log()).topk(k).indices.to(torch.int32)


def touched(chosen: Tensor) -> int:
    """How many experts have a token."""
    return chosen.unique().numel()


def group_sizes(spread: str, M: int, E: int) -> list[int]:
    """The rows of each group, in proportion to its share."""
    shares = _shares(spread, E)
    ends = [round(M * end / sum(shares)) for end in accumulate(shares)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _shares(spread: str, E: int) -> list[float]:
    shares = {
        "balanced": [1.0] * E,
        "skewed": [1 / (e + 1) for e in range(E)],
        "one": [float(e == E // 2) for e in range(E)],
        "idle": [float(e % 2 == 0) for e in range(E)],
    }
    return shares[spread]


def separated_logits(chosen: Tensor, E: int) -> Tensor:
    """[T, E] float32 whose top k are `chosen`, in that order, with nothing near a tie: those are at least MARGIN above
    all others and STEP from each other, which no rounding to a dtype closes.
    """
    T, k = chosen.shape
    generator = _generator()
    logits = torch.randn(T, E, generator=generator).clamp_(max=4 - MARGIN + STEP)
    steps = STEP + torch.rand(T, k, generator=generator)
    return logits.scatter_(1, chosen.long(), 4 + steps.flip(1).cumsum(1).flip(1))


def tied_logits(T: int, E: int) -> Tensor:
    """[T, E] float32, whole numbers from -2 to 2: most are equal to another of their row."""
    return torch.randint(-2, 3, (T, E), generator=_generator()).float()


def routed(logits: Tensor, normal: Normal, D: int) -> tuple[Tensor, Tensor]:
    """x [T, D] and gate [E, D] with `x gate^T = logits` but for rounding: the rows of the gate are orthonormal, and x is
    noise beside them.
    """
    E = logits.shape[1]
    if E > D:
        raise ValueError(f"expected at most {D} experts, for as many orthogonal rows of the gate, got {E}")
    gate = torch.linalg.qr(torch.randn(D, E, generator=_generator(), dtype=torch.float64)).Q.mT
    gate, logits = gate.to(normal.device, torch.float32), logits.to(normal.device)
    noise = normal(len(logits), D, dtype=torch.float32)
    x = noise + (logits - noise @ gate.mT) @ gate
    return x.to(normal.dtype), gate.to(normal.dtype)


def matrices(normal: Normal, E: int, N: int, K: int) -> Tensor:
    """[E, N, K] that keep the size of what they multiply; one at a time, for all in float32 may not fit."""
    w = torch.empty(E, N, K, dtype=normal.dtype, device=normal.device)
    for matrix in w:
        matrix.copy_(normal(N, K) * K**-0.5)
    return w


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
