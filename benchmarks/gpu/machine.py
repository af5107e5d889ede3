"""What this machine is: versions, the GPU, its limits, the backends and the commit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

import lightning_attn
from lightning_attn.cli import machine
from lightning_attn.cli.peers import missing_peers

from . import dry, part
from .record import replace_json

WITHOUT_GPU = "PyTorch finds no GPU; use --dry to try the command without one"


def facts(device: torch.device) -> Iterator[tuple[str, Any]]:
    """One after the other: what can fail comes last."""
    dtype = torch.bfloat16 if device.type == "cuda" else dry.DTYPE
    yield "versions", machine.versions()
    yield "commit", machine.commit()
    yield "device", machine.device(device)
    yield "backends", lightning_attn.available_backends()
    yield "missing_peers", missing_peers(device)
    yield "limits", machine.measure_limits(dtype, device).as_json()


def main() -> int:
    options = part.parser("machine", __doc__).parse_args()
    if options.dry:
        dry.shrink()
    elif not torch.cuda.is_available():
        print(WITHOUT_GPU)
        replace_json(options.json, {"why_not": WITHOUT_GPU})
        return 1
    found: dict[str, Any] = {}
    for name, value in facts(torch.device("cpu" if options.dry else "cuda")):
        found[name] = value
        replace_json(options.json, found)
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
