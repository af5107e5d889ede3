"""Times the cases of one step, ours beside the peers, and keeps what it has measured after every case.

A case that ends the process, or leaves the GPU unusable, is not lost alone with all that follow: run again, this goes on
behind it, and first tries it once more without the peers.
"""

from __future__ import annotations

import importlib
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightning_attn.cli import machine, report
from lightning_attn.cli.case import dtype_name

from . import dry, part
from .cases import STEPS, Measured, of_step
from .record import FAILED, OK, better_limits, read_json, replace_json
from .steps import GPU_BACKENDS
from .targets import OURS

bench = importlib.import_module("lightning_attn.cli.bench")  # the command of that name hides it

SECONDS_PER_CALL, DRY_SECONDS_PER_CALL = 0.15, 0.002  # for timing one provider at one pass
ENOUGH = 4.0  # seconds: with less no case is begun
CRASHED, CUT = "crashed", "cut"


@dataclass(frozen=True)
class Run:
    """One case on one backend, perhaps with the peers."""

    measured: Measured
    asked: str  # a backend, or "auto"
    compare: bool

    @property
    def label(self) -> str:
        case = self.measured.case
        return f"{case.op} {dtype_name(case.dtype)} {report.shape_name(case.shape)} {'+'.join(case.passes)} {self.asked}"


class Results:
    """What the JSON holds: a row of `bench` for every time, an entry for every run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = read_json(path) or {}
        self.rows: list[dict[str, Any]] = data.get("rows", [])
        self.runs: dict[str, dict[str, Any]] = data.get("runs", {})
        self.limits: dict[str, Any] = data.get("limits", {})
        self.versions: dict[str, Any] = data.get("versions", {})
        if running := data.get("running"):
            self.runs[running] = {
                "outcome": CRASHED,
                "why": "the process ended in it",
                "tries": self.tries(running) + 1,
            }

    def tries(self, label: str) -> int:
        return self.runs.get(label, {}).get("tries", 0)

    def wants(self, run: Run) -> bool:
        """Whether it has not been tried, or only with the peers, one of which may have ended it."""
        known = self.runs.get(run.label)
        return known is None or (known["outcome"] == CRASHED and known["tries"] < 2 and run.compare)

    def write(self, *, unfinished: bool, running: str | None = None) -> None:
        data = {
            "versions": self.versions,
            "limits": self.limits,
            "rows": self.rows,
            "runs": self.runs,
            "cut": [label for label, run in self.runs.items() if run["outcome"] == CUT],
            "unfinished": unfinished,
            "running": running,
        }
        replace_json(self.path, data)

    def keep(self, run: Run, document: dict[str, Any], seconds: float, compare: bool, usable: bool) -> None:
        """Rows of a document of `bench`; only ours count for the outcome. If one of ours raised beside the peers, it
        may be for them: theirs are kept, and ours is to be timed again.
        """
        rows = [row | {"asked": run.asked, "listed": run.measured.listed} for row in document["rows"]]
        ours = [row for row in rows if row["provider"] == OURS]
        raised = next((row["raised"] for row in ours if row["raised"]), None)
        wrong = [row["pass"] for row in ours if not row["ok"]]
        again = compare and (raised is not None or not usable)
        self.rows += [row for row in rows if row["provider"] != OURS and row["ok"]] if again else rows
        self.limits = better_limits(self.limits, document["limits"])
        self.versions = document["versions"]
        why = raised or (f"our result failed its check at: {', '.join(wrong)}" if wrong else None)
        self.runs[run.label] = {
            "outcome": CRASHED if again else FAILED if wrong else OK,
            "why": why or (None if usable else "it left the GPU unusable"),
            "seconds": round(seconds, 1),
            "tries": self.tries(run.label) + 1,
            "peers": compare,
        }


def runs(step: str, dry_run: bool) -> Iterator[Run]:
    """On the backend that "auto" takes, with the peers; where others are wanted, these alone."""
    for measured in of_step(step, dry_run):
        first = "triton" if dry_run else "auto"
        yield Run(measured, first, compare=True)
        if measured.every_backend:
            for backend in _others(measured, first, torch.device("cpu" if dry_run else "cuda")):
                yield Run(measured, backend, compare=False)


def _others(measured: Measured, first: str, device: torch.device) -> list[str]:
    """The GPU backends that take the case, beside the one that the first comes to."""
    return [
        backend
        for backend in GPU_BACKENDS
        if report.takes(backend, measured.case, device)
        and backend != report.runs_on(measured.case, first, device)
    ]


def measure_all(step: str, results: Results, deadline: float, dry_run: bool) -> bool:
    """Whether the process can go on to the end; False: it has to be run again."""
    device = torch.device("cpu" if dry_run else "cuda")
    console = report.console()
    # Seconds of one case: one that hangs ends the process.
    most = max(20.0, (deadline - time.monotonic()) / 2)
    for run in runs(step, dry_run):
        while results.wants(run):
            if deadline - time.monotonic() < ENOUGH:
                results.runs.setdefault(run.label, {"outcome": CUT, "why": "no time was left"})
                break
            signal.alarm(int(most))
            usable = _measure(run, results, device, console)
            signal.alarm(0)
            if not usable:
                print("the GPU cannot be used any more in this process", flush=True)
                return False
    return True


def _measure(run: Run, results: Results, device: torch.device, console: Console) -> bool:
    """Whether the GPU can be used after it."""
    tries = results.tries(run.label)
    compare = run.compare and not tries
    results.write(unfinished=True, running=run.label)
    print(f"{run.label}{'' if compare else ', without peers'}", flush=True)
    start = time.monotonic()
    case = run.measured.case
    try:
        document = bench.measure([case], run.asked, device, compare=compare, console=console)
    except Exception as error:  # noqa: BLE001 - it is for the case alone to have failed
        why = f"{type(error).__name__}: {error}"[:500]
        results.runs[run.label] = {"outcome": CRASHED, "why": why, "tries": tries + 1, "peers": compare}
        usable = _usable(device)
    else:
        usable = _usable(device)
        results.keep(run, document, time.monotonic() - start, compare, usable)
    results.write(unfinished=True)
    return usable


def _usable(device: torch.device) -> bool:
    """An error of a kernel stays with the process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return bool((torch.ones(8, device=device).sum() == 8).item())
    except Exception:  # noqa: BLE001 - any is the answer
        return False


def main() -> int:
    parser = part.parser("measure", __doc__)
    parser.add_argument("step", choices=STEPS)
    options = parser.parse_args()
    if options.dry:
        dry.shrink()
    bench.SECONDS_PER_CALL = DRY_SECONDS_PER_CALL if options.dry else SECONDS_PER_CALL
    machine.measure_limits = cache(machine.measure_limits)  # once, not for every case
    results = Results(options.json)
    if not measure_all(options.step, results, time.monotonic() + options.limit, options.dry):
        return 1  # the JSON says that it is unfinished
    results.write(unfinished=False)
    bad = [label for label, run in results.runs.items() if run["outcome"] in (FAILED, CRASHED)]
    for label in bad:
        print(f"{label}: {results.runs[label]['why']}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
