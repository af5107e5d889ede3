"""What makes a dry run quick: small limits to measure, and few calls."""

from __future__ import annotations

import torch

DTYPE = torch.float16  # Triton's interpreter cannot multiply bfloat16


def shrink() -> None:
    """In this process."""
    from lightning_attn.cli import cases, machine, timing

    torch.set_num_threads(2)
    machine.GEMM_SIZES = (64,)
    machine.COPY_BYTES = 2**20
    cases.COLD_BYTES = 2**12
    cases.GRAPH_CALLS = 2
    timing.MIN_REPEATS = 1
