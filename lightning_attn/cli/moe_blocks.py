"""The cases of the experts: `moe_mlp`, and the module SparseMoE with its gate and its routing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

import lightning_attn
from lightning_attn.dispatch import Spec, accumulation_dtype

from . import moe_eager, moe_inputs, moe_truth
from .case import FORWARD, GRAPH, TRAIN, Normal, Shape, Tensors
from .eager import Function
from .moe_cases import Route
from .moe_inputs import experts, touched
from .moe_weighted import Weighted

SCALES = ("gate_up_scale", "down_scale")
MATRICES = ("gate_up", "down", *SCALES, "dgate_up", "ddown")  # inputs and outputs with a row for each expert
# The parameters, as SparseMoE has them.
PARAMETERS = {"gate": "gate.weight", "gate_up": "gate_up_proj", "down": "down_proj"}
CHECKED_TOKENS = 3  # of a large case, with all that goes to the experts of these


@dataclass(frozen=True)
class MoeMlp(Weighted):
    """`moe_mlp` of T tokens with given experts, in one of its layouts; with `int8` quantised, for inference alone."""

    T: int
    D: int
    F: int
    k: int
    layout: str = "concatenated"
    int8: bool = False
    spread: str = "balanced"

    op = "moe_mlp"
    differentiable = ("x", "gate_up", "down", "weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.int8 and not {FORWARD, GRAPH}.issuperset(self.passes):
            raise ValueError(
                f"{self.op}: expected passes without a backward of int8 experts, got {self.passes}"
            )

    @property
    def usual_passes(self) -> tuple[str, ...]:
        return (FORWARD,) if self.int8 else (FORWARD, TRAIN)

    @property
    def shape(self) -> Shape:
        dims: Shape = {"T": self.T, "D": self.D, "F": self.F, "E": self.E, "k": self.k}
        if self.layout != "concatenated":
            dims["layout"] = self.layout
        if self.int8:
            dims["experts"] = "int8"
        return dims | ({"spread": self.spread} if self.spread != "balanced" else {})

    @property
    def names(self) -> tuple[str, ...]:
        return ("gate_up", "down", *(SCALES if self.int8 else ()))

    @property
    def chosen(self) -> Tensor:
        return experts(self.spread, self.T, self.E, self.k)

    @property
    def numbers(self) -> int:
        return 3 * self.D * self.F

    @property
    def expert_bytes(self) -> int:
        return self.numbers + 4 * (2 * self.F + self.D) if self.int8 else super().expert_bytes

    @property
    def used(self) -> int:
        return touched(self.chosen)

    @property
    def checked(self) -> int:
        return len(self._sampled[0])

    def inputs(self, device: torch.device) -> Tensors:
        normal = Normal(self.dtype, device)
        tensors = {"x": normal(self.T, self.D), "dy": normal(self.T, self.D)}
        tensors["weights"] = normal(self.T, self.k, dtype=accumulation_dtype(self.dtype)).softmax(-1)
        tensors["experts"] = self.chosen.to(device, copy=True)
        return tensors | self._matrices(normal)

    def specs(self, device: torch.device) -> list[Spec]:
        matrices = torch.int8 if self.int8 else self.dtype
        ops = ("moe_mlp_forward", "moe_mlp_backward")[: 2 if self.fullest_pass == TRAIN else 1]
        acc = accumulation_dtype(self.dtype)
        sort = Spec("moe_sort", device.type, torch.int32, acc, self.k, self.E)
        return [*(Spec(op, device.type, self.dtype, matrices, self.D, self.F) for op in ops), sort]

    def ours(self, backend: str) -> Function:
        return partial(lightning_attn.moe_mlp, backend=backend)

    @property
    def plain(self) -> Function:
        return moe_eager.moe_mlp

    @property
    def truth(self) -> Function:
        return moe_truth.moe_mlp

    def call(self, function: Function, inputs: Tensors) -> Tensors:
        weights, chosen = inputs["weights"], inputs["experts"]
        return {"y": function(inputs["x"], *self._pairs(inputs), weights, chosen, layout=self.layout)}

    def part_flops(self, part: str) -> int:
        """Of each token and expert the products; the backward twice as many."""
        return (2 if part == FORWARD else 4) * self.T * self.k * self.numbers

    def part_bytes(self, part: str) -> int:
        """Forward: reads x, weights, experts and the matrices of those that have tokens, writes y. Backward: reads these
        and dy, writes dx, dweights and the gradient of every matrix.
        """
        acc = accumulation_dtype(self.dtype).itemsize
        rows, routing, written = (2, acc + 4, 0) if part == FORWARD else (3, 2 * acc + 4, self.E)
        activations = rows * self.T * self.D * self.dtype.itemsize
        return activations + self.T * self.k * routing + (self.used + written) * self.expert_bytes

    def sample(self, tensors: Tensors) -> Tensors:
        """If large, the experts of some tokens, and every token that has any of these: so the gradients of their matrices
        are whole. What other experts add is left out, on either side.
        """
        if not self.large:
            return tensors
        picked, tokens, number = self._sampled

        def part(name: str, t: Tensor) -> Tensor:
            if name == "gate":
                return t
            if name in MATRICES:
                return t.index_select(0, picked.to(t.device))
            t = t.index_select(0, tokens.to(t.device))
            return number.to(t.device)[t.long()] if name == "experts" else t

        return {name: part(name, t) for name, t in tensors.items()}

    def judged(self, outputs: Tensors) -> Tensors:
        """If large, y and dx of the tokens that have no other experts, dweights of the pairs that are left."""
        if not self.large:
            return outputs
        _, tokens, number = self._sampled
        left = number[self.chosen[tokens].long()] >= 0

        def part(name: str, t: Tensor) -> Tensor:
            if name in ("y", "dx"):
                return t[left.all(1).to(t.device)]
            return t[left.to(t.device)] if name == "dweights" else t

        return {name: part(name, t) for name, t in outputs.items()}

    @property
    def _sampled(self) -> tuple[Tensor, Tensor, Tensor]:
        return _sampled(self.spread, self.T, self.E, self.k)

    def _matrices(self, normal: Normal) -> Tensors:
        gate_up = moe_inputs.matrices(normal, self.E, 2 * self.F, self.D)
        down = moe_inputs.matrices(normal, self.E, self.D, self.F)
        if not self.int8:
            return {"gate_up": gate_up, "down": down}
        pairs = lightning_attn.quantize_experts(gate_up, down)
        return dict(
            zip(("gate_up", "gate_up_scale", "down", "down_scale"), (*pairs[0], *pairs[1]), strict=True)
        )

    def _pairs(self, inputs: Tensors) -> list[Tensor | tuple[Tensor, Tensor]]:
        """The matrices, as `moe_mlp` takes them."""
        if not self.int8:
            return [inputs["gate_up"], inputs["down"]]
        return [(inputs["gate_up"], inputs["gate_up_scale"]), (inputs["down"], inputs["down_scale"])]


@lru_cache(maxsize=16)
def _sampled(spread: str, T: int, E: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The experts of the first token, of the one in the middle and of the last; the tokens that have any of these; where
    each expert is among them, -1 if it is not.
    """
    chosen = experts(spread, T, E, k).long()
    picked = chosen[torch.linspace(0, T - 1, min(T, CHECKED_TOKENS)).long()].unique()
    number = torch.full((E,), -1)
    number[picked] = torch.arange(len(picked))
    (tokens,) = torch.where((number[chosen] >= 0).any(1))
    return picked, tokens, number


