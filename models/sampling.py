"""The next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from softmax(logits / temperature), cut to
    the top_k likeliest and to the likeliest whose probabilities reach top_p together (arXiv 1904.09751; one at least).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        if not isinstance(t, (int, float)) or not 0 <= t < math.inf:
            raise ValueError(f"Sampling: expected temperature finite and >= 0, got {t!r}")
        if k is not None and (not isinstance(k, int) or k < 1):
            raise ValueError(f"Sampling: expected top_k an int >= 1, got {k!r}")
        if p is not None and (not isinstance(p, (int, float)) or not 0 < p <= 1):
            raise ValueError(f"Sampling: expected top_p in (0, 1], got {p!r}")
        if t == 0 and (k, p) != (None, None):
            raise ValueError(
                "Sampling: expected a temperature > 0 with top_k or top_p, got 0, which is greedy: give a temperature"
            )

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """logits [B, V] -> tokens [B] int64. Ties of the likeliest go to the lowest id. Raises ValueError for NaN."""
        if logits.isnan().any():
            raise ValueError("Sampling: expected logits without NaN, got some: is the checkpoint damaged?")
        if self.temperature == 0:
            return logits.argmax(-1)
        return self.probabilities(logits).multinomial(1, generator=generator)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """What `choose` draws from, [B, V] float64, as a temperature may be as small as that."""
        logits = logits.double()
        # The largest first: a small temperature must not overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        if self.top_k is not None:
            p[:, self.top_k :] = 0
        if self.top_p is not None:
            p /= p.sum(-1, keepdim=True)
            p[p.cumsum(-1) - p >= self.top_p] = 0  # what comes before it is enough
        return torch.zeros_like(p).scatter_(1, ids, p / p.sum(-1, keepdim=True))


GREEDY = Sampling()
