"""A call in a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

R = TypeVar("R")
WARM_UPS = 3  # calls before a capture: kernels are compiled, tuned and loaded in them


class Replayed(Generic[R]):
    """`call`, warmed up and captured; each call of this object replays it, without waiting for the device.

    What it returns are the tensors that the capture returned: each replay writes them anew. Where there are no
    CUDA graphs, `call` is warmed up alike and then called.
    """

    def __init__(self, call: Callable[[], R], device: torch.device) -> None:
        self.call = call  # keeps alive what the graph reads and writes
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._capture()
        else:
            for _ in range(WARM_UPS):
                call()

    def __call__(self) -> R:
        if self.graph is None:
            return self.call()
        self.graph.replay()
        return self.outputs

    def _capture(self) -> None:
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS - 1):
                self.call()
            _without_waiting(self.call)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self.call()
        self.graph = graph


def _without_waiting(call: Callable[[], object]) -> None:
    """Raises where PyTorch waits for the device. A capture fails there too, but leaves the allocator unusable."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
