"""What generation carries from token to token: lightning states, keys and values, and how to go back."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LIGHTNING, TextConfig
from .rows import Rows
from .step import Step


@dataclass
class Snapshot:
    lengths: list[int]  # [B], of each row when it was taken; -1 where the row has gone another way since
    states: dict[int, Tensor]  # by layer


class Cache:
    """The state of generation for B sequences of different lengths.

    A lightning layer holds [B, H, D, D] float32 whatever the length, updated in place; a softmax layer its keys and
    values. Padding is never stored, so a row depends on nothing but its own tokens.

    With `rollback`, `crop` can go back to any earlier length: snapshots of the lightning states are kept, about as many
    as the logarithm of the length, the closer the later, and what was fed since is run again by the next
    forward pass. That costs a snapshot now and then and the inputs' embeddings, [B, length, hidden].
    """

    SNAPSHOT_EVERY = 16  # tokens, at least: a snapshot in each decode step would double its traffic

    def __init__(self, config: TextConfig, batch_size: int, *, rollback: bool = True) -> None:
        if not isinstance(batch_size, int) or batch_size < 0:
            raise ValueError(f"Cache: expected batch_size an int >= 0, got {batch_size!r}")
        self.config, self.rollback = config, rollback
        self.stored = [0] * batch_size  # tokens of each row that the layers have taken
        self.states: dict[int, Tensor] = {}
        self.softmax = {
            layer: Rows(batch_size, None if config.sliding_window is None else config.sliding_window - 1)
            for layer, kind in enumerate(config.attn_type_list)
            if kind != LIGHTNING
        }
        self.inputs = Rows(batch_size)
        self.snapshots: list[Snapshot] = []
        self.torn: bool = False  # a step has begun and not ended: some layers may have taken its tokens
        # Inputs [B, P, hidden] to run again, and their mask [B, P].
        self.pending: tuple[Tensor, Tensor] | None = None

    @property
    def batch_size(self) -> int:
        return len(self.stored)

    @property
    def lengths(self) -> list[int]:
        """[B] the number of real tokens of each row."""
        if self.pending is None:
            return list(self.stored)
        return [n + m for n, m in zip(self.stored, self.pending[1].sum(1).tolist(), strict=True)]

    @property
    def nbytes(self) -> int:
        """Of everything that is held."""
        rows = [*self.softmax.values(), self.inputs]
        tensors = [r.buffer for r in rows if r.buffer is not None] + list(self.states.values())
        tensors += [state for snapshot in self.snapshots for state in snapshot.states.values()]
        return sum(t.nbytes for t in tensors)

    def state(self, layer: int, like: Tensor) -> Tensor:
        """The states [B, H, D, D] of a lightning layer, on the device of its inputs."""
        if layer not in self.states:
            H, D = self.config.num_attention_heads, self.config.head_dim
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            with torch.inference_mode(False):  # to be written to outside of it, too
                self.states[layer] = torch.zeros(self.batch_size, H, D, D, device=like.device, dtype=dtype)
        return self.states[layer]

    def begin(self, x: Tensor, step: Step) -> None:
        """Before the layers take a step's inputs x [B, T, hidden]. Raises ValueError if the last step has failed."""
        if self.torn:
            raise ValueError(
                "Cache: expected a cache whose last step was whole, got one that an error interrupted: crop it, at its "
                "present length if it has rollback=True, to 0 without"
            )
        self.torn = True
        if not self.rollback:
            return
        self.inputs.write(x, step)
        last = self.snapshots[-1].lengths if self.snapshots else [0] * self.batch_size
        if self.states and sum(self.stored) - sum(last) >= self.SNAPSHOT_EVERY * max(self.batch_size, 1):
            self.snapshots.append(
                Snapshot(list(self.stored), {layer: state.clone() for layer, state in self.states.items()})
            )
            self._thin()

    def end(self, step: Step) -> None:
        """After the last layer."""
        self.stored = list(step.ends)
        self.pending, self.torn = None, False

    def _thin(self) -> None:
        """Drops a snapshot where its neighbours are no further apart than the later one lies back: what `crop` must run
        again is then at most about as long as what it takes away.
        """
        now = sum(self.stored)
        at = [sum(max(n, 0) for n in s.lengths) for s in self.snapshots]
        i = len(at) - 2
        while i > 0:
            if at[i + 1] - at[i - 1] <= now - at[i + 1]:
                del self.snapshots[i], at[i]
            i -= 1

    def crop(self, length: SupportsIndex | Sequence[int]) -> None:
        """Forgets all but the first `length` tokens of each row (a number, or one for each row); a row that is not so long
        stays as it is.

        Raises ValueError for a length that is negative, and for any other than 0 and the present one without rollback.
        """
        now = self.lengths
        try:
            wanted = [operator.index(length)] * len(now)  # type: ignore[arg-type]
        except TypeError:
            wanted = [operator.index(n) for n in length] if isinstance(length, Sequence) else [-1]
        if len(wanted) != len(now) or min(wanted, default=0) < 0:
            raise ValueError(
                f"crop: expected a length >= 0, or one for each of {len(now)} rows, got {length}"
            )
        wanted = [min(n, m) for n, m in zip(wanted, now, strict=True)]
        if wanted == now and not self.torn:
            return
        if not self.rollback and any(wanted):
            raise ValueError(
                f"crop: expected a Cache with rollback=True to go back to {length}, got rollback=False"
            )
        found = [self._latest(b, n) for b, n in enumerate(wanted)]
        for b, (base, snapshot) in enumerate(found):
            self._restore(b, base, snapshot)
        bases = [base for base, _ in found]
        for snapshot in self.snapshots:
            snapshot.lengths = [
                n if n <= limit else -1 for n, limit in zip(snapshot.lengths, wanted, strict=True)
            ]
        self.snapshots = [s for s in self.snapshots if any(n > 0 for n in s.lengths)]
        self.stored = bases
        counts = [n - base for n, base in zip(wanted, bases, strict=True)]
        self.pending = self._again(bases, counts) if any(counts) else None
        self.torn = False

    def _latest(self, b: int, length: int) -> tuple[int, Snapshot | None]:
        """The latest place up to `length` at which row b's states are known, and their snapshot; None: as they are, or at 0
        zero.
        """
        if length >= self.stored[b] and not self.torn:
            return self.stored[b], None  # what is pending is cut
        # What precedes a snapshot by less than the window must still be held; from 0 on all can be run again.
        oldest = max((rows.dropped[b] for rows in self.softmax.values()), default=0)
        first = oldest + (self.config.sliding_window or 0) - 1 if oldest else 1
        if LIGHTNING not in self.config.attn_type_list and first <= length:
            return length, None
        known = [s for s in self.snapshots if first <= s.lengths[b] <= length]
        best = max(known, key=lambda s: s.lengths[b], default=None)
        base = 0 if best is None else best.lengths[b]
        return base, best

    def _restore(self, b: int, base: int, snapshot: Snapshot | None) -> None:
        if base and snapshot is None:
            return
        for layer, state in self.states.items():
            if snapshot is None:
                state[b].zero_()
            else:
                state[b].copy_(snapshot.states[layer][b])
        if base == 0:
            for rows in self.softmax.values():
                rows.dropped[b] = 0

    def _again(self, bases: list[int], counts: list[int]) -> tuple[Tensor, Tensor]:
        assert self.inputs.buffer is not None
        longest = max(counts)
        pieces = [
            self.inputs.buffer[b, base : base + n]
            for b, (base, n) in enumerate(zip(bases, counts, strict=True))
        ]
        x = torch.stack([F.pad(piece, (0, 0, 0, longest - len(piece))) for piece in pieces])
        mask = torch.arange(longest, device=x.device) < torch.tensor(counts, device=x.device)[:, None]
        return x, mask

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes what row rows[i] was, as beam search needs it; the batch size may change."""
        rows = torch.as_tensor(rows, device="cpu")
        if rows.is_floating_point() and rows.numel():
            raise ValueError(f"select: expected rows of integers, got {rows.dtype}")
        rows = rows.long()
        if rows.dim() != 1 or rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.batch_size:
            raise ValueError(f"select: expected rows [n] in [0, {self.batch_size}), got {rows.tolist()}")
        picks = rows.tolist()
        self.stored = [self.stored[b] for b in picks]
        self.states = {layer: state[rows.to(state.device)] for layer, state in self.states.items()}
        for snapshot in self.snapshots:
            snapshot.lengths = [snapshot.lengths[b] for b in picks]
            snapshot.states = {layer: s[rows.to(s.device)] for layer, s in snapshot.states.items()}
        for held in self.softmax.values():
            held.select(rows)
        self.inputs.select(rows)
        if self.pending is not None:
            x, mask = self.pending
            self.pending = x[rows.to(x.device)], mask[rows.to(mask.device)]
