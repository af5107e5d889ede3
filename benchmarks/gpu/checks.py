"""`lightning-attn check` on every GPU backend, its cases spread over several processes: a first run is mostly compiling."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import process
from .record import read_json, replace_json
from .suite import ROOT, environment, workers

NOTHING = "0 of 0 outputs pass"  # what check says, and exits with 1, where a backend takes none of the cases
CUT = "cut"
PARTS = {"triton": 12, "cuda": 2}  # processes, by how much a backend compiles

Part = tuple[list[dict[str, Any]], str | None]  # check's rows, and why there are not all


def check_part(backend: str, number: int, count: int, json: Path, dry_run: bool) -> None:
    """In a process of its own: the command, on every `count`th case; in a dry run on one of each op."""
    from lightning_attn.cli import main, suites

    from . import dry

    check = importlib.import_module("lightning_attn.cli.check")  # the command of that name hides it
    cases = list(suites.check_cases())
    if dry_run:
        dry.shrink()
        cases = list({case.op: case for case in reversed(cases) if case.dtype == dry.DTYPE}.values())
    check.check_cases = lambda: iter(cases[number::count])
    main(["check", "--backend", backend, "--json", str(json)])


def start(
    backend: str, options: argparse.Namespace, deadline: float, pool: ThreadPoolExecutor
) -> list[Future[Part]]:
    """The processes of a backend."""
    count = 1 if options.dry else PARTS[backend]

    def part(number: int) -> Part:
        json = options.logs / f"{backend}-{number + 1}.json"
        json.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu.checks", "--json", str(json), "--backend", backend]
        command += ["--part", f"{number}/{count}", *(["--dry"] if options.dry else [])]
        limit = deadline - time.monotonic()
        done = process.run(command, json.with_suffix(".log"), limit=limit, cwd=ROOT, env=environment())
        rows = read_json(json)
        if done.exit_code is None:
            return rows or [], CUT
        if not isinstance(rows, list) or (done.exit_code and not rows and NOTHING not in done.tail):
            last = (done.tail.splitlines() or [""])[-1]
            return [], f"exit code {done.exit_code}: {last}"[:300]
        return rows, None

    return [pool.submit(part, number) for number in range(count)]


def counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of check's rows, those that fail; of the others, how many."""
    counts = Counter((row["backend"], row["op"], row["dtype"], row["ok"]) for row in rows)
    groups = sorted({key[:3] for key in counts})
    return {
        "passed": sum(row["ok"] for row in rows),
        "failed": [row for row in rows if not row["ok"]],
        "groups": [
            dict(zip(("backend", "op", "dtype"), group, strict=True))
            | {"passed": counts[(*group, True)], "failed": counts[(*group, False)]}
            for group in groups
        ],
    }


def check_all(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.limit
    with ThreadPoolExecutor(workers()) as pool:
        pending = {name: start(name, options, deadline, pool) for name in options.backends}
        parts = {name: [future.result() for future in futures] for name, futures in pending.items()}
    rows = [row for found in parts.values() for some, _ in found for row in some]
    troubles = [f"{name}: {why}" for name, found in parts.items() for _, why in found if why and why != CUT]
    cut = [name for name, found in parts.items() if any(why == CUT for _, why in found)]
    result = counted(rows) | {"crashed": troubles, "cut": cut}
    replace_json(options.json, result)
    for row in result["failed"]:
        print(f"FAIL {row}")
    for line in (*troubles, *(f"{name}: cut" for name in cut)):
        print(line)
    print(f"{result['passed']} of {len(rows)} outputs pass.")
    return int(bool(result["failed"] or troubles or not rows))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.checks", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--backend", dest="backends", action="append", required=True)
    parser.add_argument("--logs", type=Path)
    parser.add_argument(
        "--part", help="i/n: only this part of the cases, of the first backend, in this process"
    )
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.part:
        number, count = map(int, options.part.split("/"))
        check_part(options.backends[0], number, count, options.json, options.dry)
        return 0
    process.end_with_groups()
    options.logs.mkdir(parents=True, exist_ok=True)
    return check_all(options)


if __name__ == "__main__":
    sys.exit(main())
