"""What the compiler makes of a launch for an architecture that need not be here: registers, spills, shared memory.

A launch is compiled with the specialisation that it gets when it runs: pointers and strides that are multiples of 16 are
known to be, and arguments that are 1 are constants. Without that nothing is pipelined and the figures mislead.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .config import Arch
from .launch import Launch

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """`spills` is the stack in bytes that a thread uses, `shared` the shared memory in bytes of a program."""

    registers: int
    spills: int
    shared: int
    assembly: str  # PTX, or AMDGCN


def target(arch: Arch) -> GPUTarget:
    if arch.name.startswith("gfx"):
        return GPUTarget("hip", arch.name, 64)
    return GPUTarget("cuda", int(arch.name.removeprefix("sm_")), 32)


def compile_launch(launch: Launch, arch: Arch) -> Compiled:
    """`launch` compiled for `arch`; its tensors may be on the meta device."""
    signature, constants, attributes = {}, {}, {}
    arguments = launch.arguments | launch.constants
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        fixed = name in launch.constants
        signature[name] = _type((i,), arguments[name], fixed, not parameter.do_not_specialize, constants, attributes)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.tiles.warps, "num_stages": launch.tiles.stages}
    binary = triton.compile(source, target=target(arch), options=options)
    if "cubin" in binary.asm:
        return _read_cubin(binary)
    assembly = binary.asm["amdgcn"]
    return Compiled(
        int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1]),
        int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", assembly)[1]),
        binary.metadata.shared,
        assembly,
    )


def _type(path: tuple, value: Any, fixed: bool, specialize: bool, constants: dict, attributes: dict) -> Any:
    """The signature's entry for an argument; notes what is constant and what is a multiple of 16."""
    if isinstance(value, tuple):
        return tuple(
            _type((*path, i), x, fixed, specialize, constants, attributes) for i, x in enumerate(value)
        )
    if fixed or value is None or (specialize and type(value) is int and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        attributes[path] = [["tt.divisibility", 16]] if value.data_ptr() % 16 == 0 else []
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if specialize and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _read_cubin(binary: Any) -> Compiled:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Compiled(int(registers), int(stack), binary.metadata.shared, binary.asm["ptx"])
