"""The launches of the attention, from the tensors of a call: which kernels, on which programs, moving how much."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import autotune, config
from .chunk import chunk_kernel
from .chunk_backward import chunk_backward_kernel, chunk_backward_split_kernel
from .chunk_history import chunk_history_kernel
from .chunk_state import chunk_state_kernel
from .config import Arch, Segments, Tiles
from .launch import Launch, operand, state
from .scan import scan_kernel

SCAN_BLOCK = 1024  # elements of a state
HISTORY_BLOCKS = 16  # of tokens, for which a program of `history` reads a state once


@dataclass(frozen=True)
class Call:
    """What all sweeps of a call have in common. `shape` is B, T, H."""

    decay: Tensor
    scale: float
    cu_seqlens: Tensor | None
    shape: tuple[int, int, int]
    arch: Arch
    choose: autotune.Choice = autotune.tiles

    @property
    def sequences(self) -> int:
        return self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def tiles(self, configured: autotune.Configured[autotune.T], K: int, V: int, x: Tensor) -> autotune.T:
        """Of the kernel that `configured` is for, on operands like x."""
        return self.choose(configured, K, V, x.dtype, self.arch, x.device)

    def cut(
        self, columns: int, state_size: int, bytes_per_token: int, tiles: Tiles, passes: int = 2
    ) -> Segments:
        """The segments of each chain (a sequence, or all packed ones) for sweeps of so many programs a head, which take
        so many passes over what is cut.
        """
        B, T, H = self.shape
        # A segment's state is written, scanned (read and written) and read.
        state_tokens = 4 * 4 * state_size // bytes_per_token
        documents = 0 if passes == 1 else 1 if self.cu_seqlens is None else self.sequences
        return config.segments(B * H * columns, T, documents, state_tokens, tiles, self.arch)

    def pieces(self, cut: Segments) -> int:
        """Of sequences, cut in segments; see `primitives`."""
        if self.cu_seqlens is None:
            return self.shape[0] * cut.count
        return self.sequences + cut.count - 1 if self.sequences else 0

    def arguments(self, cut: Segments, programs: int) -> dict:
        return {
            "decay": self.decay,
            "cu_seqlens": self.cu_seqlens,
            "scale": float(self.scale),
            "programs": programs,
            "tokens": self.shape[1],
            "heads": self.shape[2],
            "sequences": self.sequences,
            "segments": cut.count,
            "length": cut.length,
        }


@dataclass(frozen=True)
class Sweep:
    """A sweep of `chunk_kernel` in one direction of time: its operands, and the states at its two ends."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    initial: tuple | None
    final: tuple | None
    reverse: bool


def forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, initial: Tensor | None, final: Tensor | None, call: Call
) -> list[Launch]:
    return _sweep(Sweep(q, k, v, o, state(initial), state(final), reverse=False), call)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    initial: Tensor | None,
    dstate: Tensor | None,
    dinitial: Tensor | None,
    call: Call,
) -> list[Launch]:
    launches = _sweep(Sweep(do, v, k, dq, state(initial, transposed=True), None, reverse=False), call)
    K, V = q.shape[3], v.shape[3]
    B, T, H = call.shape
    size = q.element_size()
    whole = call.tiles(config.chunk_backward, K, V, q)
    tiles = whole or call.tiles(config.chunk_backward_split, K, V, q)
    columns_k, columns_v = (0, 1) if whole else (-(-K // tiles.value), -(-V // tiles.value))
    cut = call.cut(columns_k + columns_v, K * V, 3 * (K + V) * size, tiles)
    before, entering = _entering(q, do, state(dstate), True, cut, call)
    programs = call.pieces(cut) * H * (columns_k + columns_v)
    arguments = {
        "q": operand(q),
        "k": operand(k),
        "v": operand(v),
        "do": operand(do),
        "dk": operand(dk),
        "dv": operand(dv),
        "dstate": state(dstate),
        "entering": state(entering),
        "dinitial": state(dinitial),
        **call.arguments(cut, programs),
    }
    constants = {"K": K, "V": V, "BLOCK": tiles.block}
    tokens = B * T * H
    bytes = tokens * 3 * (K + V) * size + _state_bytes(dstate, dinitial) + crossing_bytes(entering, cut.count)
    key, value, block = config.power_of_two(K), config.power_of_two(V), tiles.block
    if whole:
        constants |= {"BLOCK_K": key, "BLOCK_V": value}
        flops = tokens * (4 * block * (key + value) + 6 * key * value)
        main = Launch(chunk_backward_kernel, programs, arguments, constants, tiles, bytes, 0, flops)
    else:
        side = max(key, value)
        constants |= {"BLOCK_K": side, "TILE": tiles.value}
        flops = tokens * (columns_v + columns_k) * (2 * block * (side + tiles.value) + 4 * side * tiles.value)
        # Each program of dv reads k, q and its part of do, each of dk v, do and its part of q.
        again = tokens * size * (columns_v * 2 * K + V + columns_k * 2 * V + K - 2 * (K + V))
        main = Launch(
            chunk_backward_split_kernel, programs, arguments, constants, tiles,
            bytes, again, flops,
        )  # fmt: skip
    return [*launches, *before, main]


def state_alone(
    k: Tensor, v: Tensor, initial: Tensor | None, reverse: bool, call: Call
) -> tuple[list[Launch], Tensor]:
    """The launches that make the state after the sweep of dense k and v, T > 0, and the states [B, segments, H, K, V] whose
    last it is: the one that enters a segment of no tokens past the end.
    """
    K, V = k.shape[3], v.shape[3]
    tiles = call.tiles(config.chunk_state, K, V, k)
    cut = call.cut(-(-V // tiles.value), K * V, (K + V) * k.element_size(), tiles, passes=1)
    states = k.new_empty((k.shape[0], cut.count + 1, *k.shape[2:], V), dtype=torch.float32)
    launches = _states(
        k, v, state(initial), states.flatten(0, 1), Segments(cut.count + 1, cut.length), call, float(call.scale),
        reverse=False, lag=int(reverse), flipped=reverse,
    )  # fmt: skip
    return launches[:1] if cut.count == 1 else launches, states  # of one segment there is nothing to scan


def history(x: Tensor, states: Tensor, out: Tensor, reverse: bool, call: Call) -> list[Launch]:
    """The launch that adds to `out` what dense `states` add to the tokens after them; T > 0."""
    K, V = x.shape[3], out.shape[3]
    B, T, H = call.shape
    tiles = call.tiles(config.chunk_state, K, V, x)
    columns, length = -(-V // tiles.value), HISTORY_BLOCKS * tiles.block
    spans = -(-T // length)
    programs = B * spans * H * columns
    arguments = {
        "x": operand(x),
        "out": operand(out),
        "state": state(states),
        "decay": call.decay,
        "scale": float(call.scale),
        "programs": programs,
        "tokens": T,
        "heads": H,
        "spans": spans,
        "length": length,
    }
    tokens = B * T * H
    launch = Launch(
        chunk_history_kernel,
        programs,
        arguments,
        {"K": K, "V": V, **_blocks(tiles), "REVERSE": reverse},
        tiles,
        bytes=tokens * (K + 2 * V) * x.element_size() + states.nbytes,
        again=tokens * K * x.element_size() * (columns - 1) + states.nbytes * (spans - 1),
        flops=tokens * columns * 2 * tiles.key * tiles.value,
    )
    return [launch]


def _sweep(x: Sweep, call: Call) -> list[Launch]:
    B, T, H = call.shape
    K, V = x.k.shape[3], x.v.shape[3]
    tiles = call.tiles(config.chunk, K, V, x.k)
    columns = -(-V // tiles.value)
    size = x.k.element_size()
    cut = call.cut(columns, K * V, (2 * K + 2 * V) * size, tiles)
    before, entering = _entering(x.k, x.v, x.initial, x.reverse, cut, call)
    programs = call.pieces(cut) * H * columns
    tokens = B * T * H
    main = Launch(
        chunk_kernel,
        programs,
        {
            "q": operand(x.q),
            "k": operand(x.k),
            "v": operand(x.v),
            "o": operand(x.o),
            "initial": x.initial,
            "entering": state(entering),
            "final": x.final,
            **call.arguments(cut, programs),
        },
        {"K": K, "V": V, **_blocks(tiles), "REVERSE": x.reverse},
        tiles,
        bytes=tokens * 2 * (K + V) * size
        + _state_bytes(x.initial, x.final)
        + crossing_bytes(entering, cut.count),
        again=tokens * 2 * K * size * (columns - 1),
        flops=tokens * columns * (2 * tiles.block * (tiles.key + tiles.value) + 4 * tiles.key * tiles.value),
    )
    return [*before, main]


def _entering(
    k: Tensor, v: Tensor, initial: tuple | None, reverse: bool, cut: Segments, call: Call
) -> tuple[list[Launch], Tensor | None]:
    """The states that enter the segments, and the two launches that make them; none for a chain of one segment."""
    if cut.count == 1:
        return [], None
    entering = k.new_empty((call.shape[0] * cut.count, *k.shape[2:], v.shape[3]), dtype=torch.float32)
    scale = float(call.scale) if reverse else None
    return _states(k, v, initial, entering, cut, call, scale, reverse=reverse, lag=int(reverse)), entering


def _states(
    k: Tensor,
    v: Tensor,
    initial: tuple | None,
    entering: Tensor,
    cut: Segments,
    call: Call,
    scale: float | None,
    *,
    reverse: bool,
    lag: int,
    flipped: bool = False,
) -> list[Launch]:
    """The launches that fill `entering` [B * segments, H, K, V]; `flipped` takes the tokens from the last to the first."""
    B, T, H = call.shape
    K, V = k.shape[3], v.shape[3]
    tiles = call.tiles(config.chunk_state, K, V, k)
    columns = -(-V // tiles.value)
    written = crossing_bytes(entering, cut.count)
    programs = B * (cut.count - 1) * H * columns
    tokens = B * min(T, (cut.count - 1) * cut.length) * H
    states = Launch(
        chunk_state_kernel,
        programs,
        {
            "k": operand(k, flipped=flipped),
            "v": operand(v, flipped=flipped),
            "initial": initial,
            "entering": state(entering),
            **call.arguments(cut, programs),
            "scale": scale,
        },
        {"K": K, "V": V, **_blocks(tiles), "REVERSE": reverse, "LAG": lag},
        tiles,
        bytes=tokens * (K + V) * k.element_size() + _state_bytes(initial) + written,
        again=tokens * K * k.element_size() * (columns - 1),
        flops=tokens * columns * 2 * tiles.key * tiles.value,
    )
    scan_programs = B * H * -(-K * V // SCAN_BLOCK)
    arguments = call.arguments(cut, scan_programs)
    del arguments["scale"]
    scan = Launch(
        scan_kernel,
        scan_programs,
        {"entering": entering, **arguments},
        {"SIZE": K * V, "BLOCK": SCAN_BLOCK, "REVERSE": reverse},
        Tiles(SCAN_BLOCK, 0, 0, warps=4, stages=2),
        bytes=2 * written,
        flops=B * (cut.count - 1) * H * K * V * 3,
    )
    return [states, scan]


def _blocks(tiles: Tiles) -> dict[str, int]:
    return {"BLOCK": tiles.block, "BLOCK_K": tiles.key, "BLOCK_V": tiles.value}


def crossing_bytes(entering: Tensor | None, segments: int) -> int:
    """Of the states that one segment leaves to the next: none enters the first of a chain."""
    return 0 if entering is None else entering.nbytes // segments * (segments - 1)


def _state_bytes(*states: Tensor | tuple | None) -> int:
    return sum((x if isinstance(x, Tensor) else x[0]).nbytes for x in states if x is not None)
