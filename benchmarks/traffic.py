"""Bytes and flops of each operation, from the launches of a call, beside the least that its algorithm can move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lightning_attn.backends.triton import catalogue, moe_catalogue
from lightning_attn.backends.triton.attention import crossing_bytes
from lightning_attn.backends.triton.catalogue import Shape
from lightning_attn.backends.triton.config import Arch
from lightning_attn.backends.triton.launch import Launch

DTYPE, DIM, HEADS = torch.bfloat16, 128, 64
SIZE = 2  # bytes of an element
ROW = DIM * SIZE  # bytes of an operand, for a token and head: 256
STATE = DIM * DIM * 4
ONE_PASS = Shape(B=8, T=8192, H=HEADS)
SPLIT = Shape(B=1, T=131072, H=8)


@dataclass(frozen=True)
class Traffic:
    """Of one call, for each `unit` of it."""

    operation: str
    shape: str
    arch: str
    unit: str
    bytes: float  # through global memory: each element once for each time that a launch needs it
    segment_states: float  # of these, the states by which the segments of a split sequence follow each other
    again: float  # beside these, what neighbouring programs read once more, mostly from the L2 cache
    flops: float
    floor: int  # bytes, but for segment states

    @property
    def fault(self) -> str | None:
        if self.unit not in ("element", "token") and self.bytes - self.segment_states > self.floor:
            return f"{self.operation} on {self.arch} moves {self.bytes:.1f} B a {self.unit}, not {self.floor}"
        return None


def traffic(arch: Arch) -> Iterator[Traffic]:
    """The floors are those of the algorithm, in 16 bits. Forward q, k, v, o; split, k and v once more. The gradients
    take two sweeps, (q or v), k, do -> dq and q, k, v, do -> dk, dv; split, two of the operands of each once more.
    """
    for name, shape, floors in (
        ("one pass", ONE_PASS, (4 * ROW, 10 * ROW)),
        ("split", SPLIT, (6 * ROW, 14 * ROW)),
    ):
        for operation, launches, floor in zip(
            ("forward", "backward"),
            (
                catalogue.forward(shape, DIM, DTYPE, arch),
                catalogue.backward(shape, DIM, DTYPE, arch),
            ),
            floors,
            strict=True,
        ):
            where = f"B={shape.B} T={shape.T} H={shape.H} d={DIM}"
            yield _of(launches, f"{operation}, {name}", where, arch, "token-head", shape.tokens, floor)
    for state, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        name = str(state).removeprefix("torch.")
        launches = catalogue.decoding(32, 1, HEADS, DIM, DTYPE, arch, state=state)
        floor = 2 * DIM * DIM * size + 4 * ROW
        where = f"B=32 T=1 H={HEADS} d={DIM}"
        yield _of(launches, f"decode, {name} state", where, arch, "token-head", 32 * HEADS, floor)
    rows, D = 4096, DIM * HEADS
    for operation, launches, operands in (
        ("forward", catalogue.norm_forward(rows, D, DTYPE, arch), 3),
        ("backward", catalogue.norm_backward(rows, D, DTYPE, arch), 5),
    ):
        where = f"rows={rows} D={D}"
        yield _of(launches, f"gated_rms_norm, {operation}", where, arch, "element", rows * D, operands * SIZE)
    yield from _experts(arch)


def _experts(arch: Arch) -> Iterator[Traffic]:
    """The floor is the matrices of the experts that can have tokens, read once (backward: and their gradients
    written), and a row of D for x and y (x, dy and dx). Beyond it are the activations, which go through memory between two
    products: h, a and z of each pair. Where the host counts, as many experts have tokens as can have.
    """
    E, D, F, k = (
        moe_catalogue.EXPERTS,
        moe_catalogue.HIDDEN,
        moe_catalogue.INTERMEDIATE,
        moe_catalogue.TOP_K,
    )
    for T in (1, 32, 8192):
        launches = [*moe_catalogue.sorting(T, arch), *moe_catalogue.mlp_forward(T, DTYPE, arch)]
        touched = min(E, T * k) * 3 * D * F * SIZE
        floor = touched // T + 2 * D * SIZE
        yield _of(launches, "moe_mlp, forward", f"T={T} {E} experts", arch, "token", T, floor)
    T = 8192
    floor = 2 * E * 3 * D * F * SIZE // T + 3 * D * SIZE
    launches = moe_catalogue.mlp_backward(T, DTYPE, arch)
    yield _of(launches, "moe_mlp, backward", f"T={T} {E} experts", arch, "token", T, floor)


def _of(
    launches: list[Launch], operation: str, shape: str, arch: Arch, unit: str, units: int, floor: int
) -> Traffic:
    return Traffic(
        operation,
        shape,
        arch.name,
        unit,
        bytes=sum(launch.bytes for launch in launches) / units,
        segment_states=sum(_segment_states(launch) for launch in launches) / units,
        again=sum(launch.again for launch in launches) / units,
        flops=sum(launch.flops for launch in launches) / units,
        floor=floor,
    )


def _segment_states(launch: Launch) -> int:
    """Bytes of the states that one segment leaves to the next: written, scanned (read and written), read."""
    entering = launch.arguments.get("entering")
    if entering is None:
        return 0
    if launch.name == "scan":
        return launch.bytes
    return crossing_bytes(entering[0], launch.arguments["segments"])
