"""Which tiles, warps, stages and segments a kernel gets: pure functions of shape, dtype and architecture.

No length of a sequence enters into the choice of tiles, so nothing is compiled or tuned again for a new one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

KIB = 1024


@dataclass(frozen=True)
class Arch:
    """`shared` is the shared memory in bytes that one program may use, `processors` how many multiprocessors (compute
    units) there are.
    """

    name: str
    shared: int
    processors: int

    @property
    def matrix(self) -> str:
        """How products of tiles are made: see the tables below."""
        if self.name.startswith("gfx"):
            return "mfma"
        if not self.name.startswith("sm_"):
            return "host"
        return "wgmma" if 90 <= int(self.name.removeprefix("sm_")) < 120 else "mma"


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
INTERPRETER = Arch("interpreter", 1 << 40, 1)


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


# ---- attention ---------------------------------------------------------------------------------------------------
#
# A program keeps a state tile [key, value], outputs [block, value] and decays [block, block] in float32 registers: 255 of
# them a thread on NVIDIA, 512 on AMD. The tiles below are the largest that the compiler fits in without spilling at
# K = V = 64, 96, 128 and 256 (`python -m benchmarks.compile_report`; float32 gradients at 256 spill all the same): the
# wider the tile, the fewer programs read the same rows again.
#
#   wgmma     Hopper and datacentre Blackwell multiply from shared memory, 64 rows at a time or more: blocks of 64.
#   mma       Ampere, Ada and consumer Blackwell multiply from registers: blocks of 32, of 16 where the state is large.
#   mfma      AMD: four warps of 64 threads have the lanes of eight elsewhere, and twice the registers.
#   float32   Products are scalar multiply-adds, whose operands all pass through registers: blocks of 16.
#   host      The interpreter has no registers: few large programs.
#
# By the larger of K and V, rounded up to a power of two: tokens of a block, columns of a state tile, warps, stages.

_SWEEP = {
    "wgmma": {64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (64, 32, 8, 2)},
    "mma": {64: (32, 64, 8, 3), 128: (32, 64, 8, 3), 256: (16, 32, 8, 2)},
    "mfma": {64: (32, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 4, 2)},
    "float32": {64: (16, 64, 8, 2), 128: (16, 16, 8, 2), 256: (16, 16, 16, 1)},
    "mfma float32": {64: (16, 64, 8, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 2)},
    "host": {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 256: (64, 128, 4, 1)},
}
_STATE = {
    "wgmma": {64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 256: (64, 64, 8, 2)},
    "mma": {64: (32, 64, 8, 3), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    "mfma": {64: (32, 64, 4, 2), 128: (32, 128, 4, 2), 256: (32, 64, 4, 2)},
    "float32": {64: (16, 64, 8, 2), 128: (16, 64, 8, 2), 256: (16, 32, 8, 2)},
    "mfma float32": {64: (16, 64, 8, 2), 128: (16, 64, 8, 2), 256: (16, 32, 8, 2)},
    "host": {64: (64, 64, 4, 1), 128: (64, 128, 4, 1), 256: (64, 256, 4, 1)},
}
# Where one program holds a whole state and makes dk and dv; beyond 64, and in float32, it would spill.
_BACKWARD_WHOLE = {
    "wgmma": {64: (64, 64, 8, 2)},
    "mma": {64: (32, 64, 8, 2)},
    "mfma": {64: (32, 64, 4, 2)},
    "float32": {},
    "mfma float32": {},
    "host": {64: (64, 64, 4, 1)},
}
_BACKWARD_SPLIT = {
    "wgmma": {128: (64, 64, 8, 3), 256: (64, 32, 8, 2)},
    "mma": {128: (32, 64, 8, 2), 256: (16, 32, 8, 2)},
    "mfma": {128: (32, 64, 4, 2), 256: (32, 32, 4, 2)},
    "float32": {64: (16, 32, 8, 2), 128: (16, 16, 8, 2), 256: (16, 16, 8, 2)},
    "mfma float32": {64: (16, 32, 8, 2), 128: (16, 16, 8, 2), 256: (16, 16, 8, 1)},
    "host": {128: (64, 64, 4, 1), 256: (64, 128, 4, 1)},
}


def _pick(table: dict, K: int, V: int, dtype: torch.dtype, arch: Arch) -> Tiles | None:
    kind = arch.matrix
    if dtype == torch.float32 and kind != "host":
        kind = "mfma float32" if kind == "mfma" else "float32"
    key, value = power_of_two(K), power_of_two(V)
    side = max(64, key, value)
    if side not in table[kind]:
        return None
    block, width, warps, stages = table[kind][side]
    return Tiles(block, key, min(value, width), warps, stages)


@functools.lru_cache(maxsize=1024)
def chunk(K: int, V: int, dtype: torch.dtype, arch: Arch) -> Tiles:
    """Of `chunk_kernel`."""
    return _known(_pick(_SWEEP, K, V, dtype, arch))


@functools.lru_cache(maxsize=1024)
def chunk_state(K: int, V: int, dtype: torch.dtype, arch: Arch) -> Tiles:
    """Of `chunk_state_kernel`."""
    return _known(_pick(_STATE, K, V, dtype, arch))


@functools.lru_cache(maxsize=1024)
def chunk_backward(K: int, V: int, dtype: torch.dtype, arch: Arch) -> Tiles | None:
    """Of `chunk_backward_kernel`; None where no program can hold a whole state."""
    return _pick(_BACKWARD_WHOLE, K, V, dtype, arch)


@functools.lru_cache(maxsize=1024)
def chunk_backward_split(K: int, V: int, dtype: torch.dtype, arch: Arch) -> Tiles:
    """Of `chunk_backward_split_kernel`; `value` is the width of the tiles of both K and V."""
    return _known(_pick(_BACKWARD_SPLIT, K, max(K, V), dtype, arch))


def _known(tiles: Tiles | None) -> Tiles:
    assert tiles is not None, "every side up to 256 has a row in the table"
    return tiles


SCAN_STEP = 16  # tokens that a sweep walks in the time in which the scan reads another state
LONGEST_SEGMENT = 1 << 30  # tokens: within a piece kernels count in 32 bits


@dataclass(frozen=True)
class Segments:
    """A chain of tokens cut into `count` segments of `length` tokens, the last one shorter."""

    count: int
    length: int


@functools.lru_cache(maxsize=4096)
def segments(
    programs: int, tokens: int, documents: int, state_tokens: int, tiles: Tiles, arch: Arch
) -> Segments:
    """How to cut a chain of `tokens`, for a sweep that has `programs` programs if it is not cut.

    One pass costs the tokens of a program, times the rounds in which the machine takes the programs. Two passes cost
    half as much again where a document is cut, `state_tokens` for a state that goes through memory, and a scan over
    all segments. The count is the least that comes within a twentieth of the best.
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
        return rounds * (cut.length * (1 + 0.5 * share) + state_tokens) + SCAN_STEP * cut.count

    least = -(-tokens // LONGEST_SEGMENT) or 1
    most = max(least, min(blocks, 4 * arch.processors // max(programs, 1) + 1))
    candidates = [cut(count) for count in range(least, most + 1)]
    best = min(map(cost, candidates))
    return next(candidate for candidate in candidates if cost(candidate) <= 1.05 * best)


@functools.lru_cache(maxsize=64)
def device_arch(device: torch.device) -> Arch:
    """The architecture of a device, with the number of processors that it really has."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name, least = properties.gcnArchName.split(":")[0], 64 * KIB
    else:
        name, least = f"sm_{properties.major}{properties.minor}", 99 * KIB
    known = ARCHS.get(name, Arch(name, least, 0))
    return replace(known, processors=properties.multi_processor_count)


# ---- decoding and the norm: all that counts is the memory ----------------------------------------------------------


def warps_of(threads: int, arch: Arch) -> int:
    return max(1, threads // (64 if arch.name.startswith("gfx") else 32))


@functools.lru_cache(maxsize=1024)
def decode(K: int, V: int, state_size: int, arch: Arch) -> Tiles:
    """Of `decode_kernel`, on a state of elements of `state_size` bytes.

    A program asks for 16 KiB of the state at once: a few programs on a multiprocessor keep its memory busy, and a small
    batch still makes many. Columns are at least 32, as shorter rows would waste what the memory delivers. With twice as
    many threads as keys, and 32 elements a thread at most, the compiler loads k and q where they are used; it would
    move those of as many keys as threads through shared memory, one wait for the memory after the other.
    """
    key = power_of_two(K)
    value = min(power_of_two(V), max(32, 16 * KIB // state_size // key))
    return Tiles(0, key, value, warps_of(max(2 * key, key * value // 32), arch), 1)


@functools.lru_cache(maxsize=1024)
def norm(D: int, arch: Arch) -> Tiles:
    """Rows and columns of the kernels of the norm: whole rows, and at least 2048 elements.

    A thread has 16 of them, two accesses of 16 bytes to each 16-bit operand. More than 512 threads would have too few
    registers each for what the backward pass keeps.
    """
    columns = 1 << (D - 1).bit_length()
    rows = max(1, 2048 // columns)
    return Tiles(rows, 0, columns, warps_of(min(512, rows * columns // 16), arch), 1)


@dataclass(frozen=True)
class NormShare:
    """The rows that a program of the norm's backward pass sums up the gradient of the weight over, and whether the sum
    is compensated.
    """

    rows: int
    compensated: bool


def norm_share(rows: int, tiles: Tiles, arch: Arch) -> NormShare:
    """As many programs as run at the same time: 512 threads a multiprocessor, for which the registers suffice.

    Those of more than 8192 columns do not suffice for a compensated sum. It stays as exact as that of the plain operators
    if it is over 32 rows at most; their partial sums add a fortieth to the traffic.
    """
    compensated = tiles.value <= 8192
    programs = arch.processors * max(1, warps_of(512, arch) // tiles.warps)
    steps = max(1, -(-rows // (programs * tiles.block)))
    return NormShare((steps if compensated else min(steps, 32)) * tiles.block, compensated)


def norm_dweight(arch: Arch) -> Tiles:
    """Partial sums at a time, and columns, of `gated_rms_norm_dweight_kernel`: few steps, in rows of 64 bytes."""
    return Tiles(256, 0, 16, warps_of(128, arch), 1)
