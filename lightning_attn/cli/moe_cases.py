"""The cases of routing and of the product of groups; those of the experts are in `moe_blocks`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

import lightning_attn
from lightning_attn.dispatch import Spec, accumulation_dtype

from . import moe_eager, moe_inputs, moe_truth
from .case import FORWARD, TRAIN, Case, Normal, Shape, Tensors
from .eager import Function
from .moe_inputs import experts, group_sizes
from .moe_weighted import Weighted


@dataclass(frozen=True)
class Route(Case):
    """`moe_route`. The logits are far from ties, or with `ties` mostly equal to others."""

    T: int
    E: int
    k: int
    renormalize: bool = True
    ties: bool = False

    op = "route"
    differentiable = ("logits",)

    @property
    def shape(self) -> Shape:
        dims: Shape = {"T": self.T, "E": self.E, "k": self.k}
        return (
            dims
            | ({} if self.renormalize else {"renormalize": "no"})
            | ({"ties": "yes"} if self.ties else {})
        )

    def inputs(self, device: torch.device) -> Tensors:
        acc = accumulation_dtype(self.dtype)
        apart = moe_inputs.separated_logits(experts("balanced", self.T, self.E, self.k), self.E)
        logits = moe_inputs.tied_logits(self.T, self.E) if self.ties else apart
        dweights = Normal(acc, device)(self.T, self.k)
        return {"logits": logits.to(device, self.dtype), "dweights": dweights}

    def specs(self, device: torch.device) -> list[Spec]:
        acc = accumulation_dtype(self.dtype)
        ops = (
            ("moe_route_forward", "moe_route_backward")
            if self.fullest_pass == TRAIN
            else ("moe_route_forward",)
        )
        return [Spec(op, device.type, self.dtype, acc, self.E, self.k) for op in ops]

    def ours(self, backend: str) -> Function:
        return partial(lightning_attn.moe_route, backend=backend)

    @property
    def plain(self) -> Function:
        return moe_eager.route_stable if self.ties else moe_eager.route

    @property
    def truth(self) -> Function:
        return moe_truth.route

    def call(self, function: Function, inputs: Tensors) -> Tensors:
        weights, chosen = function(inputs["logits"], self.k, renormalize=self.renormalize)
        return {"weights": weights, "experts": chosen}

    def part_flops(self, part: str) -> int:
        """Forward: a comparison of each logit, and of each chosen one exp, sum and division; without renormalize exp and
        sum of all. Backward: five of each weight; without renormalize the softmax again, and a product with it.
        """
        pairs, logits = self.T * self.k, self.T * self.E
        every = 0 if self.renormalize else (2 if part == FORWARD else 4) * logits
        return (3 * pairs + logits if part == FORWARD else 5 * pairs) + every

    def part_bytes(self, part: str) -> int:
        """Forward: reads the logits, writes weights and experts. Backward: reads those and dweights, writes dlogits;
        without renormalize it reads the logits too.
        """
        pairs, logits = self.T * self.k, self.T * self.E * self.dtype.itemsize
        acc = accumulation_dtype(self.dtype).itemsize
        if part == FORWARD:
            return logits + pairs * (acc + 4)
        return (1 if self.renormalize else 2) * logits + pairs * (2 * acc + 4)


@dataclass(frozen=True)
class GroupedGemm(Weighted):
    """`grouped_gemm` of M rows in E groups."""

    M: int
    N: int
    K: int
    spread: str = "balanced"

    op = "grouped_gemm"
    differentiable = ("x", "w")

    @property
    def shape(self) -> Shape:
        dims: Shape = {"M": self.M, "E": self.E, "N": self.N, "K": self.K}
        return dims | ({"spread": self.spread} if self.spread != "balanced" else {})

    @property
    def sizes(self) -> list[int]:
        return group_sizes(self.spread, self.M, self.E)

    @property
    def numbers(self) -> int:
        return self.N * self.K

    @property
    def names(self) -> tuple[str, ...]:
        return ("w",)

    @property
    def used(self) -> int:
        return sum(size > 0 for size in self.sizes)

    @property
    def checked(self) -> int:
        return len(self._checked)

    def inputs(self, device: torch.device) -> Tensors:
        normal = Normal(self.dtype, device)
        ends = list(accumulate(self.sizes))
        return {
            "x": normal(self.M, self.K),
            "w": moe_inputs.matrices(normal, self.E, self.N, self.K),
            "offs": torch.tensor(ends, dtype=torch.int32, device=device),
            "dy": normal(self.M, self.N),
        }

    def specs(self, device: torch.device) -> list[Spec]:
        ops = ("grouped_gemm_forward", "grouped_gemm_backward")[: 2 if self.fullest_pass == TRAIN else 1]
        return [Spec(op, device.type, self.dtype, self.dtype, self.K, self.N) for op in ops]

    def ours(self, backend: str) -> Function:
        return partial(lightning_attn.grouped_gemm, backend=backend)

    @property
    def plain(self) -> Function:
        return moe_eager.grouped_gemm

    @property
    def truth(self) -> Function:
        return moe_truth.grouped_gemm

    def call(self, function: Function, inputs: Tensors) -> Tensors:
        return {"y": function(inputs["x"], inputs["w"], inputs["offs"])}

    def part_flops(self, part: str) -> int:
        """A product; the backward two."""
        return (2 if part == FORWARD else 4) * self.M * self.N * self.K

    def part_bytes(self, part: str) -> int:
        """Forward: reads x and the matrices of groups that have rows, writes y. Backward: reads these and dy, writes dx
        and the gradient of every matrix. Both read offs.
        """
        rows = self.M * (self.K + self.N) if part == FORWARD else self.M * (2 * self.K + self.N)
        written = 0 if part == FORWARD else self.E * self.expert_bytes
        return rows * self.dtype.itemsize + self.used * self.expert_bytes + written + 4 * self.E

    def sample(self, tensors: Tensors) -> Tensors:
        """If large, the first group, the middle one and the last."""
        if not self.large:
            return tensors
        sizes, ends = self.sizes, list(accumulate(self.sizes))
        rows = torch.cat([torch.arange(ends[e] - sizes[e], ends[e]) for e in self._checked])
        pick = torch.tensor(self._checked)

        def part(name: str, t: Tensor) -> Tensor:
            if name == "offs":
                return torch.tensor(list(accumulate(sizes[e] for e in self._checked))).to(t)
            return t.index_select(0, (pick if name in ("w", "dw") else rows).to(t.device))

        return {name: part(name, t) for name, t in tensors.items()}

    @property
    def _checked(self) -> list[int]:
        return sorted({0, self.E // 2, self.E - 1})
