"""Tokens of sequences of different lengths, by position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .step import Step


class Rows:
    """Tokens of B sequences by position, [B, capacity, ...], without padding; grows by doubling. With `keep`, what lies
    further back than that many tokens may be dropped.
    """

    def __init__(self, B: int, keep: int | None = None) -> None:
        self.keep, self.dropped = keep, [0] * B
        self.buffer: Tensor | None = None

    def write(self, x: Tensor, step: Step) -> None:
        """x [B, T, ...]: the step's tokens."""
        self._reserve(x, step)
        assert self.buffer is not None
        if step.uniform and self.level:
            first = step.starts[0] - self.dropped[0] if step.starts else 0
            self.buffer[:, first : first + x.shape[1]] = x
            return
        places = step.positions - torch.tensor(self.dropped, device=x.device)[:, None]
        rows = torch.arange(len(x), device=x.device)[:, None].expand_as(places)
        if step.mask is not None:
            x, places, rows = x[step.mask], places[step.mask], rows[step.mask]
        self.buffer[rows, places] = x

    @property
    def level(self) -> bool:
        """All rows have dropped as many."""
        return len(set(self.dropped)) <= 1

    def _reserve(self, x: Tensor, step: Step) -> None:
        held = [start - dropped for start, dropped in zip(step.starts, self.dropped, strict=True)]
        needed = max((end - d for end, d in zip(step.ends, self.dropped, strict=True)), default=x.shape[1])
        capacity = 0 if self.buffer is None else self.buffer.shape[1]
        if needed <= capacity and self.buffer is not None:
            return
        excess = [0 if self.keep is None else max(n - self.keep, 0) for n in held]
        needed = max((n - e + x.shape[1] for n, e in zip(held, excess, strict=True)), default=x.shape[1])
        tokens = max(needed, 2 * capacity) if self.keep is None else max(2 * needed, capacity)
        with torch.inference_mode(False):  # to be written to outside of it, too
            # Zeros: what no query sees is multiplied all the same.
            grown = torch.zeros(len(x), tokens, *x.shape[2:], device=x.device, dtype=x.dtype)
        for b, (n, e) in enumerate(zip(held, excess, strict=True)):
            if n > e and self.buffer is not None:
                grown[b, : n - e] = self.buffer[b, e:n]
        self.buffer = grown
        self.dropped = [d + e for d, e in zip(self.dropped, excess, strict=True)]

    def view(self, ends: Sequence[int]) -> Tensor:
        """[B, L, ...], L the most tokens that a row holds; ends [B]: how many came, with those that were dropped."""
        assert self.buffer is not None
        held = (end - dropped for end, dropped in zip(ends, self.dropped, strict=True))
        return self.buffer[:, : max(held, default=self.buffer.shape[1])]

    def select(self, rows: Tensor) -> None:
        self.dropped = [self.dropped[b] for b in rows.tolist()]
        if self.buffer is not None:
            self.buffer = self.buffer[rows.to(self.buffer.device)]

    def positions(self, ends: Sequence[int]) -> Tensor:
        """[B, L] int64: of what `view` gives."""
        view = self.view(ends)
        first = torch.tensor(self.dropped, device=view.device)[:, None]
        return first + torch.arange(view.shape[1], device=view.device)
