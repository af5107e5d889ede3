"""A kernel launch as data: what runs, on what, in which configuration, and what it must move and compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import Tiles

GRID_LIMIT = 65_535  # programs along a dimension of a grid; no architecture allows less for any of them


@dataclass(frozen=True)
class Launch:
    """`arguments` by the kernel's parameter names: tensors, numbers, None, or tuples of these; `constants` are its
    constexpr parameters. `bytes` are those of global memory that the programs together read and write, each
    element once; `again` those that neighbouring programs read once more, from the L2 cache.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    tiles: Tiles
    bytes: int = 0
    again: int = 0
    flops: int = 0

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")

    def run(self) -> None:
        if self.programs:
            self.kernel[grid(self.programs)](
                **self.arguments,
                **self.constants,
                num_warps=self.tiles.warps,
                num_stages=self.tiles.stages,
            )


def grid(programs: int) -> tuple[int, int]:
    """A grid of at least so many programs, in two dimensions of at most GRID_LIMIT if one does not do."""
    folds = -(-programs // GRID_LIMIT)
    return -(-programs // folds), folds


def operand(x: Tensor | None, *, flipped: bool = False) -> tuple[Tensor, int, int, int] | None:
    """x [B, T, H, D] as kernels take it; or its tokens from the last to the first, of which there is one at least."""
    if x is None:
        return None
    batch, token, head, _ = x.stride()
    return (x[:, -1:], batch, -token, head) if flipped else (x, batch, token, head)


def state(x: Tensor | None, *, transposed: bool = False) -> tuple[Tensor, int, int, int, int] | None:
    """A state [N, H, K, V] as kernels take it, or its transpose."""
    if x is None:
        return None
    row, head, key, value = x.stride()
    return (x, row, head, value, key) if transposed else (x, row, head, key, value)


def run_all(launches: list[Launch], device: torch.device) -> None:
    """One after the other on the current stream of `device`."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            for launch in launches:
                launch.run()
    else:
        for launch in launches:
            launch.run()
