"""`lightning-attn check`: every op of every available backend against float64, by the rule of `accuracy`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import click
import torch
from rich.table import Table

from lightning_attn.backends import supports

from . import report
from .accuracy import Judge, Verdict
from .case import Case, dtype_name
from .suites import check_cases


@dataclass(frozen=True)
class Row:
    """One output of one case on one backend."""

    backend: str
    case: Case
    verdict: Verdict

    @property
    def group(self) -> tuple[str, str, str]:
        return self.backend, self.case.op, dtype_name(self.case.dtype)

    def as_json(self) -> dict[str, object]:
        what = dict(zip(("backend", "op", "dtype"), self.group, strict=True))
        return what | {"shape": self.case.shape} | asdict(self.verdict) | {"ok": self.verdict.ok}


@click.command()
@click.option("--backend", help="Only this backend; it has to be available.  [default: all available]")
@report.json_option
def check(backend: str | None, json_path: Path | None) -> None:
    """Compare every op with its truth in float64.

    Outputs, states and gradients may have twice the error of plain PyTorch in the same dtype, plus one
    rounding. Exits with 1 if any has more. Cases that a backend does not take are left out and counted.
    """
    backends = report.backends(backend)
    console = report.console()
    rows: list[Row] = []
    left_out: Counter[tuple[str, str]] = Counter()  # backend and reason
    cases = list(check_cases())
    with report.progress(console) as progress:
        task = progress.add_task("check", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.op} {dtype_name(case.dtype)}")
            for device, group in groupby(backends, _device):
                reasons = {backend: _reasons(backend, case, device) for backend in group}
                left_out.update((backend, reason) for backend, reason in reasons.items() if reason)
                rows += _judge(case, [backend for backend, reason in reasons.items() if not reason], device)
            progress.advance(task)
    console.print(_table(rows))
    failures = [row for row in rows if not row.verdict.ok]
    for row in failures:
        where = " ".join((*row.group, report.shape_name(row.case.shape)))
        console.print(f"FAIL {where}: {row.verdict}", style="red", markup=False, highlight=False)
    for (name, reason), count in left_out.items():
        message = f"{name}: {count} of {len(cases)} cases left out: {reason}"
        console.print(message, markup=False, highlight=False)
    console.print(f"{len(rows) - len(failures)} of {len(rows)} outputs pass.")
    if json_path:
        report.write_json(json_path, [row.as_json() for row in rows])
    if failures or not rows:
        raise SystemExit(1)


def _device(backend: str) -> torch.device:
    """Where a backend is judged: those that are made for GPUs there, if there is one."""
    on_gpu = backend in ("triton", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _reasons(backend: str, case: Case, device: torch.device) -> str:
    """Why a backend does not take a case; empty if it does."""
    return ", ".join(
        dict.fromkeys(reason for spec in case.specs(device) for reason in supports(backend, spec))
    )


def _judge(case: Case, backends: list[str], device: torch.device) -> Iterator[Row]:
    if not backends:
        return
    inputs = case.inputs(device)
    judge = Judge(case, inputs, case.fullest_pass)
    for backend in backends:
        for verdict in judge.verdicts(case.ours(backend)):
            yield Row(backend, case, verdict)


def _table(rows: list[Row]) -> Table:
    """For each backend, op and dtype: how many outputs pass, and the one nearest to its bound or beyond."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    table = report.table("Worst of each op", "backend", "op", "dtype", right=("pass", "error", "allowed"))
    for name in ("output", "shape", "ok"):
        table.add_column(name)
    for group, members in groups.items():
        worst = max(members, key=lambda row: row.verdict.strain)
        passed = f"{sum(row.verdict.ok for row in members)}/{len(members)}"
        v = worst.verdict
        figures = (passed, report.exponent(v.error), report.exponent(v.allowed))
        table.add_row(*group, *figures, v.output, report.shape_name(worst.case.shape), report.tick(v.ok))
    return table
