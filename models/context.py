"""Context parallelism: a packed sequence, or one chunk of it after another, whose tokens lie on the ranks of a group.

Rank r has the tokens from cuts[r] to cuts[r + 1]. Lightning layers exchange states (LASP+), softmax layers keys and values (varlen
ring attention); everything else knows one token at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_attn import LightningAttention
from lightning_attn.distributed import lasp, ring_attention, ring_attention_layout

from .config import TextConfig
from .softmax import SoftmaxAttention
from .step import Step, rotary

if TYPE_CHECKING:
    from .sharded import ShardedCache


@dataclass(frozen=True)
class ContextParallel:
    """This rank's view of the positions [cuts[0], cuts[-1]) of a packed sequence, for one forward pass of the text model.

    cu_seqlens: offsets of the documents in the whole sequence. cuts: R + 1 positions. group: the R ranks. method: of
    `lightning_attn.distributed.ring_attention`. cache: what came before cuts[0]; without it cuts[0] is 0.
    """

    cu_seqlens: tuple[int, ...]
    cuts: tuple[int, ...]
    group: dist.ProcessGroup
    method: str = "ring"
    cache: ShardedCache | None = None

    @property
    def own(self) -> tuple[int, int]:
        """The positions of this rank's tokens."""
        rank = dist.get_rank(self.group)
        return self.cuts[rank], self.cuts[rank + 1]

    @property
    def documents(self) -> range:
        """Those with tokens in the chunk, and the empty ones among them."""
        begin, end = self.cuts[0], self.cuts[-1]
        inside = [n for n, (s, e) in enumerate(pairwise(self.cu_seqlens)) if max(s, begin) < min(e, end)]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    @property
    def offsets(self) -> Tensor:
        """cu_seqlens of the chunk, from 0 to its length."""
        begin, end = self.cuts[0], self.cuts[-1]
        held = self.documents
        bounds = [max(s, begin) - begin for s in self.cu_seqlens[held.start : held.stop]]
        return torch.tensor([*bounds, end - begin])

    def step(self, config: TextConfig, tokens: int, device: torch.device) -> Step:
        """What the layers know about this rank's tokens. Raises ValueError if there are not as many as the cuts say."""
        begin, end = self.own
        if tokens != end - begin:
            raise ValueError(f"TextModel: expected the {end - begin} tokens of this rank, got {tokens}")
        if config.sliding_window is not None:
            raise ValueError("TextModel: expected no sliding_window with context, got one")
        position = torch.arange(begin, end, device=device)
        starts = torch.tensor(self.cu_seqlens, device=device)
        position -= starts[torch.searchsorted(starts, position, right=True) - 1]
        cos, sin = rotary(position[None], config.rotary_dim, config.rope_theta)
        return Step(position[None], cos, sin, None, None, None, (), (0,), (tokens,), self)

    def attend(
        self,
        attention: LightningAttention | SoftmaxAttention,
        h: Tensor,
        step: Step,
        layer: int,
        backend: str,
    ) -> Tensor:
        """h [1, L, hidden], this rank's tokens -> y [1, L, hidden]."""
        if isinstance(attention, LightningAttention):
            return attention.output(h, self._lightning(attention, h, layer, backend), backend)
        q, k, v = attention.project(h, step)
        if self.cache is None:
            o = ring_attention(
                q, k, v, cu_seqlens=self.offsets, cuts=self.cuts, group=self.group, method=self.method
            )
        else:
            k, v = self.cache.keys_and_values(layer, k, v)
            queries = [[pair] for pair in pairwise(self.cuts)]
            keys = self.cache.layout(self.cache.fed + 1)
            o = ring_attention_layout(
                q, k, v,
                cu_seqlens=torch.tensor(self.cu_seqlens), queries=queries, keys=keys,
                group=self.group, method=self.method,
            )  # fmt: skip
        return attention.o_proj(o.flatten(2))

    def _lightning(self, attention: LightningAttention, h: Tensor, layer: int, backend: str) -> Tensor:
        q, k, v = attention.project(h)
        cuts = [cut - self.cuts[0] for cut in self.cuts]
        initial = None if self.cache is None else self.cache.entering(layer, self, h)
        result = lasp(
            q, k, v, attention.decay,
            cu_seqlens=self.offsets, cuts=cuts, group=self.group,
            initial_state=initial, return_state=self.cache is not None, backend=backend,
        )  # fmt: skip
        if self.cache is None:
            assert isinstance(result, Tensor)
            return result
        o, states = result
        self.cache.leave(layer, self, states)
        return o