@dataclass(frozen=True)
class MoeBlock(MoeMlp):
    """The module `SparseMoE`: gate, routing, experts.

    A router's choice is discrete: rounding may flip it where two logits are nearly equal. So x and the gate are made such
    that they are not (`moe_inputs.routed`), and every version, in whatever dtype, chooses the same experts.
    """

    op = "moe"
    differentiable = ("x", "gate", "gate_up", "down")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout != "concatenated":
            raise ValueError(f"{self.op}: expected layout 'concatenated', got {self.layout!r}")
        if self.large and self.fullest_pass == TRAIN:
            raise ValueError(f"{self.op}: expected no backward of large experts, which cannot be checked")

    @property
    def usual_passes(self) -> tuple[str, ...]:
        return (FORWARD,) if self.int8 or self.large else (FORWARD, TRAIN)

    def inputs(self, device: torch.device) -> Tensors:
        normal = Normal(self.dtype, device)
        logits = moe_inputs.separated_logits(self.chosen, self.E)
        x, gate = moe_inputs.routed(logits, normal, self.D)
        tensors = {"x": x, "gate": gate, "dy": normal(self.T, self.D)}
        return tensors | self._matrices(normal)

    def sample(self, tensors: Tensors) -> Tensors:
        """As of the experts alone, all of the gate, and `number`, where the experts are that are left."""
        sampled = super().sample(tensors)
        if self.large and "gate" in tensors:
            sampled["number"] = self._sampled[2].to(tensors["gate"].device)
        return sampled

    def specs(self, device: torch.device) -> list[Spec]:
        passes = (self.fullest_pass,)
        return super().specs(device) + Route(self.dtype, self.T, self.E, self.k, passes=passes).specs(device)

    def ours(self, backend: str) -> Function:
        @cache
        def module() -> torch.nn.Module:
            made = lightning_attn.SparseMoE(self.D, self.F, self.E, self.k, device="meta", dtype=self.dtype)
            return made.quantize() if self.int8 else made

        return as_function(module, PARAMETERS, backend=backend)

    @property
    def plain(self) -> Function:
        return partial(moe_eager.moe, top_k=self.k)

    @property
    def truth(self) -> Function:
        return partial(moe_truth.moe, top_k=self.k)

    def call(self, function: Function, inputs: Tensors) -> Tensors:
        options = {"number": inputs["number"]} if "number" in inputs else {}
        return {"y": function(inputs["x"], inputs["gate"], *self._pairs(inputs), **options)}

    def part_flops(self, part: str) -> int:
        """The experts', and the gate: 2 flops per token and weight, backward 4."""
        return super().part_flops(part) + (2 if part == FORWARD else 4) * self.T * self.D * self.E

    def part_bytes(self, part: str) -> int:
        """Forward: reads x, the gate and the matrices of experts that have tokens, writes y. Backward: reads these and dy,
        writes dx, the gradient of the gate and that of every matrix.
        """
        rows, gates, written = (2, 1, 0) if part == FORWARD else (3, 2, self.E)
        activations = (rows * self.T + gates * self.E) * self.D * self.dtype.itemsize
        return activations + (self.used + written) * self.expert_bytes


def as_function(make: Callable[[], torch.nn.Module], names: dict[str, str], **options: object) -> Function:
    """A module as a function of its input and its matrices, which have these names in it. Its own are never there."""

    def function(
        x: Tensor, gate: Tensor, gate_up: moe_eager.Matrices, down: moe_eager.Matrices, **more: object
    ) -> Tensor:
        parameters = {names["gate"]: gate}
        for name, matrices in (("gate_up", gate_up), ("down", down)):
            if isinstance(matrices, tuple):
                parameters |= {names[name]: matrices[0], f"{name}_scale": matrices[1]}
            else:
                parameters[names[name]] = matrices
        return torch.func.functional_call(make(), parameters, (x,), options | more)

    return function
