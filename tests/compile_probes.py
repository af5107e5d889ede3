"""Run by test_compiled.py, without Triton's interpreter: single launches that are not as the kernels are launched, as JSON.

`unaligned`: pointers that are no multiple of 16 bytes. `too_wide`: a tile that no register file holds.
"""

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_attn.backends.triton import catalogue
from lightning_attn.backends.triton.compiled import compile_launch
from lightning_attn.backends.triton.config import ARCHS
from lightning_attn.backends.triton.launch import Launch


def shifted(launch: Launch) -> Launch:
    """The same on operands that start an element later."""

    def shift(value: Any) -> Any:
        if isinstance(value, tuple) and isinstance(value[0], Tensor):
            return value[0].flatten()[1:], *value[1:]
        return value

    return replace(launch, arguments={name: shift(value) for name, value in launch.arguments.items()})


def widened(launch: Launch, warps: int) -> Launch:
    """With all columns of the state in one program of so few warps."""
    return replace(
        launch,
        constants={**launch.constants, "BLOCK_V": 128},
        tiles=replace(launch.tiles, value=128, warps=warps, stages=1),
    )


def main() -> None:
    hopper, amd = ARCHS["sm_90"], ARCHS["gfx942"]
    launch, other = (catalogue.forward(catalogue.DENSE, 128, torch.bfloat16, x)[-1] for x in (hopper, amd))
    results = {}
    for name, arch, probe in (
        ("usual", hopper, launch),
        ("unaligned", hopper, shifted(launch)),
        ("too_wide sm_90", hopper, widened(launch, warps=2)),
        ("too_wide gfx942", amd, widened(other, warps=1)),
    ):
        made = compile_launch(probe, arch)
        results[name] = {
            "async_copies": made.async_copies,
            "registers": made.registers,
            "spills": made.spills,
            "shared": made.shared,
            "matrix_products": made.matrix_products,
        }
    print(json.dumps(results))


main()
