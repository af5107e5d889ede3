"""The peers' first calls, before they are timed: flash-linear-attention and Liger-Kernel compile and try dozens of
configurations of each kernel, one after the other, which would take all the time of the first case.

Each pass of each case in a process of its own, at the same time; Triton keeps what they find on disk.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from lightning_attn.cli.case import Case
from lightning_attn.cli.peers import peers

from . import dry, part, process
from .cases import of_step
from .record import replace_json
from .suite import ROOT, environment

STEPS = ("forward", "backward", "decode", "experts", "expert_decode")
TUNED = ("fla", "fla-lightning", "liger")
CASES = 4  # of each step: the first ones have every kernel that the others have


def calls(dry_run: bool) -> list[tuple[Case, str]]:
    """The cases and passes whose kernels are worth a process."""
    measured = (m.case for step in STEPS for m in of_step(step, dry_run)[:CASES])
    found = list(dict.fromkeys((case, case.passes[0]) for case in measured))
    return found[:1] if dry_run else found


def call_peers(case: Case, pass_: str, device: torch.device) -> None:
    """In a process of its own."""
    found = peers(case, device)
    if device.type != "cpu":
        found = {name: peer for name, peer in found.items() if name in TUNED}
    inputs = case.inputs(device) if found else {}  # which may be gigabytes
    for name, peer in found.items():
        case.step(peer.function, inputs, pass_)()
        print(f"{name}: {pass_} {case.op} {case.shape}")


def main() -> int:
    parser = part.parser("warm", __doc__)
    parser.add_argument("--call", type=int, help="only this one, in this process")
    options = parser.parse_args()
    wanted = calls(options.dry)
    if options.call is not None:
        if options.dry:
            dry.shrink()
        call_peers(*wanted[options.call], torch.device("cpu" if options.dry else "cuda"))
        return 0
    process.end_with_groups()
    deadline = time.monotonic() + options.limit

    def run(number: int) -> dict[str, Any]:
        log = options.json.with_name(f"warm-{number}.log")
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.warm",
            "--json",
            str(options.json),
            "--call",
            str(number),
        ]
        command += ["--dry"] if options.dry else []
        limit = deadline - time.monotonic()
        done = process.run(command, log, limit=limit, cwd=ROOT, env=environment())
        return {
            "call": number,
            "exit_code": done.exit_code,
            "seconds": round(done.seconds, 1),
            "tail": done.tail,
        }

    with ThreadPoolExecutor(len(wanted)) as pool:
        found = list(pool.map(run, range(len(wanted))))
    for row in found:
        print(row)
    replace_json(options.json, {"calls": found})
    return 0  # whether a peer works is for the measurements to say


if __name__ == "__main__":
    sys.exit(main())
