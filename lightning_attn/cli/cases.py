"""The cases: attention, decode, the gated norm and the layer. What they have in common is in `case`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, cycle

import torch
from torch import Tensor

import lightning_attn
from lightning_attn.dispatch import Spec, accumulation_dtype

from . import eager, truth
from .case import (
    FORWARD,
    GRAPH,
    LAYERS,
    TRAIN,
    Case,
    Normal,
    Shape,
    Tensors,
    decay_rates,
    dtype_name,
    some_heads,
)
from .eager import Function
from .graph import Replayed
from .timing import synchronize

EPS = 1e-6  # of the norm
BLOCK = 64  # tokens: the block length at which flops are counted
COLD_BYTES = 512 * 2**20  # a working set that no cache holds
GRAPH_CALLS = 256  # in one graph, at most
VERY_LONG = 2**18  # tokens: beyond, only the forward pass, for a float64 backward would not fit in memory


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
    def usual_passes(self) -> tuple[str, ...]:
        return (FORWARD, TRAIN) if self.T <= VERY_LONG else (FORWARD,)

    @property
    def shape(self) -> Shape:
        dims: Shape = {"B": self.B, "T": self.T, "H": self.H, "K": self.K, "V": self.V}
        packed: Shape = {"N": len(self.lengths)} if self.lengths else {}
        return dims | packed | ({"slopes": self.slopes} if self.slopes != "minimax" else {})

    def inputs(self, device: torch.device) -> Tensors:
        normal = Normal(self.dtype, device)
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

    def part_flops(self, part: str) -> int:
        """Per token and head C*(K + V), the causal half of two products in a block of C, and 4*K*V, two
        products with the state; the backward 2.5 times that.
        """
        forward = self.B * self.T * self.H * (BLOCK * (self.K + self.V) + 4 * self.K * self.V)
        return forward if part == FORWARD else forward * 5 // 2

    def part_bytes(self, part: str) -> int:
        """Forward: reads q, k, v, writes o. Backward: reads q, k, v, do, writes dq, dk, dv."""
        vectors = 2 * (self.K + self.V) if part == FORWARD else 4 * self.K + 3 * self.V
        return self.B * self.T * self.H * vectors * self.dtype.itemsize

    def sample(self, tensors: Tensors) -> Tensors:
        return some_heads(tensors, self.H)


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
    possible_passes = (FORWARD, GRAPH)

    @property
    def usual_passes(self) -> tuple[str, ...]:
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
        normal = Normal(self.dtype, device)
        shape = (self.B, self.T, self.H)
        tensors = {"q": normal(*shape, self.K), "k": normal(*shape, self.K), "v": normal(*shape, self.V)}
        tensors["state"] = normal(self.rows, self.H, self.K, self.V, dtype=self.state)
        tensors["decay"] = decay_rates("minimax", self.H).to(device)
        if self.slots:
            order = torch.randperm(self.rows, generator=normal.generator, device=device)[: self.B]
            order[self.B // 2] = -1
            tensors["slots"] = order
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
        return self._outputs(inputs, self._in_place(function, inputs, state), state)

    def evaluate(self, function: Function, inputs: Tensors, pass_: str) -> Tensors:
        """GRAPH: of the last call in a replay of the very graph that is timed."""
        if pass_ == FORWARD:
            return super().evaluate(function, inputs, pass_)
        states = self._states(inputs, self.calls_per_step(pass_))
        replayed = self._replayed(function, inputs, states)
        for state in states:
            state.copy_(inputs["state"])
        o = replayed()
        synchronize(o.device)  # a graph is not to go while it runs
        return self._outputs(inputs, o, states[-1])

    def step(self, function: Function, inputs: Tensors, pass_: str) -> Callable[[], object]:
        """In a model the states of all other layers pass through the caches between two steps of a layer, so
        the timed calls go round enough copies of the state to meet each one cold. GRAPH: one round.
        """
        if pass_ == GRAPH:
            return self._replayed(function, inputs, self._states(inputs, self.calls_per_step(pass_)))
        copies = cycle(self._states(inputs, self._cold_copies))
        return lambda: self._in_place(function, inputs, next(copies))

    def calls_per_step(self, pass_: str) -> int:
        return min(self._cold_copies, GRAPH_CALLS) if pass_ == GRAPH else 1

    @property
    def _cold_copies(self) -> int:
        """How many copies of the state no cache holds together."""
        return -(-COLD_BYTES // (self.rows * self.H * self.K * self.V * self.state.itemsize))

    def _states(self, inputs: Tensors, copies: int) -> list[Tensor]:
        return [inputs["state"].clone() for _ in range(copies)]

    def _replayed(self, function: Function, inputs: Tensors, states: list[Tensor]) -> Replayed[Tensor]:
        """A call with each of the states, in one graph; gives the output of the last."""

        def round_() -> Tensor:
            return [self._in_place(function, inputs, state) for state in states][-1]

        return Replayed(round_, inputs["state"].device)

    def _outputs(self, inputs: Tensors, o: Tensor, state: Tensor) -> Tensors:
        if not self.slots:
            return {"o": o, "state": state}
        used = torch.zeros(self.rows, dtype=torch.bool, device=state.device)
        used[inputs["slots"][inputs["slots"] >= 0]] = True
        return {"o": o, "state": state[used], "idle_state": state[~used]}

    def _in_place(self, function: Function, inputs: Tensors, state: Tensor) -> Tensor:
        q, k, v, decay = (inputs[name] for name in ("q", "k", "v", "decay"))
        return function(q, k, v, decay, state, slots=inputs.get("slots"), scale=self.K**-0.5)

    def part_flops(self, part: str) -> int:
        """k v^T into the state, and the state times q."""
        return self.B * self.T * self.H * 4 * self.K * self.V

    def part_bytes(self, part: str) -> int:
        """The state read and written once whatever T is; q, k, v read, o written."""
        state = 2 * self.K * self.V * self.state.itemsize
        return self.B * self.H * (state + self.T * 2 * (self.K + self.V) * self.dtype.itemsize)

    def sample(self, tensors: Tensors) -> Tensors:
        return some_heads(tensors, self.H)


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
        normal = Normal(self.dtype, device)
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

    def part_flops(self, part: str) -> int:
        """Per element: square and sum 2, three products, sigmoid 3; the backward twice as much."""
        return (8 if part == FORWARD else 16) * self.rows * self.D

    def part_bytes(self, part: str) -> int:
        """Forward: reads x, gate, weight, writes o. Backward: reads x, gate, weight, do, writes dx, dgate,
        dweight.
        """
        rows, weights = (3, 1) if part == FORWARD else (5, 2)
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
        normal = Normal(self.dtype, device)
        wide = self.H * self.D
        return {
            "x": normal(self.B, self.T, self.hidden),
            "do": normal(self.B, self.T, self.hidden),
            "qkv_proj": normal(3 * wide, self.hidden) * self.hidden**-0.5,
            "output_gate": normal(wide, self.hidden) * self.hidden**-0.5,
            "norm": normal(wide),
            "out_proj": normal(self.hidden, wide) * wide**-0.5,
            "decay": decay_rates("minimax", self.H).to(device),
        }

    def specs(self, device: torch.device) -> list[Spec]:
        norm = GatedRMSNorm(self.dtype, self.B * self.T, self.H * self.D)
        return self.attention.specs(device) + norm.specs(device)

    def ours(self, backend: str) -> Function:
        def module(device: torch.device) -> torch.nn.Module:
            return lightning_attn.LightningAttention(
                self.hidden, self.H, self.D, layer_idx=0, num_layers=LAYERS, device=device, dtype=self.dtype
            )

        return as_function(module, backend=backend)

    @property
    def plain(self) -> Function:
        return partial(eager.layer, eps=EPS)

    @property
    def truth(self) -> Function:
        return partial(truth.layer, eps=EPS)

    def call(self, function: Function, inputs: Tensors) -> Tensors:
        weights = {name: inputs[name] for name in self.differentiable[1:]}
        return {"o": function(inputs["x"], decay=inputs["decay"], **weights)}

    @property
    def attention(self) -> Attention:
        return Attention(self.dtype, self.T, self.H, self.D, self.D, self.B)

    def part_flops(self, part: str) -> int:
        """The attention's, and five projections between hidden and H*D: 2 flops per token and weight, backward
        4.
        """
        weights = 5 * self.hidden * self.H * self.D
        return self.attention.flops(part) + (2 if part == FORWARD else 4) * self.B * self.T * weights

    def part_bytes(self, part: str) -> int:
        """Forward: reads x and the weights, writes o. Backward: reads x, do and the weights, writes dx and the
        gradients of the weights.
        """
        rows, weights = (2, 1) if part == FORWARD else (3, 2)
        size = 5 * self.hidden * self.H * self.D + self.H * self.D
        return (rows * self.B * self.T * self.hidden + weights * size) * self.dtype.itemsize


def as_function(make: Callable[[torch.device], torch.nn.Module], **options: object) -> Function:
    """A layer as a function of its input and its weights, so that every version is given the same ones. The
    layer is made where its input is first seen, and knows its decay rates itself.
    """
    module = cache(make)

    def function(x: Tensor, *, decay: Tensor, **weights: Tensor) -> Tensor:
        parameters = {f"{name}.weight": w for name, w in weights.items()}
        result = torch.func.functional_call(module(x.device), parameters, (x,), options)
        return result[0] if isinstance(result, tuple) else result

    return function
