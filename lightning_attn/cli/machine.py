"""This machine: its versions, its device, and the limits it really reaches."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import lightning_attn

from .case import dtype_name
from .timing import best_seconds

COPY_BYTES = 256 * 2**20  # of one buffer: far beyond every cache
CUDA_COPY_BYTES = 2 * 2**30
GEMM_SIZES = (1024, 2048)
CUDA_GEMM_SIZES = (4096, 8192)
CUDA_SHARE = 8  # one buffer takes at most this part of the free memory
GEMM_SECONDS = 0.5  # after a product that takes longer no larger one is tried


def versions() -> dict[str, str | None]:
    """Of Python, of this package and of what it may use; None: not installed."""
    packages = ("torch", "numpy", "triton", "cupy", "transformers", "fla", "liger-kernel")
    return {
        "lightning_attn": lightning_attn.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in packages},
    }


# CuPy's wheels are named after the CUDA version they are built for; fla comes whole, or only its kernels.
DISTRIBUTIONS = {
    "cupy": ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x"),
    "fla": ("flash-linear-attention", "fla-core"),
}


def _version(package: str) -> str | None:
    for name in DISTRIBUTIONS.get(package, (package,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def device(device: torch.device | None = None) -> dict[str, str | int | None]:
    """The processor, its cores that this process may use, and what PyTorch and the kernels make of them. Of a CUDA
    device its own name, size and driver, and the processor as `host`.
    """
    host: dict[str, str | int | None] = {
        "name": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
    }
    if device is None or device.type != "cuda":
        return host
    gpu = torch.cuda.get_device_properties(device)
    found: dict[str, str | int | None] = {
        "name": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "driver": _driver(),
        "host": host.pop("name"),
    }
    return found | host


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device, or of the host, that is not in use; None if nothing says it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _driver() -> str | None:
    """Version of NVIDIA's driver; None if nothing says it."""
    if tool := shutil.which("nvidia-smi"):
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
            if lines := done.stdout.split():
                return lines[0]
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def instruction_set() -> str | None:
    """The one that the cpu backend chose; None if that backend is not there."""
    try:
        from lightning_attn.backends import cpu

        return cpu.instruction_set()
    except (ImportError, AttributeError):
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Of the checkout that this package is imported from, "-dirty" if changed; None if it is installed."""
    package = Path(lightning_attn.__file__).resolve().parent
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != package.parent:
            return None
        return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@dataclass(frozen=True)
class Limits:
    """What this machine reaches with PyTorch's own product and copy.

    Kernels on 16 bits may widen them where PyTorch has no fast product, so that rate is at least float32's.
    """

    gemm_flops_per_s: dict[torch.dtype, float] = field(default_factory=dict)
    copy_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        float32 = self.gemm_flops_per_s.get(torch.float32, 0.0)
        for dtype, rate in self.gemm_flops_per_s.items():
            if dtype.itemsize == 2:
                self.gemm_flops_per_s[dtype] = max(rate, float32)

    def or_better(self, other: Limits) -> Limits:
        """The best of two measurements: noise only ever makes a run slower."""
        dtypes = sorted(self.gemm_flops_per_s | other.gemm_flops_per_s, key=str)
        gemm = {d: max(x.gemm_flops_per_s.get(d, 0.0) for x in (self, other)) for d in dtypes}
        return Limits(gemm, max(self.copy_bytes_per_s, other.copy_bytes_per_s))

    def milliseconds(self, flops: int, bytes_: int, dtype: torch.dtype) -> float | None:
        """The time that these flops and bytes take at the limits, whichever is longer; None if not measured."""
        if dtype not in self.gemm_flops_per_s:
            return None
        return 1e3 * max(flops / self.gemm_flops_per_s[dtype], bytes_ / self.copy_bytes_per_s)

    def as_json(self) -> dict[str, object]:
        gemm = {dtype_name(dtype): rate for dtype, rate in self.gemm_flops_per_s.items()}
        return {"gemm_flops_per_s": gemm, "copy_bytes_per_s": self.copy_bytes_per_s}


def measure_limits(dtype: torch.dtype, device: torch.device) -> Limits:
    """For kernels on `dtype`."""
    return Limits({d: _gemm_rate(d, device) for d in {dtype, torch.float32}}, _copy_rate(device))


def _gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """flop/s of `torch.mm` on square random matrices, the best of growing sizes. Not of zeros or the like: on a
    GPU the clock follows the power that the data costs.
    """
    best = 0.0
    for n in CUDA_GEMM_SIZES if device.type == "cuda" else GEMM_SIZES:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        fastest = best_seconds(partial(torch.mm, a, b, out=torch.empty_like(a)), device)
        best = max(best, 2 * n**3 / fastest)
        if fastest > GEMM_SECONDS:
            break
    return best


def _copy_rate(device: torch.device) -> float:
    """bytes/s, read plus written, of `Tensor.copy_` between two buffers that fit in no cache."""
    source = torch.ones(_copy_bytes(device), dtype=torch.uint8, device=device)
    if device.type == "cuda":
        source.random_()
    fastest = best_seconds(partial(torch.zeros_like(source).copy_, source), device)
    return 2 * source.nbytes / fastest


def _copy_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return COPY_BYTES
    torch.cuda.empty_cache()  # or what PyTorch keeps would not be free
    free, _ = torch.cuda.mem_get_info(device)
    return min(CUDA_COPY_BYTES, free // CUDA_SHARE)
