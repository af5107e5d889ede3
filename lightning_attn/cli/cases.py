"""A case: one op at one shape and dtype. What it is fed, its versions, its outputs, and what it must cost.

`check` judges cases and `bench` times them, so both see the same inputs and the same calls. Bytes count every
input and output of a pass once, in its own dtype; flops are what the algorithm needs, whatever a backend
really does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, cycle
from typing import ClassVar

import torch
from torch import Tensor

import lightning_attn
from lightning_attn import decay as decays
from lightning_attn.dispatch import Spec, accumulation_dtype

from . import eager, truth
from .eager import Function

Tensors = dict[str, Tensor]
Shape = dict[str, int | str]

FORWARD, TRAIN = "forward", "forward+backward"
LAYERS = 80  # of MiniMax-Text-01; its first layer gives the decay rates
EPS = 1e-6  # of the norm
BLOCK = 64  # tokens: the block length at which flops are counted
COLD_BYTES = 256 * 2**20  # a working set that no cache holds
MANY_HEADS = 4  # beyond, a sample of the heads is checked: the truth takes many times the time of the case
VERY_LONG = 2**18  # tokens: beyond, only the forward pass, for a float64 backward would not fit in memory


@dataclass(frozen=True)
class Case(ABC):
    """Base of the cases. Tensors go by name; an output `o` has the cotangent `do`, an input `q` the gradient
    `dq`.
    """

    dtype: torch.dtype

    op: ClassVar[str]
    differentiable: ClassVar[tuple[str, ...]] = ()

    @property
    def passes(self) -> tuple[str, ...]:
        return (FORWARD, TRAIN)

    @property
    @abstractmethod
    def shape(self) -> Shape: ...

    @abstractmethod
    def inputs(self, device: torch.device) -> Tensors:
        """The same values at every call; cotangents included."""

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
    def flops(self, pass_: str) -> int: ...

    @abstractmethod
    def bytes(self, pass_: str) -> int: ...

    def evaluate(self, function: Function, inputs: Tensors, pass_: str) -> Tensors:
        """Every output of a pass by name: of `call`, then the gradients."""
        if pass_ == FORWARD:
            with torch.no_grad():
                return self.call(function, inputs)
        leaves = {
            name: inputs[name].detach().requires_grad_() for name in self.differentiable if name in inputs
        }
        outputs = self.call(function, inputs | leaves)
        gradients = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), [inputs["d" + name] for name in outputs]
        )
        return {name: x.detach() for name, x in outputs.items()} | {
            "d" + name: dx for name, dx in zip(leaves, gradients, strict=True)
        }

    def step(self, function: Function, inputs: Tensors, pass_: str) -> Callable[[], object]:
        """What `bench` times."""
        return partial(self.evaluate, function, inputs, pass_)

    def sample(self, tensors: Tensors) -> Tensors:
        """The part of the inputs or outputs that is checked: all, unless the truth would cost too much."""
        return tensors

    @property
    def gradients(self) -> tuple[str, ...]:
        return tuple("d" + name for name in self.differentiable)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decay_rates(kind: str, heads: int) -> Tensor:
    """Rates [H] per token. "minimax": of its first layer; "zero": nothing decays; "large": 1 to 10,000."""
    if kind == "minimax":
        return decays.minimax(heads, 0, LAYERS)
    return torch.zeros(heads) if kind == "zero" else torch.logspace(0, 4, heads, dtype=torch.float32)


def _randn(generator: torch.Generator, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(size, generator=generator).to(device, dtype)


def _some_heads(tensors: Tensors, heads: int) -> Tensors:
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


@dataclass(frozen=True)
class Attention(Case):
    """`lightning_attention`; `lengths` packs documents into T, `stateful` gives and asks for a state."""

    T: int
    H: int
    K: int
    V: int
    B: int = 1
    lengths: tuple[int, ...] = ()
    slopes: str = "minimax"
    stateful: bool = False

    op = "attention"
    differentiable = ("q", "k", "v", "initial_state")

    @property
    def passes(self) -> tuple[str, ...]:
        return (FORWARD, TRAIN) if self.T <= VERY_LONG else (FORWARD,)

    @property
    def shape(self) -> Shape:
        dims: Shape = {"B": self.B, "T": self.T, "H": self.H, "K": self.K, "V": self.V}
        packed: Shape = {"N": len(self.lengths)} if self.lengths else {}
        return dims | packed | ({"slopes": self.slopes} if self.slopes != "minimax" else {})

    def inputs(self, device: torch.device) -> Tensors:
        normal = partial(_randn, torch.Generator().manual_seed(0), dtype=self.dtype, device=device)
        shape = (self.B, self.T, self.H)
        tensors = {"q": normal(*shape, self.K), "k": normal(*shape, self.K), "v": normal(*shape, self.V)}
        tensors |= {"do": normal(*shape, self.V), "decay": decay_rates(self.slopes, self.H).to(device)}
        if self.lengths:
            tensors["cu_seqlens"] = torch.tensor([0, *accumulate(self.lengths)], device=device)
        if self.stateful:
            size = (len(self.lengths) or self.B, self.H, self.K, self.V)
            for name in ("initial_state", "dstate"):
                tensors[name] = normal(*size, dtype=accumulation_dtype(self.dtype))
        return tensors

    def specs(self, device: torch.device) -> list[Spec]:
        state = accumulation_dtype(self.dtype)
        ops = ("attention_forward", "attention_backward")
        return [Spec(op, device.type, self.dtype, state, self.K, self.V) for op in ops]

    def ours(self, backend: str) -> Function:
        return partial(lightning_attn.lightning_attention, return_state=self.stateful, backend=backend)

    @property
    def plain(self) -> Function:
        return eager.attention

    @property
    def truth(self) -> Function:
        return truth.attention

    def call(self, function: Function, inputs: Tensors) -> Tensors:
        optional = {name: inputs[name] for name in ("initial_state", "cu_seqlens") if name in inputs}
        q, k, v, decay = (inputs[name] for name in ("q", "k", "v", "decay"))
        result = function(q, k, v, decay, scale=self.K**-0.5, **optional)
        o, state = result if isinstance(result, tuple) else (result, None)
        return {"o": o, "state": state} if self.stateful else {"o": o}

    def flops(self, pass_: str) -> int:
        """Per token and head C*(K + V), the causal half of two products in a block of C, and 4*K*V, two
        products with the state; forward + backward 3.5 times that.
        """
        forward = self.B * self.T * self.H * (BLOCK * (self.K + self.V) + 4 * self.K * self.V)
        return forward if pass_ == FORWARD else forward * 7 // 2

    def bytes(self, pass_: str) -> int:
        """Forward: reads q, k, v, writes o. The backward adds: reads q, k, v, do, writes dq, dk, dv."""
        vectors = 2 * (self.K + self.V) + (0 if pass_ == FORWARD else 4 * self.K + 3 * self.V)
        return self.B * self.T * self.H * vectors * self.dtype.itemsize

    def sample(self, tensors: Tensors) -> Tensors:
        return _some_heads(tensors, self.H)


@dataclass(frozen=True)
class Decode(Case):
    """`lightning_attention_decode`: T new tokens of B sequences, states of `state` dtype updated in place.

    `slots` adds idle state rows, maps the sequences to rows in disorder and makes one sequence padding.
    """

    B: int
    H: int
    K: int
    V: int
    T: int = 1
    state: torch.dtype = torch.float32
    slots: bool = False

    op = "decode"

    @property
    def passes(self) -> tuple[str, ...]:
        return (FORWARD,)

    @property
    def shape(self) -> Shape:
        dims: Shape = {"B": self.B, "T": self.T, "H": self.H, "K": self.K, "V": self.V}
        return dims | {"state": dtype_name(self.state)} | ({"slots": self.rows} if self.slots else {})

    @property
    def rows(self) -> int:
        """State rows: one per sequence, two more to stay idle with `slots`."""
        return self.B + 2 * self.slots

    def inputs(self, device: torch.device) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        normal = partial(_randn, generator, dtype=self.dtype, device=device)
        shape = (self.B, self.T, self.H)
        tensors = {"q": normal(*shape, self.K), "k": normal(*shape, self.K), "v": normal(*shape, self.V)}
        tensors["state"] = normal(self.rows, self.H, self.K, self.V, dtype=self.state)
        tensors["decay"] = decay_rates("minimax", self.H).to(device)
        if self.slots:
            order = torch.randperm(self.rows, generator=generator)[: self.B]
            order[self.B // 2] = -1
            tensors["slots"] = order.to(device)
        return tensors

    def specs(self, device: torch.device) -> list[Spec]:
        return [Spec("attention_decode", device.type, self.dtype, self.state, self.K, self.V)]

    def ours(self, backend: str) -> Function:
        return partial(lightning_attn.lightning_attention_decode, backend=backend)

    @property
    def plain(self) -> Function:
        return eager.decode

    @property
    def truth(self) -> Function:
        return truth.decode

    def call(self, function: Function, inputs: Tensors) -> Tensors:
        state = inputs["state"].clone()
        outputs = {"o": self._in_place(function, inputs, state), "state": state}
        if self.slots:
            used = torch.zeros(self.rows, dtype=torch.bool, device=state.device)
            used[inputs["slots"][inputs["slots"] >= 0]] = True
            outputs |= {"state": state[used], "idle_state": state[~used]}
        return outputs

    def step(self, function: Function, inputs: Tensors, pass_: str) -> Callable[[], object]:
        """In a model the states of all other layers pass through the caches between two steps of a layer, so
        the timed calls go round enough copies of the state to meet each one cold.
        """
        bytes_ = inputs["state"].numel() * self.state.itemsize
        copies = cycle([inputs["state"].clone() for _ in range(-(-COLD_BYTES // bytes_))])
        return lambda: self._in_place(function, inputs, next(copies))

    def _in_place(self, function: Function, inputs: Tensors, state: Tensor) -> Tensor:
        q, k, v, decay = (inputs[name] for name in ("q", "k", "v", "decay"))
        return function(q, k, v, decay, state, slots=inputs.get("slots"), scale=self.K**-0.5)

    def flops(self, pass_: str) -> int:
        """k v^T into the state, and the state times q."""
        return self.B * self.T * self.H * 4 * self.K * self.V

    def bytes(self, pass_: str) -> int:
        """The state read and written once whatever T is; q, k, v read, o written."""
        state = 2 * self.K * self.V * self.state.itemsize
        return self.B * self.H * (state + self.T * 2 * (self.K + self.V) * self.dtype.itemsize)

    def sample(self, tensors: Tensors) -> Tensors:
        return _some_heads(tensors, self.H)


@dataclass(frozen=True)
class GatedRMSNorm(Case):
    """`gated_rms_norm` over rows of D."""

    rows: int
    D: int

    op = "gated_rms_norm"
    differentiable = ("x", "gate", "weight")

    @property
    def shape(self) -> Shape:
        return {"rows": self.rows, "D": self.D}

    def inputs(self, device: torch.device) -> Tensors:
        normal = partial(_randn, torch.Generator().manual_seed(0), dtype=self.dtype, device=device)
        tensors = {name: normal(self.rows, self.D) for name in ("x", "gate", "do")}
        return tensors | {"weight": normal(self.D)}

    def specs(self, device: torch.device) -> list[Spec]:
        ops = ("gated_rms_norm_forward", "gated_rms_norm_backward")
        return [Spec(op, device.type, self.dtype, self.dtype, self.D, self.D) for op in ops]

    def ours(self, backend: str) -> Function:
        return partial(lightning_attn.gated_rms_norm, backend=backend)

    @property
    def plain(self) -> Function:
        return eager.gated_rms_norm

    @property
    def truth(self) -> Function:
        return truth.gated_rms_norm

    def call(self, function: Function, inputs: Tensors) -> Tensors:
        return {"o": function(inputs["x"], inputs["gate"], inputs["weight"], eps=EPS)}

    def flops(self, pass_: str) -> int:
        """Per element: square and sum 2, three products, sigmoid 3; the backward twice as much again."""
        forward = 8 * self.rows * self.D
        return forward if pass_ == FORWARD else 3 * forward

    def bytes(self, pass_: str) -> int:
        """Forward: reads x, gate, weight, writes o. The backward adds: reads x, gate, weight, do, writes dx,
        dgate, dweight.
        """
        rows, weights = (3, 1) if pass_ == FORWARD else (8, 3)
        return (rows * self.rows + weights) * self.D * self.dtype.itemsize


@dataclass(frozen=True)
class Layer(Case):
    """The module `LightningAttention` (layer 0 of 80), its projections included."""

    T: int
    hidden: int
    H: int
    D: int
    B: int = 1

    op = "module"
    differentiable = ("x", "qkv_proj", "output_gate", "norm", "out_proj")

    @property
    def shape(self) -> Shape:
        return {"B": self.B, "T": self.T, "hidden": self.hidden, "H": self.H, "D": self.D}

    def inputs(self, device: torch.device) -> Tensors:
        normal = partial(_randn, torch.Generator().manual_seed(0), dtype=self.dtype, device=device)
        wide = self.H * self.D
        return {
            "x": normal(self.B, self.T, self.hidden),
            "do": normal(self.B, self.T, self.hidden),
            "qkv_proj": normal(3 * wide, self.hidden) * self.hidden**-0.5,
            "output_gate": normal(wide, self.hidden) * self.hidden**-0.5,
            "norm": normal(wide),
            "out_proj": normal(self.hidden, wide) * wide**-0.5,
        }

    def specs(self, device: torch.device) -> list[Spec]:
        norm = GatedRMSNorm(self.dtype, self.B * self.T, self.H * self.D)
        return self.attention.specs(device) + norm.specs(device)

    def ours(self, backend: str) -> Function:
        module = lightning_attn.LightningAttention(
            self.hidden, self.H, self.D, layer_idx=0, num_layers=LAYERS, dtype=self.dtype
        )
        return as_function(module, backend=backend)

    @property
    def plain(self) -> Function:
        return partial(eager.layer, decay=decay_rates("minimax", self.H), eps=EPS)

    @property
    def truth(self) -> Function:
        return partial(truth.layer, decay=decay_rates("minimax", self.H), eps=EPS)

    def call(self, function: Function, inputs: Tensors) -> Tensors:
        return {"o": function(inputs["x"], **{name: inputs[name] for name in self.differentiable[1:]})}

    @property
    def attention(self) -> Attention:
        return Attention(self.dtype, self.T, self.H, self.D, self.D, self.B)

    def flops(self, pass_: str) -> int:
        """The attention's, and five projections between hidden and H*D: 2 flops per token and weight, forward
        + backward 6.
        """
        weights = 5 * self.hidden * self.H * self.D
        return self.attention.flops(pass_) + (2 if pass_ == FORWARD else 6) * self.B * self.T * weights

    def bytes(self, pass_: str) -> int:
        """Forward: reads x and the weights, writes o. The backward adds: reads x, do and the weights, writes
        dx and the gradients of the weights.
        """
        rows, weights = (2, 1) if pass_ == FORWARD else (5, 3)
        size = 5 * self.hidden * self.H * self.D + self.H * self.D
        return (rows * self.B * self.T * self.hidden + weights * size) * self.dtype.itemsize


def as_function(module: torch.nn.Module, **options: object) -> Function:
    """A layer as a function of its input and its weights, so that every version is given the same ones."""

    def function(x: Tensor, **weights: Tensor) -> Tensor:
        parameters = {f"{name}.weight": w for name, w in weights.items()}
        result = torch.func.functional_call(module, parameters, (x,), options)
        return result[0] if isinstance(result, tuple) else result

    return function
