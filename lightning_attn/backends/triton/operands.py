"""How the operands of products of groups go into a launch: by pointer and strides, and by descriptor where tiles are large and
the hardware copies them so.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import moe_config
from .moe_config import Product

Strided = tuple[Tensor, int, int, int]  # a weight, and its strides

FARTHEST = 2**23  # elements between rows: kernels count in 32 bits within a tile of up to 256
LEAST_ROWS = 16  # that a matrix instruction takes


@dataclass(frozen=True)
class Rows:
    """Rows of x, or with `order` those of the tokens of sorted pairs, of which each token has `top_k`."""

    x: Tensor
    order: Tensor | None = None
    top_k: int = 1

    @property
    def pointer(self) -> tuple[Tensor, int]:
        return self.x, self.x.stride(0)


def row_tiles(x: Rows, how: Product) -> TensorDescriptor | None:
    if not how.descriptors or x.order is not None or not _describable(x.x):
        return None
    return TensorDescriptor.from_tensor(x.x, [how.tiles.block, how.tiles.key])


def weight(w: Tensor, how: Product) -> tuple[Strided, TensorDescriptor | None]:
    """w [E, N, K] by pointer and strides; and by descriptor if K is contiguous, or of its transpose if N is."""
    if max(w.stride()[1:]) >= FARTHEST:
        w = w.contiguous()
    group, row, column = w.stride()
    if w.shape[2] == 1:  # a stride that is no matter
        column = 1
    elif w.shape[1] == 1:
        row = 1
    tiles = None
    if how.descriptors:
        if column == 1 and _describable(w):
            tiles = TensorDescriptor.from_tensor(w, [1, how.tiles.value, how.tiles.key])
        elif column != 1 and _describable(w.mT):
            tiles = TensorDescriptor.from_tensor(w.mT, [1, how.tiles.key, how.tiles.value])
    return (w, group, row, column), tiles


def _describable(x: Tensor) -> bool:
    """Whether a descriptor can be of x: nothing is empty, rows are dense and begin at multiples of 16 bytes."""
    item = x.element_size()
    steps = [stride * item for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return aligned and x.stride(-1) == 1 and x.numel() > 0


def programs_of(how: Product, M: int, E: int, N: int) -> int:
    """As many as there can be tiles: the rows of every group, and those after the last, begin a tile of their own."""
    tiles = how.tiles
    row_tiles = min(M // tiles.block + min(E + 1, M), M)
    return min(row_tiles * -(-N // tiles.value), how.programs)


def group_constants(how: Product, E: int, w: Strided) -> dict[str, int]:
    """The constants of a kernel that goes through the tiles of groups, with weight `w` (of several any)."""
    tiles = how.tiles
    least = 1 if tiles.block < LEAST_ROWS else LEAST_ROWS
    return {
        "ALONG_K": w[3] == 1,
        "BLOCK": tiles.block,
        "HALVINGS": (tiles.block // least).bit_length(),
        "BLOCK_N": tiles.value,
        "BLOCK_K": tiles.key,
        "BLOCK_E": 1 << E.bit_length(),  # E + 1 at least
        "TOGETHER": moe_config.TOGETHER,
    }
