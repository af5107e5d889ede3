"""Every kernel as real calls launch it: the launches of each operation, in each way it is called, on tensors of the
meta device, so that they can be compiled and counted for an architecture that is not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import attention, decode, gated_rms_norm
from .config import Arch
from .launch import Launch


@dataclass(frozen=True)
class Shape:
    """Of an attention's operands: B, T and H; B is 1 where `documents` are packed."""

    B: int
    T: int
    H: int
    documents: int | None = None

    @property
    def tokens(self) -> int:
        """Over all batch rows and heads."""
        return self.B * self.T * self.H

    @property
    def sequences(self) -> int:
        return self.documents or self.B


@dataclass(frozen=True)
class Entry:
    """A launch, the operation that it is part of, and in which of the ways that operation is called."""

    operation: str
    variant: str
    launch: Launch


# Enough heads to fill any device with one pass, or so few that every device cuts the sequence. All tensors are smaller
# than 2 GiB, as they mostly are: Triton uses other instructions for those on AMD.
DENSE = Shape(16, 1024, 64)
PACKED = Shape(1, 1024, 1024, documents=2)
SPLIT = Shape(1, 131072, 2)
SPLIT_PACKED = Shape(1, 131072, 2, documents=2)


def catalogue(dim: int, dtype: torch.dtype, arch: Arch) -> Iterator[Entry]:
    """Every kernel at head dim `dim`, as each way to call an operation specialises it; some twice over."""
    for variant, shape in {
        "dense": DENSE,
        "packed, states": PACKED,
        "split": SPLIT,
        "split, packed, states": SPLIT_PACKED,
    }.items():
        for launch in forward(shape, dim, dtype, arch, states="states" in variant):
            yield Entry("forward", variant, launch)
        for launch in backward(shape, dim, dtype, arch, states="states" in variant):
            yield Entry("backward", variant, launch)
    for reverse in (False, True):
        for launch in state_alone(SPLIT, dim, dtype, arch, reverse=reverse):
            yield Entry("state", "split, states, reverse" if reverse else "split, states", launch)
        for launch in history(SPLIT, dim, dtype, arch, reverse=reverse):
            yield Entry("history", "states, reverse" if reverse else "states", launch)
    for launch in decoding(2, 1, 64, dim, dtype, arch):
        yield Entry("decode", "T=1", launch)
    for launch in decoding(2, 4, 64, dim, dtype, arch, state=torch.bfloat16, slots=True):
        yield Entry("decode", "T=4, slots, bfloat16", launch)
    for D in (64 * dim, dim):  # a layer, a head
        for launch in norm_forward(4096, D, dtype, arch):
            yield Entry("gated_rms_norm", f"D={D}", launch)
        for launch in norm_backward(4096, D, dtype, arch):
            yield Entry("gated_rms_norm", f"D={D}", launch)


def forward(shape: Shape, dim: int, dtype: torch.dtype, arch: Arch, *, states: bool = False) -> list[Launch]:
    """Of `lightning_attention`, with K = V = `dim`; with `states` it takes an initial state and returns the last."""
    q, k, v, o = (_operand(shape, dim, dtype) for _ in range(4))
    initial, final = (_state(shape, dim) if states else None for _ in range(2))
    return attention.forward(q, k, v, o, initial, final, _call(shape, arch))


def backward(shape: Shape, dim: int, dtype: torch.dtype, arch: Arch, *, states: bool = False) -> list[Launch]:
    """Of its gradients; with `states` also from that of the last state and to that of the initial one."""
    q, k, v, do, dq, dk, dv = (_operand(shape, dim, dtype) for _ in range(7))
    initial, dstate, dinitial = (_state(shape, dim) if states else None for _ in range(3))
    call = _call(shape, arch)
    return attention.backward(q, k, v, do, dq, dk, dv, initial, dstate, dinitial, call)


def state_alone(shape: Shape, dim: int, dtype: torch.dtype, arch: Arch, *, reverse: bool) -> list[Launch]:
    """Of the state alone, from an initial state."""
    k, v = (_operand(shape, dim, dtype) for _ in range(2))
    return attention.state_alone(k, v, _state(shape, dim), reverse, _call(shape, arch))[0]


def history(shape: Shape, dim: int, dtype: torch.dtype, arch: Arch, *, reverse: bool) -> list[Launch]:
    """Of what a state adds to outputs."""
    x, out = (_operand(shape, dim, dtype) for _ in range(2))
    return attention.history(x, _state(shape, dim), out, reverse, _call(shape, arch))


def decoding(
    B: int,
    T: int,
    H: int,
    dim: int,
    dtype: torch.dtype,
    arch: Arch,
    *,
    state: torch.dtype = torch.float32,
    slots: bool = False,
) -> list[Launch]:
    """Of `lightning_attention_decode`."""
    q, k, v, o = (empty(B, T, H, dim, dtype=dtype) for _ in range(4))
    rows = empty(B, dtype=torch.int32) if slots else None
    states = empty(B, H, dim, dim, dtype=state)
    return decode.launches(q, k, v, o, empty(H), states, rows, 1.0, arch)


def norm_forward(rows: int, D: int, dtype: torch.dtype, arch: Arch) -> list[Launch]:
    """Of `gated_rms_norm`."""
    x, gate, y = (empty(rows, D, dtype=dtype) for _ in range(3))
    return gated_rms_norm.forward(x, gate, empty(D, dtype=dtype), y, empty(rows), 1e-6, arch)


def norm_backward(rows: int, D: int, dtype: torch.dtype, arch: Arch) -> list[Launch]:
    """Of its gradients."""
    dy, x, gate, dx, dgate = (empty(rows, D, dtype=dtype) for _ in range(5))
    weight, dweight = (empty(D, dtype=dtype) for _ in range(2))
    return gated_rms_norm.backward(dy, x, gate, weight, empty(rows), dx, dgate, dweight, arch)


def _call(shape: Shape, arch: Arch) -> attention.Call:
    offsets = None if shape.documents is None else empty(shape.documents + 1, dtype=torch.int32)
    return attention.Call(empty(shape.H), 1.0, offsets, (shape.B, shape.T, shape.H), arch)


def _operand(shape: Shape, dim: int, dtype: torch.dtype) -> Tensor:
    return empty(shape.B, shape.T, shape.H, dim, dtype=dtype)


def _state(shape: Shape, dim: int) -> Tensor:
    return empty(shape.sequences, shape.H, dim, dim)


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")
