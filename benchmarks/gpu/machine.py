"""What this machine is: versions, the GPU, its limits, the backends and the commit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import lightning_attn
from lightning_attn.cli import machine

from . import dry
from .record import replace_json


def facts(device: torch.device) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else dry.DTYPE
    return {
        "versions": machine.versions(),
        "device": machine.device(device),
        "backends": lightning_attn.available_backends(),
        "commit": machine.commit(),
        "limits": machine.measure_limits(dtype, device).as_json(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.machine", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.dry:
        dry.shrink()
    elif not torch.cuda.is_available():
        print("PyTorch sees no GPU here; without one there is --dry")
        return 1
    found = facts(torch.device("cpu" if options.dry else "cuda"))
    replace_json(options.json, found)
    for name, value in found.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
