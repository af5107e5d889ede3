"""Calls to try tiles on: for each kernel one that is timed, and one that is not like it (packed documents, segments).

Their shape follows from the architecture, K and V alone, and no length is a multiple of a block. Each run has outputs of
its own, filled with NaN, so that nothing unwritten passes for a result and no run finds what another has left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from triton.testing import do_bench

from . import attention, config
from .autotune import Choice, Configured, Kernel, T
from .config import Arch, Segments, Tiles
from .launch import Launch, run_all

RATES = (0.0, 2.0, 0.01, 0.3)  # of the heads, in turn


Outputs = dict[str, tuple[Tensor, int]]  # with the dimension that counts heads


@dataclass(frozen=True)
class Trial:
    """A run to be. The last launch is that of the kernel to be tuned."""

    launches: list[Launch]
    outputs: Outputs

    @property
    def device(self) -> torch.device:
        return next(x.device for x, _ in self.outputs.values())

    def run(self) -> Outputs:
        run_all(self.launches, self.device)
        return self.outputs


@dataclass(frozen=True)
class Problem:
    """`make` prepares a run with given tiles. `bound` is the largest difference between two runs that are both right, over
    the largest value of a head.
    """

    make: Callable[[Tiles], Trial]
    bound: float

    def results(self, tiles: Tiles) -> Outputs:
        """The outputs of a run; FloatingPointError if they are not finite."""
        outputs = self.make(tiles).run()
        for name, (x, _) in outputs.items():
            if not x.isfinite().all():
                raise FloatingPointError(f"{name} is not finite, or not all written, with {tiles}")
        return outputs

    def difference(self, tiles: Tiles, expected: Outputs) -> str | None:
        """What a run makes that is not as expected; None if all is."""
        for name, (x, heads) in self.make(tiles).run().items():
            others = [dim for dim in range(x.dim()) if dim != heads]
            y = expected[name][0]
            largest = y.float().abs().amax(others)
            relative = (x.float() - y.float()).abs().amax(others) / torch.where(largest > 0, largest, 1.0)
            found = relative.nan_to_num(nan=math.inf).max().item()
            if found > self.bound:
                return f"{name} differs by {found:.3g} of the largest value of a head, more than {self.bound:.3g}"
        return None

    def time(self, tiles: Tiles) -> float:
        """The median time in ms of the last launch."""
        trial = self.make(tiles)
        trial.run()
        return clock(trial.launches[-1].run, trial.device)


def clock(run: Callable[[], None], device: torch.device) -> float:
    """The median time in ms of `run`; in the interpreter, where it means little, that of one."""
    if device.type == "cuda":
        return do_bench(run, return_mode="median")
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def problems(kernel: Kernel, device: torch.device) -> list[Problem]:
    """Of a kernel; the first one is to be timed."""
    heads, tokens = _size(kernel)
    few = min(tokens, 1000)
    plain, packed = _Inputs(kernel, heads, tokens, device), _Inputs(kernel, 2, few, device, packed=True)
    kinds = {
        "chunk": (_forward(plain), _forward(packed)),
        "chunk_state": (_states(plain, reverse=False), _states(plain, reverse=True)),
        "chunk_backward": (_backward(plain), _backward(packed)),
        "chunk_backward_split": (_backward(plain), _backward(packed)),
    }
    bound = agreement(kernel.dtype, tokens + kernel.K + kernel.V)
    return [Problem(make, bound) for make in kinds[kernel.name]]


def agreement(dtype: torch.dtype, terms: int) -> float:
    """How far results may be apart that sum up to so many terms, each in its own order.

    With 16 bits what counts is not the sum, in float32, but the rounding of weights and states before a product and
    of the outputs after it, by half an epsilon each; the blocks decide which weights and states these are. In float32
    each addition rounds, and roundings add up like the steps of a random walk.
    """
    return 4 * torch.finfo(dtype).eps * (math.sqrt(terms) if dtype == torch.float32 else 1)


def _size(kernel: Kernel) -> tuple[int, int]:
    """Heads and tokens: a program for each processor at least, and more bytes than a cache holds; little for Python."""
    if kernel.arch.matrix == "host":
        return 2, 150
    return kernel.arch.processors, 2**18 // config.power_of_two(max(kernel.K, kernel.V)) - 7


class _Inputs:
    """Operands, states and their gradients; with `packed` of several documents, one of them empty."""

    def __init__(
        self, kernel: Kernel, heads: int, tokens: int, device: torch.device, *, packed: bool = False
    ) -> None:
        # Not the caller's generator, which goes on as if nothing had been.
        random = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=random, dtype=dtype, device=device)

        K, V = kernel.K, kernel.V
        self.kernel = kernel
        self.q, self.k, self.v, self.do = (
            normal(1, tokens, heads, D, dtype=kernel.dtype) for D in (K, K, V, V)
        )
        ends = [0, 0, 1, tokens // 3, tokens // 3 + 37, tokens]
        self.cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device) if packed else None
        sequences = len(ends) - 1 if packed else 1
        self.initial, self.dstate = (normal(sequences, heads, K, V, dtype=torch.float32) for _ in range(2))
        rates = [RATES[h % len(RATES)] for h in range(heads)]
        self.decay = torch.tensor(rates, dtype=torch.float32, device=device)

    def call(self, tiles: Tiles, *, cut: bool = False) -> attention.Call:
        kind = _Cut if cut else attention.Call
        _, T, H, K = self.q.shape
        return kind(
            self.decay, K**-0.5, self.cu_seqlens, (1, T, H), self.kernel.arch, _only(self.kernel, tiles)
        )

    def forward(self, call: attention.Call) -> Trial:
        o, state = (torch.full_like(x, math.nan) for x in (self.v, self.initial))
        launches = attention.forward(self.q, self.k, self.v, o, self.initial, state, call)
        return Trial(launches, {"o": (o, 2), "state": (state, 1)})

    def backward(self, call: attention.Call) -> Trial:
        dq, dk, dv, dinitial = (torch.full_like(x, math.nan) for x in (self.q, self.k, self.v, self.initial))
        launches = attention.backward(
            self.q, self.k, self.v, self.do, dq, dk, dv, self.initial, self.dstate, dinitial, call
        )
        dq_made = [launch.name for launch in launches].index("chunk") + 1  # by a sweep that is tuned as such
        return Trial(launches[dq_made:], {"dk": (dk, 2), "dv": (dv, 2), "dinitial": (dinitial, 1)})


@dataclass(frozen=True)
class _Cut(attention.Call):
    """A call whose sequences are cut in about four, whatever that costs, and at the same tokens whatever the tiles."""

    def cut(
        self, columns: int, state_size: int, bytes_per_token: int, tiles: Tiles, passes: int = 2
    ) -> Segments:
        T = self.shape[1]
        length = -(-T // (4 * 128)) * 128  # a multiple of every block
        return Segments(-(-T // length), length)


def _only(kernel: Kernel, tiles: Tiles) -> Choice:
    """These tiles for this kernel, and the configured ones for all others."""

    def choose(
        configured: Configured[T], K: int, V: int, dtype: torch.dtype, arch: Arch, device: torch.device
    ) -> T:
        same = Kernel(configured, K, V, dtype, arch) == kernel
        return cast(T, tiles) if same else configured(K, V, dtype, arch)

    return choose


def _forward(x: _Inputs) -> Callable[[Tiles], Trial]:
    return lambda tiles: x.forward(x.call(tiles, cut=x.cu_seqlens is not None))


def _backward(x: _Inputs) -> Callable[[Tiles], Trial]:
    return lambda tiles: x.backward(x.call(tiles, cut=x.cu_seqlens is not None))


def _states(x: _Inputs, *, reverse: bool) -> Callable[[Tiles], Trial]:
    """The first pass of a forward or of a backward alone, whose output the launch itself brings along."""

    def make(tiles: Tiles) -> Trial:
        whole = (x.backward if reverse else x.forward)(x.call(tiles, cut=True))
        launch = [launch for launch in whole.launches if launch.name == "chunk_state"][-1]
        states = launch.arguments["entering"][0].fill_(math.nan)
        # Nothing enters the segment that the sweep meets first.
        written = states[:-1] if reverse else states[1:]
        return Trial([launch], {"entering": (written, 1)})

    return make
