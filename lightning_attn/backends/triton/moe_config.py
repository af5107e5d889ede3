"""Which tiles, warps and stages the kernels of the mixture of experts get: pure functions of sizes, dtype and architecture.

How many rows a group has is known on the device only. The host knows how many there are in all and in how many groups at
most, and chooses one of three ways by that; within each the device takes the tile that suits what a group has left.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from .config import Arch, Tiles, warps_of

# ---- products of groups ------------------------------------------------------------------------------------------
#
# `block` rows of x, `value` rows of the weight and `key` of what both have in common at a time. A program of the MLP's first
# product, and of the backward through its activation, holds two accumulators: they have half as many rows of the weight.
#
#   large   Accumulators of 128 x 256 (wgmma) or 128 x 128; what a group has beyond whole tiles goes into tiles of 16, 32 or 64
#           rows, in which the weight is the operand with the rows of the matrix instruction.
#   small   Memory-bound: a tile takes up to 64 rows of a group, so that each weight is read once, deep in flight.
#   few     Two rows at a time, or one, without matrix instructions: 4 KiB of the weight in flight for each accumulator.

_LARGE = {
    "wgmma": Tiles(128, 64, 256, 8, 3),
    "mma": Tiles(128, 32, 128, 8, 3),
    "mfma": Tiles(128, 64, 128, 8, 2),
    "float32": Tiles(64, 16, 64, 8, 2),
    "host": Tiles(128, 64, 128, 4, 1),
}
_SMALL = {
    "wgmma": Tiles(64, 128, 128, 4, 4),
    "mma": Tiles(64, 64, 64, 4, 4),
    "mfma": Tiles(64, 64, 64, 4, 2),
    "float32": Tiles(16, 32, 64, 4, 2),
    "host": Tiles(64, 64, 128, 4, 1),
}
_FEW = {
    "wgmma": Tiles(2, 256, 16, 4, 1),
    "mma": Tiles(2, 256, 16, 4, 1),
    "mfma": Tiles(2, 256, 16, 4, 1),
    "float32": Tiles(2, 128, 16, 4, 1),
    "host": Tiles(4, 64, 64, 4, 1),
}
# The gradient of a weight: `block` of its rows, `value` of its columns, `key` rows of a group at a time.
_WEIGHT_GRADIENT = {
    "wgmma": Tiles(128, 64, 256, 8, 3),
    "mma": Tiles(128, 32, 128, 8, 3),
    "mfma": Tiles(128, 32, 128, 8, 2),
    "float32": Tiles(64, 16, 64, 8, 2),
    "host": Tiles(128, 64, 128, 4, 1),
}

FEW_ROWS = 16  # pairs in all up to which groups have few each
SMALL_ROWS = 48  # pairs an expert, on average, up to which the weights' traffic is the time
TOGETHER = 8  # row tiles that share the columns of a weight while those are in the L2 cache


@dataclass(frozen=True)
class Product:
    """How a product of groups is made: its `way` (above), its tiles, whether tiles come by descriptor (TMA), and how many
    programs there are if there are tiles for more.
    """

    way: str
    tiles: Tiles
    descriptors: bool
    programs: int


@functools.lru_cache(maxsize=1024)
def product(
    rows: int, groups: int, dtype: torch.dtype, weight: torch.dtype, accumulators: int, arch: Arch
) -> Product:
    """Of `rows` rows of `dtype` in `groups` groups; `accumulators` is how many a program holds."""
    way = "few" if rows <= FEW_ROWS else "small" if rows <= SMALL_ROWS * groups else "large"
    table = {"few": _FEW, "small": _SMALL, "large": _LARGE}[way]
    tiles = table[_kind(dtype, arch)]
    tiles = replace(tiles, value=tiles.value // accumulators)
    if (
        way == "small" and weight == torch.int8
    ):  # which is converted in registers: half as much of it at a time
        tiles = replace(tiles, key=max(tiles.key // 2, 16))
    # A large tile has a multiprocessor to itself. The others are many, small, and all the programs that there can be.
    programs = arch.processors if way == "large" and arch.matrix != "host" else 1 << 30
    return Product(way, tiles, way == "large" and has_descriptors(dtype, arch), programs)


@functools.lru_cache(maxsize=64)
def weight_gradient(dtype: torch.dtype, arch: Arch) -> Tiles:
    return _WEIGHT_GRADIENT[_kind(dtype, arch)]


def has_descriptors(dtype: torch.dtype, arch: Arch) -> bool:
    """Whether the hardware copies tiles by descriptor, and tiles are large enough for that to pay."""
    return arch.matrix == "wgmma" and dtype != torch.float32


def _kind(dtype: torch.dtype, arch: Arch) -> str:
    return "float32" if dtype == torch.float32 and arch.matrix != "host" else arch.matrix


# ---- routing, sorting, and rows that move ------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def route(E: int, arch: Arch) -> Tiles:
    """Tokens and experts of the kernels of routing: whole rows, 8 logits a thread or so."""
    experts = max(16, 1 << (E - 1).bit_length())
    tokens = max(1, 1024 // experts)
    return Tiles(tokens, experts, 0, warps_of(128, arch), 1)


@functools.lru_cache(maxsize=4096)
def sort(E: int, pairs: int, arch: Arch) -> tuple[Tiles, int]:
    """Pairs of a block, experts, parts that are added up at a time; and the pairs of a part.

    A block compares its pairs with all experts and with each other, so it has fewer where there are many experts. A
    program takes at least 8 blocks, and there are at most 256 parts, whose counts every program adds up.
    """
    experts = max(16, 1 << (E - 1).bit_length())
    block = max(16, min(128, 8192 // experts))
    blocks = max(8, -(-pairs // (256 * block)))
    return Tiles(block, experts, max(1, 4096 // experts), warps_of(128, arch), 1), blocks * block


@functools.lru_cache(maxsize=1024)
def rows(D: int, arch: Arch) -> Tiles:
    """Rows and columns of kernels that move rows: 4 KiB of 16-bit numbers, in strips of at most 2048."""
    columns = min(2048, max(16, 1 << (D - 1).bit_length()))
    return Tiles(max(1, 2048 // columns), 0, columns, warps_of(128, arch), 1)


@functools.lru_cache(maxsize=1024)
def activation(F: int, arch: Arch) -> Tiles:
    """Columns at a time of the backward through the activation, which has six operands."""
    return Tiles(1, 0, min(1024, max(16, 1 << (F - 1).bit_length())), warps_of(128, arch), 1)
