"""The GPU tests: several processes at a time, each with a file or a part of one, and a count of what passed.

Of their own because an error of a kernel can leave all that follows in its process failing; several because the time of a
first run is mostly that of the compiler, which runs on one core.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from . import process, shard
from .record import replace_json

ROOT = Path(__file__).resolve().parent.parent.parent
MOST_WORKERS = 12
TESTS_OF_A_PROCESS = 25  # it takes seconds to start one
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=")
HEAVY = ("test_gpu_large.py", "test_long.py")  # gigabytes: one after the other
MOST_FAILURES = 200  # that are kept
NOTHING_COLLECTED = 5  # pytest's exit code
DRY_FILE, DRY_KEYWORD = "test_slots.py", "padding_may_repeat"  # quick in the interpreter
CRASHED, FAILED, TIMED_OUT, PASSED, NO_TESTS = "crashed", "failed", "timed out", "passed", "no GPU test"
WORST_FIRST = (CRASHED, FAILED, TIMED_OUT, PASSED, NO_TESTS)
COUNTS = ("passed", "failed", "errors", "skipped")

File = dict[str, Any]
Failures = list[dict[str, str]]


@dataclass(frozen=True)
class Job:
    """A file, or one of the `parts` of its tests."""

    path: Path
    part: int = 0
    parts: int = 1

    @property
    def name(self) -> str:
        return self.path.stem if self.parts == 1 else f"{self.path.stem}-{self.part + 1}"


def jobs(tests: Path, counts: dict[str, int] | None) -> tuple[list[Job], list[Job]]:
    """Those that fill the GPU's memory, to run one at a time, and the others; long ones first, to end together. `counts`
    are the GPU tests of each file that has any; None if they could not be counted.
    """
    paths = sorted(tests.glob("test_*.py"))
    if counts is None:
        found = [Job(path) for path in paths]
    else:
        paths = sorted((p for p in paths if p.name in counts), key=lambda p: -counts[p.name])
        found = []
        for path in paths:
            parts = 1 if path.name in HEAVY else -(-counts[path.name] // TESTS_OF_A_PROCESS)
            found += [Job(path, part, parts) for part in range(parts)]
    heavy = [job for job in found if job.path.name in HEAVY]
    return heavy, [job for job in found if job not in heavy]


def counted(tests: Path, log: Path, limit: float) -> dict[str, int] | None:
    """How many GPU tests each file has that has any; None if a file cannot be collected, or there are none."""
    command = [*PYTEST, str(tests), "-m", "gpu", "--collect-only", "-qq"]
    done = process.run(command, log, limit=limit, cwd=tests.parent, env=environment())
    found = re.findall(r"^(?:.*/)?(test_\w+\.py): (\d+)$", log.read_text(errors="replace"), re.MULTILINE)
    return {name: int(count) for name, count in found} if found and done.exit_code == 0 else None


def environment(job: Job | None = None) -> dict[str, str]:
    """Of one of many processes."""
    env = os.environ | {"OMP_NUM_THREADS": "2"}  # there are as many processes as cores
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    return env | ({shard.VARIABLE: f"{job.part}/{job.parts}"} if job else {})


class Suite:
    """Runs jobs and keeps, in `json`, what is known of the files so far."""

    def __init__(self, json: Path, logs: Path, deadline: float, keyword: str | None = None) -> None:
        self.json, self.logs, self.deadline, self.keyword = json, logs, deadline, keyword
        self.files: dict[str, File] = {}
        self.failures: Failures = []
        self.cut: set[str] = set()
        self._lock = threading.Lock()

    def run(self, heavy: list[Job], others: list[Job], workers: int) -> None:
        """One worker takes the heavy ones in turn, beside the others."""
        with ThreadPoolExecutor(workers) as pool:
            pending = [pool.submit(self._one_after_the_other, heavy)]
            pending += [pool.submit(self._one_after_the_other, [job]) for job in others]
            for future in pending:
                future.result()
        self._write(complete=True)

    def _one_after_the_other(self, jobs: list[Job]) -> None:
        for job in jobs:
            left = self.deadline - time.monotonic()
            found, failures = self._run(job, left) if left > 1 else (None, [])
            with self._lock:
                if found is None or found["outcome"] == TIMED_OUT:
                    self.cut.add(job.name)
                if found is not None:
                    self.files[job.path.name] = _together(self.files.get(job.path.name), found)
                self.failures = (self.failures + failures)[:MOST_FAILURES]
                self._write(complete=False)

    def _run(self, job: Job, limit: float) -> tuple[File, Failures]:
        log, report = self.logs / f"{job.name}.log", self.logs / f"{job.name}.xml"
        report.unlink(missing_ok=True)
        command = [*PYTEST, str(job.path), "-m", "gpu", "-v", "--tb=short", f"--junitxml={report}"]
        command += ["-k", self.keyword] if self.keyword else []
        command += ["-p", shard.__name__] if job.parts > 1 else []
        cwd = job.path.parent.parent
        done = process.run(command, log, limit=limit, cwd=cwd, env=environment(job))
        counts, failures = _read(report)
        found: File = {
            "outcome": _outcome(done.exit_code, bool(counts)),
            **counts,
            "seconds": round(done.seconds, 1),
            "processes": 1,
        }
        if found["outcome"] in (CRASHED, TIMED_OUT):
            failures = [{"id": _last_test(log) or job.name, "message": _why(done)}]
            found["tail"] = done.tail
        return found, failures

    def _write(self, complete: bool) -> None:
        data = {
            "totals": {name: sum(f.get(name, 0) for f in self.files.values()) for name in COUNTS},
            "files": dict(sorted(self.files.items())),
            "failures": self.failures,
            "cut": sorted(self.cut),
            "complete": complete,
        }
        replace_json(self.json, data)

    @property
    def green(self) -> bool:
        """Whether nothing failed; what was not reached is in `cut`, which makes the step one that timed out."""
        return all(file["outcome"] in (PASSED, NO_TESTS, TIMED_OUT) for file in self.files.values())


def _together(old: File | None, new: File) -> File:
    """What is known of a file whose tests are spread over several processes."""
    if old is None:
        return new
    sums = {name: old.get(name, 0) + new.get(name, 0) for name in (*COUNTS, "seconds", "processes")}
    worst = min(old["outcome"], new["outcome"], key=WORST_FIRST.index)
    return old | new | sums | {"outcome": worst, "seconds": round(sums["seconds"], 1)}


def _outcome(exit_code: int | None, counted: bool) -> str:
    if exit_code is None:
        return TIMED_OUT
    if exit_code == NOTHING_COLLECTED:
        return NO_TESTS
    if exit_code == 0:
        return PASSED
    return FAILED if counted and exit_code > 0 else CRASHED


def _read(report: Path) -> tuple[dict[str, int], Failures]:
    """Of pytest's JUnit file: the counts, and each failing test with the first line of its message."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {}, []
    counts = dict.fromkeys(COUNTS, 0)
    failures = []
    for case in cases:
        kinds = {child.tag: child for child in case}
        for tag, name in (("failure", "failed"), ("error", "errors"), ("skipped", "skipped")):
            if tag in kinds:
                counts[name] += 1
                if tag != "skipped":
                    message = (kinds[tag].get("message") or kinds[tag].text or "").strip()
                    failures.append({"id": _id(case), "message": (message.splitlines() or [""])[0][:300]})
                break
        else:
            counts["passed"] += 1
    return counts, failures


