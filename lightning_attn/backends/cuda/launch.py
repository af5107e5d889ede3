"""Launches of the kernels of csrc/cuda: through CuPy on PyTorch's current stream and device, or in the emulator."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

FILES = ("step", "route", "sort")
# Made by setup.py: the sources, and machine code if there was nvcc.
CODE = Path(__file__).resolve().parent.parent.parent / "_cuda"
OPTIONS = ("-std=c++17", "-ftz=true")  # of setup.py too, so that either compiler gives the same bits

THREADS = 256  # of a block, as in prelude.cuh
WARPS = THREADS // 32
GRID_LIMIT = 2**31 - 1
_NO_CODE = (200, 209)  # CUDA_ERROR_INVALID_IMAGE, CUDA_ERROR_NO_BINARY_FOR_GPU

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Kernel(NamedTuple):
    file: str  # one of FILES
    name: str
    definition: str  # the macro of that file that makes it, with its arguments


class Launch(NamedTuple):
    kernel: Kernel
    blocks: int
    shared: int  # bytes
    parameters: np.ndarray  # the kernel's struct


def fatbin(file: str) -> Path:
    return CODE / f"{file}.fatbin"


def source(file: str) -> str:
    """What NVRTC compiles."""
    return "".join((CODE / name).read_text() for name in ("prelude.cuh", f"{file}.cu"))


def option(kernel: Kernel) -> str:
    """With this the source has one kernel only: NVRTC takes seconds for all of a file."""
    return f"-DLIGHTNING_KERNEL={kernel.definition}"


def can_emulate() -> bool:
    from lightning_attn import _C

    return _C.can_emulate_cuda()


def emulate(launches: Iterable[Launch]) -> None:
    from lightning_attn import _C

    for x in launches:
        _C.emulate_cuda(x.kernel.name, x.blocks, x.shared, x.parameters.tobytes())


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """One after the other."""
    from cupy.cuda import Stream

    with torch.cuda.device(device):
        stream = Stream.from_external(_CurrentStream())
        current = torch.cuda.current_device()
        for x in launches:
            _loaded(x.kernel, current)((x.blocks,), (THREADS,), (x.parameters,), x.shared, stream)


class _CurrentStream:
    """PyTorch's, in the protocol that CuPy takes; a torch.cuda.Stream itself speaks it in new versions only."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


@functools.cache
def _loaded(kernel: Kernel, device: int) -> Any:
    """The kernel, loaded on the current device, which is `device`."""
    import cupy
    from cupy_backends.cuda.api.driver import CUDADriverError

    if fatbin(kernel.file).exists():
        try:
            return cupy.RawModule(path=str(fatbin(kernel.file))).get_function(kernel.name).kernel
        except CUDADriverError as error:
            if error.status not in _NO_CODE:
                raise
    options = (*OPTIONS, option(kernel))
    return cupy.RawModule(code=source(kernel.file), options=options).get_function(kernel.name).kernel
