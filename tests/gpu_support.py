"""What the GPU tests share: streams, graphs and the device's memory. Without a GPU the same tests run on the CPU, small:
there a side stream is no other, a graph is the call itself, and there is room for everything.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch
from support import BACKENDS, GPU_BACKENDS, device_of
from torch import Tensor

from lightning_attn.cli.graph import Replayed

T = TypeVar("T")

GPU = torch.cuda.is_available()
DEVICE = device_of("triton")
kernels = pytest.mark.parametrize("backend", [name for name in BACKENDS if name in GPU_BACKENDS])


def size(usual: T, small: T) -> T:
    """On a GPU the usual one."""
    return usual if GPU else small


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Normal numbers, made on the device: there are many."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=dtype, device=DEVICE)


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Whether contiguous tensors have different bits, as a tensor: nothing waits for the device."""
    return (a.view(torch.uint8) != b.view(torch.uint8)).any()


# ---- memory ---------------------------------------------------------------------------------------------------


def allocated() -> int:
    """Bytes of the device that tensors hold."""
    return torch.cuda.memory_allocated() if GPU else 0


def wait_for_room(gigabytes: float) -> None:
    """Until the device has so much to spare, as other tests may run on it; skips where it never will."""
    if not GPU:
        return
    wanted = int(gigabytes * 2**30)
    total = torch.cuda.mem_get_info()[1]
    if wanted > 0.9 * total:
        pytest.skip(f"takes {gigabytes} GiB of device memory, and there are {total / 2**30:.0f}")
    torch.cuda.empty_cache()
    deadline = time.monotonic() + 120
    while torch.cuda.mem_get_info()[0] < wanted and time.monotonic() < deadline:
        time.sleep(1)


# ---- streams and graphs ---------------------------------------------------------------------------------------


@contextmanager
def side_stream() -> Iterator[None]:
    """Another stream is current inside; it starts after what came before, and what comes after waits for it."""
    if not GPU:
        yield
        return
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def capture(call: Callable[[], T]) -> Callable[[], T]:
    """The call, after some that warm it up, as a CUDA graph: each replay gives its results, in the same memory each time."""
    return Replayed(call, torch.device(DEVICE))


@contextmanager
def memory_load(megabytes: int = 64) -> Iterator[Callable[[], None]]:
    """A function that has another stream copy memory beside what runs."""
    if not GPU:
        yield lambda: None
        return
    stream = torch.cuda.Stream()
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    stream.wait_stream(torch.cuda.current_stream())

    def press() -> None:
        with torch.cuda.stream(stream):
            target.copy_(source)

    yield press
    stream.synchronize()
