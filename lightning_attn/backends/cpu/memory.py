"""Memory for large buffers, kept for the next call.

The first touch of fresh memory costs more than filling it: the system clears it, and on a virtual machine that gives
free memory back to its host it has to be had from there again. PyTorch's allocator for the CPU keeps none of such size,
so it is kept here when it is freed, up to `LIGHTNING_ATTN_KEEP_BYTES` (an eighth of the physical memory). It is marked as
free (`MADV_FREE`): the system takes it when anybody needs it. The storages of such tensors cannot be resized.
"""

import contextlib
import math
import mmap
import os
import weakref

import numpy as np
import torch
from torch import Tensor

# Bytes. Below, glibc keeps memory itself: filling a block takes the same time up to here, a third at twice as much.
LARGE = 1 << 24
_WASTE = 1.25  # how much larger than asked for a block may be
_CAN_MAP = all(hasattr(mmap, name) for name in ("MAP_ANONYMOUS", "MADV_FREE"))


class MemoryPool:
    """Blocks of memory that nobody uses, the one freed first in front.

    No locks: a block may come back whenever an object dies, in the middle of any of these lines. Each change of the list
    is one operation of it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.blocks: list[mmap.mmap] = []

    def allocate(self, size: int) -> mmap.mmap:
        """At least `size` bytes, with anything in them: the smallest that fits, of these the one freed last."""
        fit = [block for block in reversed(self.blocks) if size <= len(block) <= _WASTE * size]
        for block in sorted(fit, key=len):
            try:
                self.blocks.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
        return self.fresh(size)

    def free(self, block: mmap.mmap) -> None:
        if len(block) > self.limit:
            return
        try:
            block.madvise(mmap.MADV_FREE)
        except OSError:  # not known to this kernel: what is kept would be missing elsewhere
            return
        self.blocks.append(block)
        while sum(map(len, self.blocks)) > self.limit:
            try:
                self.blocks.pop(0)
            except IndexError:
                break

    def fresh(self, size: int) -> mmap.mmap:
        """Zeros from the system, on huge pages where it has them. Raises OSError if there is no room."""
        try:
            block = _map(size)
        except OSError:  # what is kept takes addresses, which may be limited
            self.clear()
            block = _map(size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def clear(self) -> None:
        self.blocks.clear()


def _map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _limit() -> int:
    name = "LIGHTNING_ATTN_KEEP_BYTES"
    text = os.environ.get(name, "")
    if not text:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8 if _CAN_MAP else 0
    if not text.isdecimal():
        raise ValueError(f"{name}: expected a number of bytes, got {text!r}")
    return int(text)


pool = MemoryPool(_limit())
if hasattr(os, "register_at_fork"):  # a child would write copies of the parent's blocks, page by page
    os.register_at_fork(after_in_child=lambda: pool.clear())


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised contiguous memory."""
    dtype = dtype or like.dtype
    size = math.prod(shape) * dtype.itemsize
    deterministic = torch.are_deterministic_algorithms_enabled()  # then PyTorch may fill it
    if size >= LARGE and _CAN_MAP and not deterministic:
        with contextlib.suppress(OSError):  # PyTorch has its own words for no room
            block = pool.allocate(size)
            memory = np.frombuffer(block, np.uint8, size)
            weakref.finalize(memory, pool.free, block).atexit = False
            return _tensor(like, memory, shape, dtype)
    return like.new_empty(shape, dtype=dtype)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Contiguous zeros to be written in part: the rest, if there is much, costs nothing until it is read."""
    size = math.prod(shape) * like.itemsize
    if size >= LARGE and _CAN_MAP:
        with contextlib.suppress(OSError):
            return _tensor(like, np.frombuffer(pool.fresh(size), np.uint8), shape, like.dtype)
    return like.new_zeros(shape)


def _tensor(like: Tensor, memory: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that keeps `memory` alive; a view of no other."""
    flat = torch.from_numpy(memory).view(dtype)
    return like.new_empty(0, dtype=dtype).set_(flat.untyped_storage(), 0, shape, flat.view(shape).stride())
