"""What is assumed: the shapes of a model, the rates of a machine. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Model:
    """One layer of each kind. Defaults: MiniMax-Text-01."""

    heads: int = 64  # of lightning attention, and of the queries of softmax attention
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 6144
    experts: int = 32
    top_k: int = 2
    intermediate: int = 9216
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Rates:
    """Of one rank: attainable FLOP/s; bytes/s of its memory; bytes/s that it receives from its own node of `node` ranks and,
    at the same time, from other nodes; seconds that each of the messages that follow each other adds.
    """

    flops: float = 600e12
    memory: float = 4.8e12
    intra: float = 450e9
    inter: float = 50e9
    node: int = 8
    latency: float = 5e-6

    def compute(self, flops: float, bytes_: float) -> float:
        """Seconds of a kernel: its products or its traffic, whichever takes longer."""
        return max(flops / self.flops, bytes_ / self.memory)

    def transfer(self, received: Array, near: Array, messages: int) -> float:
        """Seconds until the last rank has its bytes [R], of which [R] come from its own node."""
        slowest = np.maximum(near / self.intra, (received - near) / self.inter).max()
        return float(slowest) + messages * self.latency

    def near(self, ranks: int) -> float:
        """The share of the other ranks, of so many in a row, that is in a rank's own node."""
        return (min(ranks, self.node) - 1) / (ranks - 1) if ranks > 1 else 0.0
