"""Beam search on a cache whose rows are the beams."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Beams:
    """The likeliest continuation among `width` at a time; scores are log p / length^length_penalty."""

    width: int = 4
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"Beams: expected width an int >= 1, got {self.width!r}")
        if not isinstance(self.length_penalty, (int, float)) or not abs(self.length_penalty) <= 20:
            raise ValueError(f"Beams: expected length_penalty in [-20, 20], got {self.length_penalty!r}")


@dataclass
class _Hypotheses:
    """What one prompt has finished: the `width` best by log p / length^penalty."""

    width: int
    penalty: float
    finished: list[tuple[float, list[int]]] = field(default_factory=list)

    def score(self, log_p: float, length: int) -> float:
        return log_p / length**self.penalty

    def add(self, log_p: float, tokens: list[int]) -> None:
        self.finished.append((self.score(log_p, len(tokens)), tokens))
        self.finished.sort(key=lambda pair: -pair[0])
        del self.finished[self.width :]

    def closed(self, best: float, length: int) -> bool:
        """Whether the best running beam, at its present length, is behind all that is finished."""
        return len(self.finished) == self.width and self.score(best, length) <= self.finished[-1][0]


def search(
    logits: Tensor,
    advance: Callable[[Tensor, Tensor], Tensor],
    method: Beams,
    *,
    max_new_tokens: int,
    eos: Collection[int],
) -> list[list[int]]:
    """The best continuation of each prompt.

    Args:
        logits: [B, V], after the prompts.
        advance: (rows [B W] int64, tokens [B W] int64) -> logits [B W, V], W = method.width: row i goes on from what row
            rows[i] was, with tokens[i]. At first there are B rows, one for each prompt.
        max_new_tokens: at most so many tokens.
        eos: what ends a continuation, which includes it.

    Returns:
        The tokens of each prompt's best hypothesis.
    """
    B, V = logits.shape
    W, stop = method.width, set(eos)
    results = [_Hypotheses(W, method.length_penalty) for _ in range(B)]
    beams: list[list[list[int]]] = [[[]] for _ in range(B)]  # tokens of each prompt's running beams
    totals = logits.new_zeros(B, 1, dtype=torch.float64)  # their log probabilities
    open_ = [True] * B
    for length in range(1, max_new_tokens + 1):
        n = totals.shape[1]
        scores = totals[:, :, None] + logits.double().log_softmax(-1).view(B, n, V)
        # Of 2 W candidates W at least are no end, as a beam has one end for each eos: (eos + 1) W for several.
        count = min((len(stop) + 1) * W, n * V)
        values, flat = (x.cpu() for x in scores.view(B, n * V).topk(count))
        rows, tokens, kept = [], [], []
        for b in range(B):
            running: list[tuple[float, int, int]] = []  # (log p, beam, token)
            for rank, (total, i) in enumerate(zip(values[b].tolist(), flat[b].tolist(), strict=True)):
                beam, token = divmod(i, V)
                if token in stop:
                    if rank < W and open_[b]:
                        results[b].add(total, [*beams[b][beam], token])
                elif len(running) < W:
                    running.append((total, beam, token))
            best = running[0][0] if running else -torch.inf
            open_[b] = open_[b] and not results[b].closed(best, length)
            running += [(-torch.inf, 0, 0)] * (W - len(running))  # a vocabulary of fewer tokens than beams
            rows += [b * n + beam for _, beam, _ in running]
            tokens += [token for _, _, token in running]
            kept.append([total for total, _, _ in running])
            beams[b] = [[*beams[b][beam], token] for _, beam, token in running]
        if not any(open_) or length == max_new_tokens:
            break
        totals = torch.tensor(kept, dtype=torch.float64, device=logits.device)
        logits = advance(torch.tensor(rows), torch.tensor(tokens))
    for b in range(B):
        for total, beam in zip(kept[b], beams[b], strict=True) if open_[b] else ():
            if total > -torch.inf:
                results[b].add(total, beam)
    return [result.finished[0][1] for result in results]
