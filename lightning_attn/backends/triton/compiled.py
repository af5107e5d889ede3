"""What the compiler makes of a launch for an architecture that need not be here: registers, spills, shared memory.

A launch is compiled with the specialisation that it gets when it runs, as Triton itself derives it: pointers and strides
that are multiples of 16 are known to be, and arguments that are 1 are constants. Without that nothing is pipelined and
the figures mislead.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .config import KIB, Arch
from .launch import Launch

# Instructions that multiply tiles, by architecture, newest first; each by the start of its name in PTX or AMDGCN.
MATRIX_PRODUCTS = {
    "tcgen05": r"tcgen05\.mma\b",
    "wgmma": r"wgmma\.mma_async\b",
    "mma": r"mma\.sync\b",
    "mfma": r"v_mfma_",
}
# Copies to shared memory that nothing waits for: cp.async in PTX without its fences, loads straight to LDS in AMDGCN.
DESCRIPTOR_COPY = r"cp\.async\.bulk\.tensor\b"
ASYNC_COPY = r"cp\.async\.(?:ca|cg|bulk)\b(?!\.(?:commit|wait))|(?:buffer|global)_load_\w+[^\n]*\blds\b"


@dataclass(frozen=True)
class Compiled:
    """`spills` is the memory in bytes that a thread uses for want of registers, its stack; `shared` the shared memory
    in bytes of a program.
    """

    registers: int
    spills: int
    shared: int
    assembly: str  # PTX, or AMDGCN

    @property
    def matrix_products(self) -> dict[str, int]:
        """How many instructions of each kind multiply tiles; none of a kind that does not occur."""
        counts = {kind: len(re.findall(pattern, self.assembly)) for kind, pattern in MATRIX_PRODUCTS.items()}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def async_copies(self) -> int:
        return len(re.findall(ASYNC_COPY, self.assembly))

    @property
    def descriptor_copies(self) -> int:
        return len(re.findall(DESCRIPTOR_COPY, self.assembly))


def target(arch: Arch) -> GPUTarget:
    if arch.name.startswith("gfx"):
        return GPUTarget("hip", arch.name, 64)
    return GPUTarget("cuda", int(arch.name.removeprefix("sm_")), 32)


def specialise(launch: Launch, arch: Arch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles when `launch` is run on `arch`, and with which options; its tensors may be on the meta
    device, which count as aligned unless they are views with an offset.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError("with TRITON_INTERPRET=1 the kernels are Python functions, which nothing compiles")
    backend = make_backend(target(arch))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.tiles.warps, "num_stages": launch.tiles.stages}
    bound, specialisation, options = bind(**launch.arguments, **launch.constants, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialisation, options
    )
    return ASTSource(kernel, signature, constants, attributes), parsed.__dict__


def specialisation(launch: Launch, arch: Arch) -> tuple[str, str]:
    """Equal for launches that are one kernel to the compiler."""
    source, options = specialise(launch, arch)
    return source.hash(), str(sorted(options.items()))


def compile_launch(launch: Launch, arch: Arch) -> Compiled:
    """`launch` compiled for `arch`; its tensors may be on the meta device."""
    source, options = specialise(launch, arch)
    binary = triton.compile(source, target=target(arch), options=options)
    return _read_cubin(binary) if "cubin" in binary.asm else _read_amdgcn(binary)


def _read_cubin(binary: Any) -> Compiled:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack, static, local = (
        int(_find(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK", "SHARED", "LOCAL")
    )
    # What a kernel asks for when it is launched is not in the binary; the kilobyte that is there from sm_90 on is the
    # driver's, and not part of what an architecture allows.
    static = max(0, static - KIB)
    return Compiled(registers, stack + local, binary.metadata.shared + static, binary.asm["ptx"])


def _read_amdgcn(binary: Any) -> Compiled:
    assembly = binary.asm["amdgcn"]
    registers, stack, shared = (
        int(_find(rf"\.{name}:\s*(\d+)", assembly))
        for name in ("vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size")
    )
    return Compiled(registers, stack, max(shared, binary.metadata.shared), assembly)


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if not found:
        raise RuntimeError(f"no {pattern} in what the compiler says:\n{text[-1000:]}")
    return found[1]
