"""Memory for large outputs, kept for the next call.

The first touch of a fresh page costs more than writing it: the system clears it, and on a virtual machine that gives
free memory back to its host it has to be had from there again. 300 MB of gradients take 35 to 80 ms of that, or 500,
beside 430 for their products. PyTorch's allocator for the CPU keeps nothing, so what large outputs lay in is
kept here when they are freed, up to `LIGHTNING_ATTN_KEEP_BYTES` (an eighth of the physical memory). It is marked as free
(`MADV_FREE`): the system takes it when anybody needs it. Storages of such memory cannot be resized.
"""

import contextlib
import math
import mmap
import os
import weakref

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 22  # bytes, from which NumPy asks for huge pages too
_WASTE = 1.25  # how much larger than asked for a kept piece may be
_CAN_MAP = all(hasattr(mmap, name) for name in ("MAP_ANONYMOUS", "MADV_FREE"))


class Kept:
    """Pieces of memory that nobody uses, the one freed first in front.

    No locks: a piece may come back whenever an object dies, in the middle of any of these lines. Each change of the list
    is one operation of it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pieces: list[mmap.mmap] = []

    def take(self, size: int) -> mmap.mmap:
        """At least `size` bytes, with anything in them."""
        fit = [piece for piece in self.pieces if size <= len(piece) <= _WASTE * size]
        for piece in sorted(fit, key=len):
            try:
                self.pieces.remove(piece)
            except ValueError:  # another thread was faster
                continue
            return piece
        return fresh(size)

    def give(self, piece: mmap.mmap) -> None:
        if len(piece) > self.limit:
            return
        try:
            piece.madvise(mmap.MADV_FREE)
        except OSError:  # not known to this kernel: what is kept would be missing elsewhere
            return
        self.pieces.append(piece)
        while sum(map(len, self.pieces)) > self.limit:
            try:
                self.pieces.pop(0)
            except IndexError:
                break


def fresh(size: int) -> mmap.mmap:
    """Zeros from the system, on huge pages where it has them."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _limit() -> int:
    name = "LIGHTNING_ATTN_KEEP_BYTES"
    if (text := os.environ.get(name)) is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8 if _CAN_MAP else 0
    if not text.isdecimal():
        raise ValueError(f"{name}: expected a number of bytes, got {text!r}")
    return int(text)


kept = Kept(_limit())


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised contiguous memory."""
    dtype = dtype or like.dtype
    size = math.prod(shape) * dtype.itemsize
    if (
        size < LARGE or not _CAN_MAP or torch.are_deterministic_algorithms_enabled()
    ):  # which may mean to fill it
        return like.new_empty(shape, dtype=dtype)
    piece = kept.take(size)
    memory = np.frombuffer(piece, np.uint8, size)
    weakref.finalize(memory, kept.give, piece).atexit = False
    return _tensor(like, memory, shape, dtype)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Contiguous zeros to be written in part: the rest, if there is much, costs nothing until it is read."""
    size = math.prod(shape) * like.itemsize
    if size < LARGE or not _CAN_MAP:
        return like.new_zeros(shape)
    return _tensor(like, np.frombuffer(fresh(size), np.uint8), shape, like.dtype)


def _tensor(like: Tensor, memory: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that keeps `memory` alive; a view of no other."""
    flat = torch.from_numpy(memory).view(dtype)
    return like.new_empty(0, dtype=dtype).set_(flat.untyped_storage(), 0, shape, flat.view(shape).stride())
