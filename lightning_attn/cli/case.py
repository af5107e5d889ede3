"""What every case has: an op at one shape and dtype, what it is fed, its versions, its outputs, its passes, its costs.

`check` judges cases and `bench` times them, so both see the same inputs and the same calls. Bytes count every
input and output of a pass once, in its own dtype; flops are what the algorithm needs, whatever a backend
really does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lightning_attn import decay as decays
from lightning_attn.dispatch import Spec

from .eager import Function

Tensors = dict[str, Tensor]
Shape = dict[str, int | str]

# The passes. BACKWARD is the backward alone, of a forward that is not timed; GRAPH is the forward in a CUDA graph.
FORWARD, BACKWARD, TRAIN, GRAPH = "forward", "backward", "forward+backward", "graph"
# What they compute: their costs are the sum of it.
PARTS = {FORWARD: (FORWARD,), BACKWARD: (BACKWARD,), TRAIN: (FORWARD, BACKWARD), GRAPH: (FORWARD,)}

LAYERS = 80  # of MiniMax-Text-01; its first layer gives the decay rates
MANY_HEADS = 4  # beyond, a sample of the heads is checked: the truth takes many times the time of the case


@dataclass(frozen=True)
class Case(ABC):
    """Base of the cases. Tensors go by name; an output `o` has the cotangent `do`, an input `q` the gradient
    `dq`. `passes` are those that it is timed at, `usual_passes` if none are named.
    """

    dtype: torch.dtype
    passes: tuple[str, ...] = field(default=(), kw_only=True)

    op: ClassVar[str]
    differentiable: ClassVar[tuple[str, ...]] = ()
    possible_passes: ClassVar[tuple[str, ...]] = (FORWARD, TRAIN, BACKWARD)

    def __post_init__(self) -> None:
        if not self.passes:
            object.__setattr__(self, "passes", self.usual_passes)
        for pass_ in self.passes:
            if pass_ not in self.possible_passes:
                possible = ", ".join(self.possible_passes)
                raise ValueError(f"{self.op}: expected passes among {possible}, got {pass_!r}")

    @property
    def usual_passes(self) -> tuple[str, ...]:
        return (FORWARD, TRAIN)

    @property
    def fullest_pass(self) -> str:
        """One whose outputs are those of all its passes."""
        return TRAIN if {TRAIN, BACKWARD} & set(self.passes) else FORWARD

    @property
    @abstractmethod
    def shape(self) -> Shape: ...

    @abstractmethod
    def inputs(self, device: torch.device) -> Tensors:
        """Made on the device, the same values at every call; cotangents included."""

    @abstractmethod
    def specs(self, device: torch.device) -> list[Spec]:
        """The raw calls that `ours` comes to: what a backend must support to run the case."""

    @abstractmethod
    def ours(self, backend: str) -> Function:
        """The public function, bound to a backend."""

    @property
    @abstractmethod
    def plain(self) -> Function:
        """The plain PyTorch version: baseline and peer."""

    @property
    @abstractmethod
    def truth(self) -> Function:
        """The version that is right, given float64 inputs."""

    @abstractmethod
    def call(self, function: Function, inputs: Tensors) -> Tensors:
        """One call -> its named outputs; leaves `inputs` as they are."""

    @abstractmethod
    def part_flops(self, part: str) -> int:
        """Of FORWARD or of BACKWARD."""

    @abstractmethod
    def part_bytes(self, part: str) -> int:
        """Of FORWARD or of BACKWARD."""

    def flops(self, pass_: str) -> int:
        return sum(map(self.part_flops, PARTS[pass_]))

    def bytes(self, pass_: str) -> int:
        return sum(map(self.part_bytes, PARTS[pass_]))

    def evaluate(self, function: Function, inputs: Tensors, pass_: str) -> Tensors:
        """Every output of a pass by name: of `call`, then the gradients."""
        if pass_ == FORWARD:
            with torch.no_grad():
                return self.call(function, inputs)
        outputs, backward = self._recorded(function, inputs)
        if pass_ == BACKWARD:
            backward(True)  # those of a second run are judged, for it is repeated when it is timed
        return {name: x.detach() for name, x in outputs.items()} | backward(False)

    def step(self, function: Function, inputs: Tensors, pass_: str) -> Callable[[], object]:
        """What `bench` times."""
        if pass_ == BACKWARD:
            return partial(self._recorded(function, inputs)[1], True)
        return partial(self.evaluate, function, inputs, pass_)

    def calls_per_step(self, pass_: str) -> int:
        """How many calls of the op one step makes."""
        return 1

    @property
    def needed_bytes(self) -> int:
        """Of memory, to check and to time it: roughly, and 0 where there is always enough."""
        return 0

    def sample(self, tensors: Tensors) -> Tensors:
        """The part of the inputs or outputs that is checked: all, unless the truth would cost too much."""
        return tensors

    def judged(self, outputs: Tensors) -> Tensors:
        """What of the outputs of that part, the truth's among them, is compared: all, unless the truth of some
        would cost too much.
        """
        return outputs

    def _recorded(self, function: Function, inputs: Tensors) -> tuple[Tensors, Callable[[bool], Tensors]]:
        """The outputs of a call, and its backward; `backward(True)` can be run again."""
        leaves = {
            name: inputs[name].detach().requires_grad_() for name in self.differentiable if name in inputs
        }
        outputs = self.call(function, inputs | leaves)
        # Of whole numbers there is no gradient.
        differentiable = {name: x for name, x in outputs.items() if x.is_floating_point()}
        cotangents = [inputs["d" + name] for name in differentiable]

        def backward(again: bool) -> Tensors:
            gradients = torch.autograd.grad(
                list(differentiable.values()), list(leaves.values()), cotangents, retain_graph=again
            )
            return {"d" + name: dx for name, dx in zip(leaves, gradients, strict=True)}

        return outputs, backward


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decay_rates(kind: str, heads: int) -> Tensor:
    """Rates [H] per token. "minimax", "fla": of their first layers; "zero": nothing decays; "large": 1 to 10,000."""
    if kind in ("minimax", "fla"):
        return getattr(decays, kind)(heads, 0, LAYERS)
    return torch.zeros(heads) if kind == "zero" else torch.logspace(0, 4, heads, dtype=torch.float32)


class Normal:
    """A sequence of normal tensors of a dtype on a device, drawn there: the same for every instance."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device).to(dtype or self.dtype)


def some_heads(tensors: Tensors, heads: int) -> Tensors:
    """Of many heads the first, the middle and the last, in every tensor that has a dim of heads."""
    if heads <= MANY_HEADS:
        return tensors
    pick = torch.tensor([0, heads // 2, heads - 1])
    return {
        name: t if (dim := _head_dim(name)) is None else t.index_select(dim, pick.to(t.device))
        for name, t in tensors.items()
    }


def _head_dim(name: str) -> int | None:
    if name in ("cu_seqlens", "slots"):
        return None
    return 0 if name == "decay" else 1 if name.endswith("state") else 2
