"""What this machine is: versions, the GPU, its limits, the backends and the commit."""

from __future__ import annotations

import sys
from typing import Any

import torch

import lightning_attn
from lightning_attn.cli import machine
from lightning_attn.cli.peers import missing_peers

from . import dry, part
from .record import replace_json


def facts(device: torch.device) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else dry.DTYPE
    return {
        "versions": machine.versions(),
        "device": machine.device(device),
        "backends": lightning_attn.available_backends(),
        "missing_peers": missing_peers(device),
        "commit": machine.commit(),
        "limits": machine.measure_limits(dtype, device).as_json(),
    }


def main() -> int:
    options = part.parser("machine", __doc__).parse_args()
    if options.dry:
        dry.shrink()
    elif not torch.cuda.is_available():
        print("PyTorch finds no GPU; use --dry to try the command without one")
        return 1
    found = facts(torch.device("cpu" if options.dry else "cuda"))
    replace_json(options.json, found)
    for name, value in found.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
