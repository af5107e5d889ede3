"""Which tiles, warps, stages and segments a kernel gets: pure functions of shape, dtype and architecture.

No length of a sequence enters into the choice of tiles, so nothing is compiled or tuned again for a new one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

KIB = 1024


@dataclass(frozen=True)
class Arch:
    """`shared` is the shared memory in bytes that one program may use, `processors` how many programs run side by
    side when each takes a whole multiprocessor (compute unit).
    """

    name: str
    shared: int
    processors: int


ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 163 * KIB, 108),
        Arch("sm_86", 99 * KIB, 84),
        Arch("sm_89", 99 * KIB, 128),
        Arch("sm_90", 227 * KIB, 132),
        Arch("sm_100", 227 * KIB, 148),
        Arch("sm_120", 99 * KIB, 170),
        Arch("gfx942", 64 * KIB, 304),
    )
}


@dataclass(frozen=True)
class Tiles:
    """Tokens, columns of K and columns of V that a program holds at a time; the compiler's warps and stages."""

    block: int
    key: int
    value: int
    warps: int
    stages: int


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 16, the least that a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())


@functools.lru_cache(maxsize=1024)
def chunk(K: int, V: int, dtype: torch.dtype, arch: Arch) -> Tiles:
    """Of `chunk_kernel`."""
    key, value = power_of_two(K), power_of_two(V)
    if dtype == torch.float32:
        return Tiles(16, key, min(value, 32 if key <= 128 else 16), 8, 1)
    return Tiles(64, key, min(value, 64 if key <= 128 else 32), 8, 2)


@functools.lru_cache(maxsize=1024)
def chunk_backward(K: int, V: int, dtype: torch.dtype, arch: Arch) -> Tiles:
    """Of `chunk_backward_kernel`, if it holds a whole state, else of `chunk_backward_split_kernel`."""
    key, value = power_of_two(K), power_of_two(V)
    if dtype == torch.float32:
        return Tiles(16, 16, 16, 8, 1)
    if key * value <= 64 * 64:
        return Tiles(64, key, value, 8, 2)
    return Tiles(64, 64, 64, 8, 2) if max(key, value) <= 128 else Tiles(64, 32, 32, 8, 2)


@dataclass(frozen=True)
class Segments:
    """A chain of tokens cut into `count` segments of `length` tokens, the last one shorter."""

    count: int
    length: int


def chunk_states(K: int, V: int, dtype: torch.dtype, arch: Arch) -> Tiles:
    """Of `chunk_kernel` where it only carries the state on."""
    return chunk(K, V, dtype, arch)


@functools.lru_cache(maxsize=4096)
def segments(
    programs: int, tokens: int, documents: int, state_tokens: int, tiles: Tiles, arch: Arch
) -> Segments:
    """How to cut a chain of `tokens`, for a sweep that has `programs` programs if it is not cut.

    One pass costs the tokens of a program, times the rounds in which the machine takes the programs. Two passes cost
    half as much again where a document is cut, and `state_tokens` for a state that goes through memory. The count is
    the least that comes within a twentieth of the best.
    """
    blocks = max(1, -(-tokens // tiles.block))

    def cut(count: int) -> Segments:
        length = -(-blocks // count) * tiles.block
        return Segments(max(1, -(-tokens // length)), length)

    def cost(cut: Segments) -> float:
        rounds = -(-programs * cut.count // arch.processors)
        if cut.count == 1:
            return rounds * cut.length
        share = min(1.0, tokens / documents / cut.length) if documents else 0.0  # that the first pass reads
        return rounds * (cut.length * (1 + 0.5 * share) + state_tokens)

    most = min(blocks, 4 * arch.processors // max(programs, 1) + 1)
    candidates = [cut(count) for count in range(1, most + 1)]
    best = min(map(cost, candidates))
    return next(candidate for candidate in candidates if cost(candidate) <= 1.05 * best)


@functools.lru_cache(maxsize=64)
def device_arch(device: torch.device) -> Arch:
    """The architecture of a device, with the number of processors that it really has."""
    if device.type != "cuda":
        return ARCHS["sm_90"]  # in the interpreter
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return Arch(name, 64 * KIB, properties.multi_processor_count)
    name = f"sm_{properties.major}{properties.minor}"
    return Arch(name, properties.shared_memory_per_block_optin, properties.multi_processor_count)
