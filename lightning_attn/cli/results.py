"""The rows that `bench` yields, and how they are shown: tables, JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from typing import Any

import torch
from rich.table import Table

from . import machine, report
from .case import Case, Shape, dtype_name
from .machine import Limits
from .moe_suites import OPS as MOE
from .peers import OURS

STREAMING = ("decode", "gated_rms_norm")  # bounded by memory traffic, so their rate is one of bytes
STREAMING_ON_GPU = (*STREAMING, "attention")  # whose products cost a GPU less than its inputs and outputs
FEW_FLOPS = 32  # of the mixture of experts for each byte: with fewer, as in decoding, its matrices are what takes time


@dataclass(frozen=True)
class Timing:
    """One provider at one pass of one case. What has failed its check is not timed: median_ms is None. `raised`
    is what the provider, or the case itself, raised.
    """

    case: Case
    pass_: str
    provider: str
    backend: str
    device: str
    median_ms: float | None
    error: float
    ok: bool
    raised: str | None = None


@dataclass(frozen=True)
class Row:
    """A timing beside the limits of the machine."""

    op: str
    pass_: str
    provider: str
    backend: str
    device: str
    dtype: str
    shape: Shape
    median_ms: float | None
    bytes: int
    flops: int
    limit_ms: float | None
    fraction_of_limit: float | None
    error: float | None
    ok: bool
    raised: str | None = None

    @staticmethod
    def of(timing: Timing, limits: Limits) -> Row:
        case, pass_, median = timing.case, timing.pass_, timing.median_ms
        flops, bytes_ = case.flops(pass_), case.bytes(pass_)
        limit = limits.milliseconds(flops, bytes_, case.dtype)
        return Row(
            op=case.op,
            pass_=pass_,
            provider=timing.provider,
            backend=timing.backend,
            device=timing.device,
            dtype=dtype_name(case.dtype),
            shape=case.shape,
            median_ms=median,
            bytes=bytes_,
            flops=flops,
            limit_ms=limit,
            fraction_of_limit=None if median is None or limit is None else limit / median,
            error=timing.error if math.isfinite(timing.error) else None,
            ok=timing.ok,
            raised=timing.raised,
        )

    @staticmethod
    def from_json(row: dict[str, Any]) -> Row:
        """What else somebody has noted in the row is left out."""
        values: dict[str, Any] = {f.name: row.get(f.name.rstrip("_")) for f in fields(Row)}
        return Row(**values)

    def as_json(self) -> dict[str, Any]:
        return {name.rstrip("_"): value for name, value in asdict(self).items()}

    @property
    def case(self) -> tuple[str, str, str, str]:
        """What rows of different providers share when they can be compared."""
        return self.op, self.pass_, self.dtype, report.shape_name(self.shape)

    @property
    def time(self) -> str:
        """In ms."""
        return "not timed" if self.median_ms is None else report.three_digits(self.median_ms)

    @property
    def rate(self) -> str:
        """GB/s or GFLOP/s, whichever bounds the op."""
        if self.median_ms is None:
            return "-"
        streaming = STREAMING_ON_GPU if self.device.startswith("cuda") else STREAMING
        bound = self.op in streaming or (self.op in MOE and self.flops < FEW_FLOPS * self.bytes)
        amount, unit = (self.bytes, "B/s") if bound else (self.flops, "FLOP/s")
        return report.rate(1e3 * amount / self.median_ms, unit)


def facts(device: torch.device) -> dict[str, Any]:
    """The part of the JSON file that says where and when."""
    return {
        "versions": machine.versions(),
        "device": machine.device(device),
        "commit": machine.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def document(
    facts: dict[str, Any], limits: Limits, calls: dict[str, dict[str, float]], rows: list[Row]
) -> dict[str, Any]:
    """The JSON file: limits in flop/s and bytes/s; `calls`, if measured, in microseconds."""
    measured = {"limits": limits.as_json(), "call_us": calls, "rows": [row.as_json() for row in rows]}
    return report.finite(facts | measured)


def rows_of(document: dict[str, Any]) -> list[Row]:
    return [Row.from_json(row) for row in document["rows"]]


def headline(document: dict[str, Any]) -> str:
    device, limits = document["device"], document["limits"]
    used = dict.fromkeys(row["backend"] for row in document["rows"] if row["provider"] == OURS)
    runs = ", ".join(f"cpu ({device['instruction_set']})" if name == "cpu" else name for name in used)
    size = (
        f"{device['multiprocessors']} multiprocessors of {device['compute_capability']}"
        if "host" in device
        else f"threads {device['threads']}"
    )
    gemm = ", ".join(
        f"{name} {report.rate(rate, 'FLOP/s')}" for name, rate in limits["gemm_flops_per_s"].items()
    )
    return (
        f"{device['name']}, {size}, backend {runs}\n"
        f"Limits: GEMM {gemm or '-'}; copy {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s"
    )


def times(rows: list[Row]) -> Iterator[Table]:
    """A table per op."""
    for op in dict.fromkeys(row.op for row in rows):
        table = report.table(
            op, "pass", "dtype", "shape", "provider", right=("ms", "rate", "of limit", "error")
        )
        table.add_column("ok")
        for row in rows:
            if row.op == op:
                fraction = "-" if row.fraction_of_limit is None else f"{row.fraction_of_limit:.2f}"
                figures = (row.time, row.rate, fraction, report.exponent(row.error), report.tick(row.ok))
                table.add_row(*row.case[1:], row.provider, *figures)
        yield table


def speed_ups(rows: list[Row]) -> Table:
    """How many times as fast ours is as each peer, case by case."""
    ours = {row.case: row.median_ms for row in rows if row.provider == OURS}
    table = report.table(
        "lightning_attn against", "op", "pass", "dtype", "shape", "peer", right=("times as fast",)
    )
    for row in rows:
        if row.provider != OURS:
            mine = ours.get(row.case)
            ratio = f"{row.median_ms / mine:.2f}" if row.median_ms and mine else "-"
            table.add_row(*row.case, row.provider, ratio)
    return table
