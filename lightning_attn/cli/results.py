"""The rows that `bench` yields, and how they are shown: tables, JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from rich.table import Table

from . import machine, report
from .cases import Case, Shape, dtype_name
from .machine import Limits
from .peers import OURS

STREAMING = ("decode", "gated_rms_norm")  # bounded by memory traffic, so their rate is one of bytes


@dataclass(frozen=True)
class Timing:
    """One provider at one pass of one case. What has failed its check is not timed: median_ms is None."""

    case: Case
    pass_: str
    provider: str
    backend: str
    device: str
    median_ms: float | None
    error: float
    ok: bool


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
    limit_ms: float
    fraction_of_limit: float | None
    error: float
    ok: bool

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
            fraction_of_limit=None if median is None else limit / median,
            error=timing.error,
            ok=timing.ok,
        )

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
        amount, unit = (self.bytes, "GB/s") if self.op in STREAMING else (self.flops, "GFLOP/s")
        return f"{report.three_digits(amount / self.median_ms / 1e6)} {unit}"

    def as_json(self) -> dict[str, object]:
        return {name.rstrip("_"): value for name, value in asdict(self).items()}


def document(limits: Limits, calls: dict[str, dict[str, float]], rows: list[Row]) -> dict[str, object]:
    """The JSON file: limits in flop/s and bytes/s; `calls`, if measured, in microseconds."""
    return {
        "versions": machine.versions(),
        "device": machine.device(),
        "limits": limits.as_json(),
        "call_us": calls,
        "commit": machine.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": [row.as_json() for row in rows],
    }


def headline(limits: Limits, backend: str) -> str:
    device = machine.device()
    gemm = ", ".join(
        f"{dtype_name(dtype)} {rate / 1e9:.0f}" for dtype, rate in limits.gemm_flops_per_s.items()
    )
    runs = f"cpu ({device['instruction_set']})" if backend == "cpu" else backend
    return (
        f"{device['name']}, threads {device['threads']}, backend {runs}\n"
        f"Limits: GEMM {gemm} GFLOP/s; copy {limits.copy_bytes_per_s / 1e9:.1f} GB/s"
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
            mine = ours[row.case]
            ratio = f"{row.median_ms / mine:.2f}" if row.median_ms and mine else "-"
            table.add_row(*row.case, row.provider, ratio)
    return table
