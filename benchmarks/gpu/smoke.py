"""Is anything alive? Each op once on each GPU backend against float64, in the dtype and head dim of the measurements."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from lightning_attn import available_backends
from lightning_attn.cli.accuracy import Judge
from lightning_attn.cli.case import Case, dtype_name
from lightning_attn.cli.cases import Attention, Decode, GatedRMSNorm
from lightning_attn.cli.moe_blocks import MoeMlp
from lightning_attn.cli.moe_cases import GroupedGemm, Route
from lightning_attn.cli.report import shape_name, takes

from . import dry, part
from .record import replace_json
from .steps import GPU_BACKENDS


def cases(dry_run: bool) -> Iterator[Case]:
    dtype, d = (dry.DTYPE, 16) if dry_run else (torch.bfloat16, 128)
    yield Attention(dtype, T=70, H=2, K=d, V=d, stateful=True)
    yield Attention(dtype, T=130, H=2, K=d, V=d, lengths=(65, 0, 1, 64))
    yield Decode(dtype, B=3, H=2, K=d, V=d)
    yield Decode(dtype, B=5, T=3, H=2, K=d, V=d, state=torch.bfloat16, slots=True)
    yield GatedRMSNorm(dtype, rows=7, D=64 * d)
    yield Attention(torch.float32, T=70, H=2, K=d, V=d)
    yield Route(dtype, T=70, E=32, k=2)
    yield GroupedGemm(dtype, M=70, E=4, N=2 * d, K=d)
    yield MoeMlp(dtype, T=70, D=2 * d, F=d, E=4, k=2)
    yield MoeMlp(dtype, T=3, D=2 * d, F=d, E=4, k=2, int8=True)


def rows(device: torch.device, dry_run: bool) -> Iterator[dict[str, Any]]:
    """A row for each case on each backend that takes it."""
    for case in cases(dry_run):
        judge, inputs = None, case.inputs(device)
        for backend in GPU_BACKENDS:
            if not takes(backend, case, device):
                continue
            judge = judge or Judge(case, inputs, case.fullest_pass)
            start = time.perf_counter()
            verdicts = judge.verdicts(case.ours(backend))
            yield {
                "backend": backend,
                "op": case.op,
                "dtype": dtype_name(case.dtype),
                "shape": case.shape,
                "ok": all(verdict.ok for verdict in verdicts),
                "why": "; ".join(str(verdict) for verdict in verdicts if not verdict.ok)[:1000] or None,
                "seconds": round(time.perf_counter() - start, 2),  # most of it compilation
            }


def main() -> int:
    options = part.parser("smoke", __doc__).parse_args()
    if options.dry:
        dry.shrink()
    found: list[dict[str, Any]] = []
    for row in rows(torch.device("cpu" if options.dry else "cuda"), options.dry):
        found.append(row)
        replace_json(options.json, {"rows": found})
        where = f"{row['backend']} {row['op']} {row['dtype']} {shape_name(row['shape'])}"
        print(f"{where}: {'ok' if row['ok'] else row['why']} ({row['seconds']} s)")
    for backend in GPU_BACKENDS:
        print(f"{backend}: {available_backends()[backend]}")
    if not found:
        print("no GPU backend takes any case")
    return int(not found or not all(row["ok"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
