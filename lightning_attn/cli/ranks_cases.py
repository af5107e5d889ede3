"""What `ranks` runs: `lasp` and `ring_attention` on R ranks, and what one process does in their stead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_attn import decay, distributed, lightning_attention
from lightning_attn.backends.reference import block_form
from lightning_attn.dispatch import accumulation_dtype
from lightning_attn.distributed import even_cuts, ring_plan
from lightning_attn.distributed.lasp_plan import lasp_bytes

from . import eager
from .case import FORWARD, LAYERS, TRAIN, Normal, Shape, Tensors

CPU = torch.device("cpu")
OPS = ("lasp", "ring_attention")
PASSES = (FORWARD, TRAIN)
# Where documents begin, as parts of the sequence: none where even cuts of a few ranks are, one that many ranks share.
PACKED = (0.0, 0.03, 0.11, 0.27, 0.28, 0.93)


@dataclass(frozen=True)
class RankCase(ABC):
    """One op at one shape, of `T` tokens in all. Tensors go by name, as in `case.Case`."""

    dtype: torch.dtype
    T: int
    packed: bool = False

    op: ClassVar[str]
    target: ClassVar[float]  # of the time on R ranks over that of one process

    @property
    @abstractmethod
    def name(self) -> str:
        """What sets it apart from the other cases of the op."""

    @property
    @abstractmethod
    def shape(self) -> Shape: ...

    @property
    def offsets(self) -> list[int]:
        """cu_seqlens."""
        return [*(int(part * self.T) for part in (PACKED if self.packed else (0.0,))), self.T]

    @abstractmethod
    def layout(self, ranks: int) -> ring_plan.Layout:
        """The positions that each rank holds, in the order in which it holds them."""

    @property
    @abstractmethod
    def heads(self) -> dict[str, tuple[int, int]]:
        """Number and dim of the heads of q, k, v and the cotangent do."""

    def inputs(self) -> Tensors:
        """Of the whole sequence: the same on every process."""
        normal = Normal(self.dtype, CPU)
        return {name: normal(1, self.T, *size) for name, size in self.heads.items()}

    @abstractmethod
    def alone(self, inputs: Tensors) -> Tensor:
        """o of one process."""

    @abstractmethod
    def across(self, inputs: Tensors, group: dist.ProcessGroup) -> Tensor:
        """o of a rank, of its part of the inputs."""

    @abstractmethod
    def plain(self, inputs: Tensors) -> Tensor:
        """o in plain PyTorch, in the dtype of the inputs."""

    @abstractmethod
    def truth(self, inputs: Tensors) -> Tensor:
        """o of float64 inputs."""

    @abstractmethod
    def bytes(self, rank: int, ranks: int, pass_: str) -> int:
        """That a rank receives, by the formula."""

    def part(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """What a rank holds of [1, T, ...]."""
        pieces = [whole[:, begin:end] for begin, end in self.layout(ranks)[rank]]
        return torch.cat(pieces, 1) if pieces else whole[:, :0].clone()

    def whole(self, parts: list[Tensor]) -> Tensor:
        """The sequence from the parts of all ranks."""
        made = parts[0].new_full((1, self.T, *parts[0].shape[2:]), torch.nan)
        for part, ranges in zip(parts, self.layout(len(parts)), strict=True):
            row = 0
            for begin, end in ranges:
                made[:, begin:end] = part[:, row : row + end - begin]
                row += end - begin
        return made

    def evaluate(self, inputs: Tensors, pass_: str, group: dist.ProcessGroup | None) -> Tensors:
        """The outputs of a pass, as `across` gives them; of `alone` without a group."""
        return evaluate(lambda x: self.alone(x) if group is None else self.across(x, group), inputs, pass_)


@dataclass(frozen=True)
class Lasp(RankCase):
    """Against `lightning_attention`. `layer` of MiniMax-Text-01 gives the rates of decay; None: nothing decays."""

    layer: int | None = 0
    H: int = 8
    K: int = 128
    V: int = 128

    op = "lasp"
    target = 1.25

    @property
    def name(self) -> str:
        rates = "no decay" if self.layer is None else f"layer {self.layer}"
        return f"{rates}, packed" if self.packed else rates

    @property
    def shape(self) -> Shape:
        dims: Shape = {"B": 1, "T": self.T, "H": self.H, "K": self.K, "V": self.V}
        return dims | ({"N": len(self.offsets) - 1} if self.packed else {})

    def layout(self, ranks: int) -> ring_plan.Layout:
        return ring_plan.contiguous(even_cuts(self.T, ranks))

    @property
    def heads(self) -> dict[str, tuple[int, int]]:
        key, value = (self.H, self.K), (self.H, self.V)
        return {"q": key, "k": key, "v": value, "do": value}

    def alone(self, inputs: Tensors) -> Tensor:
        o = lightning_attention(*self._qkv(inputs), **self._options)
        assert isinstance(o, Tensor)
        return o

    def across(self, inputs: Tensors, group: dist.ProcessGroup) -> Tensor:
        cuts = even_cuts(self.T, dist.get_world_size(group))
        o = distributed.lasp(*self._qkv(inputs), cuts=cuts, group=group, **self._options)
        assert isinstance(o, Tensor)
        return o

    def plain(self, inputs: Tensors) -> Tensor:
        return eager.attention(*self._qkv(inputs), **self._options)[0]

    def truth(self, inputs: Tensors) -> Tensor:
        return block_form(*self._qkv(inputs), block_size=512, **self._options)[0]  # `plain` has others

    def bytes(self, rank: int, ranks: int, pass_: str) -> int:
        size = accumulation_dtype(self.dtype).itemsize
        return lasp_bytes(ranks, self.H, self.K, self.V, size) * (1 if pass_ == FORWARD else 2)

    def _qkv(self, inputs: Tensors) -> tuple[Tensor, ...]:
        rates = torch.zeros(self.H) if self.layer is None else decay.minimax(self.H, self.layer, LAYERS)
        return *(inputs[name] for name in ("q", "k", "v")), rates

    @property
    def _options(self) -> dict[str, Any]:
        return {"cu_seqlens": torch.tensor(self.offsets), "scale": self.K**-0.5}


@dataclass(frozen=True)
class Ring(RankCase):
    """Against itself on a group of one rank: the same blocks of softmax attention, and nothing sent."""

    zigzag: bool = True
    H: int = 2
    G: int = 1
    D: int = 32

    op = "ring_attention"
    target = 1.35

    @property
    def name(self) -> str:
        cuts = "zigzag" if self.zigzag else "contiguous"
        return f"{cuts}, packed" if self.packed else cuts

    @property
    def shape(self) -> Shape:
        dims: Shape = {"B": 1, "T": self.T, "H": self.H, "G": self.G, "D": self.D}
        return dims | ({"N": len(self.offsets) - 1} if self.packed else {})

    def layout(self, ranks: int) -> ring_plan.Layout:
        cuts = self._cuts(ranks)
        return ring_plan.zigzag(cuts) if self.zigzag else ring_plan.contiguous(cuts)

    @property
    def heads(self) -> dict[str, tuple[int, int]]:
        queries, keys = (self.H, self.D), (self.G, self.D)
        return {"q": queries, "k": keys, "v": keys, "do": queries}

    def alone(self, inputs: Tensors) -> Tensor:
        group = dist.group.WORLD  # of one
        assert group is not None
        return self.across(inputs, group)

    def across(self, inputs: Tensors, group: dist.ProcessGroup) -> Tensor:
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        return distributed.ring_attention(
            q, k, v, cu_seqlens=torch.tensor(self.offsets), cuts=self._cuts(dist.get_world_size(group)),
            group=group, zigzag=self.zigzag,
        )  # fmt: skip

    def plain(self, inputs: Tensors) -> Tensor:
        return self._dense(inputs, lambda s: torch.softmax(s, -1))

    def truth(self, inputs: Tensors) -> Tensor:
        def softmax(s: Tensor) -> Tensor:
            weights = torch.exp(s - s.amax(-1, keepdim=True))
            return weights / weights.sum(-1, keepdim=True)

        return self._dense(inputs, softmax)

    def bytes(self, rank: int, ranks: int, pass_: str) -> int:
        plan = ring_plan.plan(self.layout(ranks), self.layout(ranks), tuple(self.offsets))
        received = plan.received(
            rank, "ring", width=2 * self.G * self.D, itemsize=self.dtype.itemsize,
            grad_itemsize=accumulation_dtype(self.dtype).itemsize,
        )  # fmt: skip
        return received.forward + (received.backward if pass_ == TRAIN else 0)

    def _cuts(self, ranks: int) -> list[int]:
        return even_cuts(self.T, ranks * (2 if self.zigzag else 1))

    def _dense(self, inputs: Tensors, softmax: Callable[[Tensor], Tensor]) -> Tensor:
        """All scores at once, of few tokens."""
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))  # [1, heads, T, D]
        k, v = (x.repeat_interleave(self.H // self.G, 1) for x in (k, v))
        t = torch.arange(self.T)
        document = torch.bucketize(t, torch.tensor(self.offsets), right=True)
        hidden = (t > t[:, None]) | (document != document[:, None])
        scores = (q @ k.mT * self.D**-0.5).masked_fill(hidden, -torch.inf)
        return (softmax(scores) @ v).transpose(1, 2)


def cases(ops: tuple[str, ...], dtype: torch.dtype, tokens: int) -> Iterator[RankCase]:
    """Those of the command."""
    if "lasp" in ops:
        for layer in (0, 40, None):
            yield Lasp(dtype, tokens, layer=layer)
        yield Lasp(dtype, tokens, layer=0, packed=True)
    if "ring_attention" in ops:
        for zigzag in (True, False):
            yield Ring(dtype, tokens, zigzag=zigzag)


def evaluate(function: Callable[[Tensors], Tensor], inputs: Tensors, pass_: str) -> Tensors:
    """o of function(inputs), and with the backward the gradients of q, k and v."""
    if pass_ == FORWARD:
        with torch.no_grad():
            return {"o": function(inputs)}
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v")}
    o = function(inputs | leaves)
    gradients = torch.autograd.grad(o, list(leaves.values()), inputs["do"])
    return {"o": o.detach()} | {"d" + name: dx for name, dx in zip(leaves, gradients, strict=True)}