def _id(case: ElementTree.Element) -> str:
    """As pytest takes it."""
    return f"{(case.get('classname') or '').replace('.', '/')}.py::{case.get('name')}"


def _last_test(log: Path) -> str | None:
    """The one that was running: with -v pytest names each before it runs."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if "::" in line]
    return re.sub(r" +(PASSED|FAILED|SKIPPED|ERROR)\b.*", "", lines[-1]).strip()[:200] if lines else None


def _why(done: process.Finished) -> str:
    if done.exit_code is None:
        return f"did not end within {done.seconds:.0f} s"
    if done.exit_code < 0:
        return f"the process was ended by signal {-done.exit_code}"
    last = [line for line in done.tail.splitlines() if line.strip()]
    return f"exit code {done.exit_code}: {last[-1] if last else ''}"[:300]


def _lines(suite: Suite) -> Iterator[str]:
    for name, file in sorted(suite.files.items()):
        counts = ", ".join(f"{file[key]} {key}" for key in COUNTS if file.get(key))
        yield f"{name}: {file['outcome']} {counts} ({file['seconds']} s in {file['processes']})"
    for failure in suite.failures:
        yield f"{failure['id']}: {failure['message']}"
    failed = sum(f.get("failed", 0) + f.get("errors", 0) for f in suite.files.values())
    crashed = sum(f["outcome"] == CRASHED for f in suite.files.values())
    passed = sum(f.get("passed", 0) for f in suite.files.values())
    yield f"{passed} tests pass, {failed} fail, {crashed} files crash, {len(suite.cut)} parts are cut"


def workers() -> int:
    """As many processes as the cores serve."""
    return max(2, min(MOST_WORKERS, (os.cpu_count() or 2) - 3))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.suite", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--tests", type=Path, default=ROOT / "tests")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    process.end_with_groups()
    suite = Suite(
        options.json,
        options.logs,
        time.monotonic() + options.limit,
        DRY_KEYWORD if options.dry else None,
    )
    if options.dry:
        suite.run([], [Job(options.tests / DRY_FILE, part, 2) for part in range(2)], 2)
    else:
        counts = counted(options.tests, options.logs / "collected.log", options.limit / 3)
        suite.run(*jobs(options.tests, counts), workers())
    for line in _lines(suite):
        print(line)
    return int(not suite.green)


if __name__ == "__main__":
    sys.exit(main())
