"""Tiles by trial, with LIGHTNING_ATTN_AUTOTUNE=1. Without it the tiles are those of `config`, and no file is touched.

What is known is known for a kernel, K, V, dtype, architecture, version of Triton and source of the kernels: no length,
batch or number of heads or documents enters, so none is tuned for. Trials run on tensors of their own (`trials`), never
on the caller's. The choice gives the results that the tiles of `config` give, in less time, and is kept in a file
(`tile_file`). While a CUDA graph is captured nothing is tried: what is not known by then is as configured.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, cast

import torch
import triton

from . import tile_file
from .config import Arch, Tiles, power_of_two

log = logging.getLogger(__name__)

T = TypeVar("T", bound="Tiles | None")
# A function of `config`, which has the name of its kernel: K, V, dtype and architecture -> tiles.
Configured = Callable[[int, int, torch.dtype, Arch], T]

WORTH = 0.98  # of the time of the configured tiles: who saves less may owe it to noise


class Choice(Protocol):
    """Who decides on tiles: `tiles`, or a trial. None comes back only where `configured` returns it."""

    def __call__(
        self, configured: Configured[T], K: int, V: int, dtype: torch.dtype, arch: Arch, device: torch.device
    ) -> T: ...


@dataclass(frozen=True)
class Kernel:
    """What is tuned: a kernel, by the function that configures it, for one K, V and dtype."""

    configured: Configured[Tiles | None]
    K: int
    V: int
    dtype: torch.dtype
    arch: Arch

    @property
    def name(self) -> str:
        return self.configured.__name__

    @property
    def key(self) -> str:
        what = f"{self.name} {self.K} {self.V} {self.dtype} {self.arch.name}"
        return f"{what} triton {triton.__version__} source {_source()}"


def tiles(
    configured: Configured[T], K: int, V: int, dtype: torch.dtype, arch: Arch, device: torch.device
) -> T:
    """The tiles of a kernel: what `configured` says, or with LIGHTNING_ATTN_AUTOTUNE=1 the best that were found."""
    usual = configured(K, V, dtype, arch)
    # Launches on the meta device are there to be compiled and counted.
    if usual is None or os.environ.get("LIGHTNING_ATTN_AUTOTUNE") != "1" or device.type == "meta":
        return usual
    return cast(T, process.tiles(Kernel(configured, K, V, dtype, arch), device))


def candidates(kernel: Kernel) -> list[Tiles]:
    """The configured tiles, then those with one or two of the tokens of a block, the columns of V and the warps halved or
    doubled, then those with other stages; without any that cannot fit.
    """
    usual = kernel.configured(kernel.K, kernel.V, kernel.dtype, kernel.arch)
    assert usual is not None, "a kernel that cannot run has no tiles"
    host = kernel.arch.matrix == "host"  # Python knows neither warps nor stages
    widest = power_of_two(max(kernel.K, kernel.V) if kernel.name == "chunk_backward_split" else kernel.V)
    blocks = _around(usual.block, 16, 128)
    values = [usual.value] if kernel.name == "chunk_backward" else _around(usual.value, 16, widest)
    warps = [usual.warps] if host else _around(usual.warps, 4, 16)
    shapes = [
        replace(usual, block=block, value=value, warps=count)
        for block, value, count in itertools.product(blocks, values, warps)
    ]
    others = sorted(shapes[1:], key=lambda x: _differences(x, usual))
    near = [x for x in others if _differences(x, usual) <= 2]
    near += [replace(usual, stages=n) for n in range(1, 5) if n != usual.stages and not host]
    return [usual, *(x for x in near if _may_fit(x, kernel))]


def _around(n: int, least: int, most: int) -> list[int]:
    return [n, *(x for x in (n // 2, 2 * n) if least <= x <= most)]


def _differences(a: Tiles, b: Tiles) -> int:
    return sum(x != y for x, y in zip(astuple(a), astuple(b), strict=True))


def _may_fit(x: Tiles, kernel: Kernel) -> bool:
    """Whether the least that x needs is there: of shared memory two operands for each stage that is loaded ahead, of
    registers a state, an output and the weights of a block.
    """
    kind = kernel.arch.matrix
    if kind == "host":
        return True
    loaded = x.block * (x.key + x.value) * kernel.dtype.itemsize * (x.stages - 1)
    registers = x.warps * (64 * 512 if kind == "mfma" else 32 * 255)
    return loaded <= kernel.arch.shared and (x.key + x.block) * x.value + x.block**2 <= registers


class Tuner:
    """What a process knows: it reads the file once, and searches once for a kernel, whichever thread comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chosen: dict[str, Tiles] = {}
        self._stored: dict | None = None

    def tiles(self, kernel: Kernel, device: torch.device) -> Tiles:
        if chosen := self._chosen.get(kernel.key):
            return chosen
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            options = candidates(kernel)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return options[0]
            with self._lock:
                if kernel.key not in self._chosen:
                    chosen = self._load(kernel, options) or self._search(kernel, options, device)
                    self._chosen[kernel.key] = chosen
                return self._chosen[kernel.key]

    def _load(self, kernel: Kernel, options: list[Tiles]) -> Tiles | None:
        if self._stored is None:
            self._stored = tile_file.read()
        if kernel.key not in self._stored:
            return None
        stored = self._stored[kernel.key]
        chosen = next((x for x in options if asdict(x) == stored), None)
        if chosen is None:
            warnings.warn(
                f"{kernel.key}: {stored} are no tiles that it can have", RuntimeWarning, stacklevel=2
            )
        return chosen

    def _search(self, kernel: Kernel, options: list[Tiles], device: torch.device) -> Tiles:
        chosen = search(kernel, options, device)
        tile_file.store(kernel.key, asdict(chosen))
        return chosen


process = Tuner()


def search(kernel: Kernel, options: list[Tiles], device: torch.device) -> Tiles:
    """The fastest of `options` that agrees with the first, the configured one; the first if none saves much.

    A warning names those that disagree: there the compiler is at fault. Errors of the first are raised, any other
    option with an error (too much shared memory, for one) is out of the race.
    """
    from .trials import problems  # it imports the launches, and their modules import this one

    first, *others = options
    made = problems(kernel, device)
    expected = [problem.results(first) for problem in made]
    usual = made[0].time(first)
    log.info("%s: %s %.4f ms, as configured", kernel.key, first, usual)
    best, least = first, WORTH * usual
    for option in others:
        try:
            differences = (
                problem.difference(option, results) for problem, results in zip(made, expected, strict=True)
            )
            wrong = next(filter(None, differences), None)
            taken = math.inf if wrong else made[0].time(option)
        except Exception as error:  # noqa: BLE001 - whatever it is, there are others
            log.info("%s: %s is out: %s: %s", kernel.key, option, type(error).__name__, error)
            continue
        if wrong:
            warnings.warn(
                f"{kernel.key}: {option} and {first} disagree: {wrong}", RuntimeWarning, stacklevel=2
            )
        log.info("%s: %s %.4f ms", kernel.key, option, taken)
        if taken < least:
            best, least = option, taken
    return best


@functools.cache
def _source() -> str:
    """Of all the kernels and their launches: tiles that agreed were those of one source."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
